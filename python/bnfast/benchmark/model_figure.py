"""The picture of `bnfast bench --model`: one bar per variant for the training step, the prediction and the peak memory.

A bar is the median. The thin line spans the middle half of the rounds, or all processes. The text beside a bar gives
its value and, in brackets, its ratio to the framework's own batch norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from bnfast.benchmark import style
from bnfast.benchmark.model_report import QUANTITIES
from bnfast.benchmark.models import Spec
from bnfast.benchmark.report import Row, digits
from bnfast.benchmark.style import INK, MUTED, OURS

OWN, LEFT_OUT = "#9a6fb5", "#b9c2c9"
PANEL_TITLES = {"train": "Training step, ms", "predict": "Prediction, ms", "memory": "Peak memory of training, MB"}


def save(target: Path | BinaryIO, rows: list[Row], spec: Spec, machine: str) -> None:
    """Draw `rows` and write the picture to `target` (PNG)."""
    from matplotlib.figure import Figure  # not pyplot: Figure needs no display and has no global state

    framework = spec.framework
    panels = [what for what in QUANTITIES if any(row["what"] == what for row in rows)]
    with style.settings():
        figure: Any = Figure(figsize=(13.5, 4.4), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.83), wspace=0.06)
        figure.text(0.013, 0.925, f"{spec.label}: one model, several batch norms", fontsize=15, fontweight="bold")
        subtitle = "Same weights and data, medians of interleaved rounds; in brackets the ratio to"
        subtitle += f" {framework.title}'s. {machine}."
        figure.text(0.013, 0.86, subtitle, fontsize=10, color=MUTED)
        names = [name for name in framework.variants if any(row["variant"] == name for row in rows)]
        for axes, what in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_bars(axes, names, {row["variant"]: row for row in rows if row["what"] == what})
            axes.set_title(PANEL_TITLES[what])
            axes.set_yticklabels([framework.titles[name] for name in names] if what == panels[0] else [])
        figure.savefig(target, format="png")


def _draw_bars(axes: Any, names: list[str], rows: dict[str, Row]) -> None:
    largest = 0.0
    for height, name in enumerate(names):
        if name not in rows:
            continue
        row = rows[name]
        value, low, high = _bar_values(row)
        right = max(value, high)
        largest = max(largest, right)
        axes.barh(height, value, height=0.7, color=_colour(name), alpha=0.95, linewidth=0)
        axes.plot([low, high], [height, height], color=INK, linewidth=1, alpha=0.7)
        text = digits(value) if row["ratio"] is None else f"{digits(value)} ({row['ratio']:.2f})"
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(text, (right, height), va="center", fontsize=9, color=INK, **offset)
    axes.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6))
    axes.set_xlim(0, 1.32 * largest)  # room for the text
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _colour(name: str) -> str:
    if name.startswith("bnfast"):
        return OURS
    return LEFT_OUT if name.startswith("left-out") else "#d9a400" if name == "tf-fused" else OWN


def _bar_values(row: Row) -> tuple[float, float, float]:
    """The length of the bar and the ends of the thin line, in MB or ms."""
    if row["what"] == "memory":
        return row["bytes"] / 1e6, min(row["processes"]) / 1e6, max(row["processes"]) / 1e6
    low, high = row["quartiles"]
    return 1e3 * row["seconds"], 1e3 * low, 1e3 * high
