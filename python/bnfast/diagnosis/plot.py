"""The picture of a diagnosis: moving statistics against those of the data, and the gap of each batch norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import LayerFigures, ModelFigures
from .verdicts.case import GAP

MOST = 12  # layers with a panel of their own: those with the largest gaps


def draw(figures: ModelFigures, title: str, first_gap: str | None, path: Any, format: str | None = None) -> None:
    """Writes the picture to a path or an open file."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "bnfast[demo]"') from error
    rows = figures.layers
    shown = sorted(sorted((i for i, row in enumerate(rows) if row.usable), key=lambda i: -rows[i].gap)[:MOST])
    lines = 1 + -(-len(shown) // 4)
    figure = Figure(figsize=(13, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines, 4)
    _gaps(figure.add_subplot(grid[0, :]), rows, first_gap)
    for place, i in enumerate(shown):
        _panel(figure.add_subplot(grid[1 + place // 4, place % 4]), rows[i])
    figure.suptitle(title)
    figure.savefig(path, dpi=110, format=format)


def _gaps(axes: Any, rows: list[LayerFigures], first_gap: str | None) -> None:
    place = np.arange(len(rows))
    axes.bar(
        place, [row.gap for row in rows], color=["#c33" if row.gap >= GAP else "#69b" for row in rows], label="gap"
    )
    effects = [(i, min(row.effect, 10)) for i, row in enumerate(rows) if row.effect is not None]
    if effects:
        axes.plot(*zip(*effects, strict=True), "k.", label="effect on the outputs, alone (std)")
    axes.axhline(GAP, color="#c33", lw=0.8, ls=":")
    axes.set_xticks(place, [row.name for row in rows], rotation=90 if len(rows) > 12 else 0, fontsize=7)
    axes.set_ylabel("moving against data (std)")
    if first_gap is not None:
        at = next(i for i, row in enumerate(rows) if row.name == first_gap)
        axes.annotate("opens here", (at, rows[at].gap), (0, 8), textcoords="offset points", ha="center")
    axes.legend(loc="upper right", fontsize=8)


def _panel(axes: Any, row: LayerFigures) -> None:
    """One point per channel: the data's on x, the moving one on y; on the diagonal where they agree."""
    assert row.mean is not None
    assert row.variance is not None
    spread = np.sqrt(row.variance + max(row.epsilon, 1e-12))
    axes.plot(np.log2(row.variance + row.epsilon), np.log2(np.maximum(row.moving_variance, 0) + row.epsilon), ".", ms=4,
              label="log2 variance")  # fmt: skip
    axes.plot(row.mean / spread, row.moving_mean / spread, ".", ms=4, label="mean (std)")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="0.7", lw=0.8, zorder=0)
    axes.set_title(f"{row.name}: gap {row.gap:.2f}", fontsize=9)
    axes.set_xlabel("data", fontsize=8)
    axes.set_ylabel("moving", fontsize=8)
    axes.legend(fontsize=7)
