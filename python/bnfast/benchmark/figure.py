"""The picture of `bnfast bench`.

Left: the time of one operation with fresh outputs against the size of x; the copy is a line. Right: for each operation,
the ratio of each peer's time to bnfast's, as a bar (geometric mean) with a thin line from the smallest to the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bnfast.benchmark import style
from bnfast.benchmark.cases import OPS
from bnfast.benchmark.report import Row, Summary, summarize, with_best_torch
from bnfast.benchmark.style import INK, MUTED, OURS

COLOURS = {
    "torch": "#c2571a",
    "tensorflow": "#d9a400",
    "keras-eager": "#c7a9d6",
    "keras-function": "#9a6fb5",
    "keras-xla": "#5b3b82",
    "jax": "#3f8f4f",
}
MARKERS = {"torch": "o", "tensorflow": "s", "keras-eager": "v", "keras-function": "D", "keras-xla": "^", "jax": "P"}
OP_TITLES = {"train": "training forward", "grad": "gradient", "infer": "inference"}


def save(target: Path | BinaryIO, rows: list[Row], titles: dict[str, str], machine: str) -> None:
    """Draw `rows` and write the picture to `target` (PNG)."""
    from matplotlib.figure import Figure  # not pyplot: Figure needs no display and has no global state

    dtype = "float32" if any(row["dtype"] == "float32" for row in rows) else rows[0]["dtype"]
    rows = [row for row in with_best_torch(rows) if row["dtype"] == dtype]
    first_op = next(op for op in OPS if any(row["op"] == op for row in rows))
    with style.settings():
        figure: Any = Figure(figsize=(13.5, 7.6), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.895), wspace=0.06)
        figure.text(0.013, 0.955, "Batch norm on a CPU: bnfast and its peers", fontsize=15, fontweight="bold")
        subtitle = f"{dtype}, public Python APIs, medians of interleaved rounds. {machine}."
        figure.text(0.013, 0.917, subtitle, fontsize=10, color=MUTED)
        left, right = figure.subplots(1, 2, width_ratios=(1.12, 1))
        _draw_times(left, [row for row in rows if row["op"] == first_op], titles)
        left.set_title(f"Time of the {OP_TITLES[first_op]}, fresh outputs")
        _draw_ratios(right, summarize(rows), titles)
        figure.savefig(target, format="png")


def _draw_times(axes: Any, rows: list[Row], titles: dict[str, str]) -> None:
    """Time against size, both on log axes: one point per case and peer."""
    _draw_copy_line(axes, [row for row in rows if row["peer"] == "copy"])
    for peer, colour in COLOURS.items():
        _scatter(axes, _fresh(rows, peer), titles.get(peer, peer), color=colour, marker=MARKERS[peer], s=26, alpha=0.75)
    _scatter(axes, _fresh(rows, "bnfast"), "bnfast", color=OURS, marker="o", s=46, edgecolor="white", zorder=5)
    axes.set(xscale="log", yscale="log", xlabel="size of x, MB", ylabel="ms per call")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    _draw_legend(axes, first=("bnfast", "copy"))
    axes.set_axisbelow(True)


def _draw_copy_line(axes: Any, rows: list[Row]) -> None:
    seconds: dict[int, list[float]] = {}
    for row in rows:
        seconds.setdefault(row["bytes"], []).append(row["seconds"])
    if seconds:
        sizes = sorted(seconds)
        medians = [1e3 * float(np.median(seconds[size])) for size in sizes]
        dashes = (0, (5, 2))
        axes.plot([size / 1e6 for size in sizes], medians, color=INK, linewidth=1.4, linestyle=dashes, label="copy")


def _draw_legend(axes: Any, first: tuple[str, ...]) -> None:
    """The legend, with the labels in `first` before the others."""
    handles, labels = axes.get_legend_handles_labels()
    entries = sorted(
        zip(handles, labels, strict=True), key=lambda entry: first.index(entry[1]) if entry[1] in first else len(first)
    )
    axes.legend([handle for handle, _ in entries], [label for _, label in entries], loc="lower right")


def _fresh(rows: Iterable[Row], peer: str) -> list[Row]:
    return [row for row in rows if (row["peer"], row["mode"]) == (peer, "fresh")]


def _scatter(axes: Any, rows: list[Row], label: str, **style: Any) -> None:
    if rows:
        sizes, times = [row["bytes"] / 1e6 for row in rows], [1e3 * row["seconds"] for row in rows]
        axes.scatter(sizes, times, label=label, linewidths=0.8 if "edgecolor" in style else 0, **style)


def _draw_ratios(axes: Any, summaries: list[Summary], titles: dict[str, str]) -> None:
    """Horizontal bars that start at 1 on a log axis, grouped by operation."""
    height = 0.0
    headings, labels = {}, {}  # height -> text
    for op in OPS:
        of_op = {(s.peer, s.mode): s for s in summaries if s.op == op}
        if not of_op:
            continue
        headings[height] = OP_TITLES[op]
        for peer, mode in _bar_order():
            if (peer, mode) in of_op:
                height += 1
                labels[height] = titles.get(peer, peer) + (", warm malloc" if mode == "warm" else "")
                _draw_bar(axes, height, of_op[peer, mode], COLOURS[peer], pale=mode == "warm")
        height += 1.5
    for at, text in headings.items():  # among the labels, left of the axis: inside it would cross the line at 1
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(-0.012, at, text, fontweight="bold", **place)
    axes.axvline(1, color=OURS, linewidth=1.6, zorder=4)
    axes.set(xscale="log", yticks=list(labels), yticklabels=list(labels.values()), ylim=(max(height, 1) - 0.7, -0.7))
    low, high = axes.get_xlim()
    axes.set_xlim(min(0.8, low), max(3.0, high) * 1.9)  # room for the figures beside the bars
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_title("Time over bnfast's, same outputs and round")
    axes.set_xlabel("geometric mean, line from smallest to largest; above 1x, bnfast is faster")


def _bar_order() -> list[tuple[str, str]]:
    """The (peer, mode) of each bar: torch twice, since it gains most from a warm malloc."""
    order = [(peer, "fresh") for peer in COLOURS]
    order.insert(order.index(("torch", "fresh")) + 1, ("torch", "warm"))
    return order


def _draw_bar(axes: Any, height: float, s: Summary, colour: str, pale: bool) -> None:
    axes.barh(height, s.geomean - 1, left=1, height=0.72, color=colour, alpha=0.5 if pale else 0.95, linewidth=0)
    axes.plot([s.smallest, s.largest], [height, height], color=INK, linewidth=1, alpha=0.7, zorder=3)
    axes.annotate(
        f"{s.geomean:.1f}x",
        (max(s.largest, s.geomean, 1), height),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )
