"""The picture of a run. Left: time over size of one operation with fresh outputs, and the copy as a line. Right: for
each operation how many times as long as bnfast each peer takes (geometric mean, and from the least to the most)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bnfast.benchmark.cases import OPS
from bnfast.benchmark.report import Row, Summary, summarize, with_best_torch
from bnfast.cli.figure import INK, MUTED, SETTINGS

OURS = "#0b5c6b"
COLOURS = {
    "torch": "#c2571a",
    "tensorflow": "#d9a400",
    "keras-eager": "#c7a9d6",
    "keras-function": "#9a6fb5",
    "keras-xla": "#5b3b82",
    "jax": "#3f8f4f",
}
MARKERS = {"torch": "o", "tensorflow": "s", "keras-eager": "v", "keras-function": "D", "keras-xla": "^", "jax": "P"}
BAR_ORDER = (("torch", "fresh"), ("torch", "warm"), *((peer, "fresh") for peer in COLOURS if peer != "torch"))
NAMES = {"train": "training forward", "grad": "gradient", "infer": "inference"}


def save(path: Path, rows: list[Row], titles: dict[str, str], machine: str) -> None:
    """Draw `rows` and write the picture to `path` (PNG)."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: drawn by Agg whatever the screen, no global state

    dtype = "float32" if any(row["dtype"] == "float32" for row in rows) else rows[0]["dtype"]
    rows = [row for row in with_best_torch(rows) if row["dtype"] == dtype]
    op = next(op for op in OPS if any(row["op"] == op for row in rows))
    with matplotlib.rc_context(SETTINGS):
        figure: Any = Figure(figsize=(13.5, 7.6), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.895), wspace=0.06)
        figure.text(0.013, 0.955, "Batch norm on a CPU: bnfast and its peers", fontsize=15, fontweight="bold")
        subtitle = f"{dtype}, public Python APIs, medians of interleaved rounds. {machine}."
        figure.text(0.013, 0.917, subtitle, fontsize=10, color=MUTED)
        left, right = figure.subplots(1, 2, width_ratios=(1.12, 1))
        _times(left, [row for row in rows if row["op"] == op], titles)
        left.set_title(f"Time of the {NAMES[op]}, fresh outputs")
        _ratios(right, summarize(rows), titles)
        figure.savefig(path)


def _times(axes: Any, rows: list[Row], titles: dict[str, str]) -> None:
    copy = sorted((row["bytes"], row["seconds"]) for row in rows if row["peer"] == "copy")
    if copy:
        sizes = np.unique([size for size, _ in copy])
        seconds = [np.median([s for size, s in copy if size == at]) for at in sizes]
        axes.plot(sizes / 1e6, 1e3 * np.asarray(seconds), color=INK, linewidth=1.4, linestyle=(0, (5, 2)), label="copy")
    for peer, colour in COLOURS.items():
        _scatter(axes, _fresh(rows, peer), titles.get(peer, peer), color=colour, marker=MARKERS[peer], s=26, alpha=0.75)
    _scatter(axes, _fresh(rows, "bnfast"), "bnfast", color=OURS, marker="o", s=46, edgecolor="white", zorder=5)
    axes.set(xscale="log", yscale="log", xlabel="size of x, MB", ylabel="ms a call")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = axes.get_legend_handles_labels()
    first = [labels.index(name) for name in ("bnfast", "copy") if name in labels]
    places = first + [k for k in range(len(labels)) if k not in first]
    axes.legend([handles[k] for k in places], [labels[k] for k in places], loc="lower right")
    axes.set_axisbelow(True)


def _fresh(rows: Iterable[Row], peer: str) -> list[Row]:
    return [row for row in rows if (row["peer"], row["mode"]) == (peer, "fresh")]


def _scatter(axes: Any, rows: list[Row], label: str, **style: Any) -> None:
    if rows:
        sizes, times = [row["bytes"] / 1e6 for row in rows], [1e3 * row["seconds"] for row in rows]
        axes.scatter(sizes, times, label=label, linewidths=0.8 if "edgecolor" in style else 0, **style)


def _ratios(axes: Any, summaries: list[Summary], titles: dict[str, str]) -> None:
    """Horizontal bars in groups, from 1 outwards on a log axis; the whisker spans all cases."""
    found = {(s.op, s.peer, s.mode): s for s in summaries}
    height, heads, ticks, labels = 0.0, [], [], []
    for op in (op for op in OPS if any(s.op == op for s in summaries)):
        heads.append((height, NAMES[op]))
        for peer, mode in BAR_ORDER:
            if (s := found.get((op, peer, mode))) is None:
                continue
            height += 1
            ticks.append(height)
            labels.append(titles.get(peer, peer) + (", warm malloc" if mode == "warm" else ""))
            _bar(axes, height, s, COLOURS[peer], pale=mode == "warm")
        height += 1.5
    for at, name in heads:  # in the column of the labels: inside, it would stand on the line at 1
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(-0.012, at, name, fontweight="bold", **place)
    axes.axvline(1, color=OURS, linewidth=1.6, zorder=4)
    axes.set(xscale="log", yticks=ticks, yticklabels=labels, ylim=(height - 0.7, -0.7))
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.8, low), max(3.0, high) * 1.9)  # room for the figures beside the whiskers
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_title("Time over bnfast's, same outputs and round")
    axes.set_xlabel("geometric mean, line from least to most; above 1x bnfast is faster")


def _bar(axes: Any, height: float, s: Summary, colour: str, pale: bool) -> None:
    axes.barh(height, s.geomean - 1, left=1, height=0.72, color=colour, alpha=0.5 if pale else 0.95, linewidth=0)
    axes.plot([s.worst, s.best], [height] * 2, color=INK, linewidth=1, alpha=0.7, zorder=3)
    axes.annotate(
        f"{s.geomean:.1f}x",
        (max(s.best, s.geomean, 1), height),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )
