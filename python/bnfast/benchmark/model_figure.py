"""The picture of `bnfast bench --model`: a bar a variant for the training step, the prediction and the peak memory.

Bars are medians; thin lines the middle half of the rounds, or all processes. Behind a bar: its value and, in brackets,
its ratio to Keras's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bnfast.benchmark.figure import OURS
from bnfast.benchmark.model_report import WHAT
from bnfast.benchmark.models import TITLES
from bnfast.benchmark.report import Row, digits
from bnfast.cli.figure import INK, MUTED, SETTINGS

COLOURS = {"keras": "#9a6fb5", "tf-fused": "#d9a400", "left-out": "#b9c2c9"}
PANELS = {"train": "Training step, ms", "predict": "Prediction, ms", "memory": "Peak memory of training, MB"}


def save(path: Path, rows: list[Row], label: str, machine: str) -> None:
    """Draw `rows` and write the picture to `path` (PNG)."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: drawn by Agg whatever the screen, no global state

    panels = [what for what in WHAT if any(row["what"] == what for row in rows)]
    with matplotlib.rc_context(SETTINGS):
        figure: Any = Figure(figsize=(13.5, 4.4), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.83), wspace=0.06)
        figure.text(0.013, 0.925, f"{label}: one model, several batch norms", fontsize=15, fontweight="bold")
        subtitle = f"Same weights and data, medians of interleaved rounds; in brackets the ratio to Keras's. {machine}."
        figure.text(0.013, 0.86, subtitle, fontsize=10, color=MUTED)
        names = [name for name in TITLES if any(row["variant"] == name for row in rows)]
        for axes, what in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _bars(axes, names, {row["variant"]: row for row in rows if row["what"] == what}, what)
            if what != panels[0]:
                axes.set_yticklabels([])
        figure.savefig(path)


def _bars(axes: Any, names: list[str], rows: dict[str, Row], what: str) -> None:
    most = 0.0
    for place, name in enumerate(names):
        if (row := rows.get(name)) is None:
            continue
        scale = 1e-6 if what == "memory" else 1e3
        value = scale * row["bytes" if what == "memory" else "seconds"]
        spread = (min(row["processes"]), max(row["processes"])) if what == "memory" else row["quartiles"]
        axes.barh(place, value, height=0.7, color=COLOURS.get(name, OURS), alpha=0.95, linewidth=0)
        axes.plot([scale * end for end in spread], [place, place], color=INK, linewidth=1, alpha=0.7)
        ratio = "" if row["ratio"] is None else f" ({row['ratio']:.2f})"
        right = max(value, scale * spread[1])
        most = max(most, right)
        offset = {"xytext": (5, 0), "textcoords": "offset points"}
        axes.annotate(f"{digits(value)}{ratio}", (right, place), va="center", fontsize=9, color=INK, **offset)
    axes.set(yticks=range(len(names)), yticklabels=[TITLES[name] for name in names], ylim=(len(names) - 0.4, -0.6))
    axes.set_xlim(0, 1.32 * most)  # room for the figures
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_title(PANELS[what])
