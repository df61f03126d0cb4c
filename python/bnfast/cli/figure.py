"""The picture `bnfast demo` leaves: loss, test accuracy, moving statistics and step times of the trainings.

Where two batch norms agree their curves coincide, so the first training is drawn as a broad pale line and the second as
a thin dark one on top: a difference shows as the dark line leaving its bed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnfast.cli.training import WATCHED, History

INK = "#1f2933"
MUTED = "#66727f"
COLOURS = ("#ec9a63", "#0b5c6b")  # the first training, the second
CHANNELS = 5  # of the watched layer's: more are hard to tell apart
CHANNEL_COLOURS = ("#0b5c6b", "#c2571a", "#5b4b9a", "#2f7d32", "#a62b5b")
LINES = ({"linewidth": 5.0, "alpha": 0.45}, {"linewidth": 1.2, "alpha": 1.0})
SETTINGS: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c8ced4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#e9edf0",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def save(path: Path, histories: Mapping[str, History], title: str, subtitle: str) -> None:
    """Draw the histories of two trainings and write the picture to `path` (PNG)."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg whatever the screen, no global state

    with matplotlib.rc_context(SETTINGS):
        figure: Any = Figure(figsize=(12, 7.6), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.895), hspace=0.07, wspace=0.04)  # titles go above
        figure.text(0.013, 0.955, title, fontsize=15, fontweight="bold")
        figure.text(0.013, 0.917, subtitle, fontsize=10.5, color=MUTED)
        axes = figure.subplot_mosaic([["loss"] * 2 + ["accuracy"] * 2 + ["time"] * 2, ["mean"] * 3 + ["variance"] * 3])
        _loss(axes["loss"], histories)
        _accuracy(axes["accuracy"], histories)
        _times(axes["time"], histories)
        channels = _liveliest(next(iter(histories.values())).moving_mean)
        _statistics(axes["mean"], histories, "moving_mean", channels)
        _statistics(axes["variance"], histories, "moving_variance", channels)
        figure.savefig(path)


def _loss(axes: Any, histories: Mapping[str, History]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for (name, history), colour, line in zip(histories.items(), COLOURS, LINES, strict=True):
        axes.plot(_steps(history.loss), history.loss, color=colour, label=name, **line)
    axes.set(title="Training loss", xlabel="step", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="lower left")


def _accuracy(axes: Any, histories: Mapping[str, History]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, history), colour, line in zip(histories.items(), COLOURS, LINES, strict=True):
        percent = [100 * accuracy for accuracy in history.test_accuracy]
        marker_size = 2.2 * line["linewidth"] ** 0.5 + 2
        axes.plot(_steps(percent), percent, color=colour, label=name, marker="o", markersize=marker_size, **line)
    axes.set(title="Test accuracy, %", xlabel="epoch", xlim=(0.5, len(percent) + 0.5), ylim=(0, 103))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _times(axes: Any, histories: Mapping[str, History]) -> None:
    for row, ((name, history), colour) in enumerate(zip(histories.items(), COLOURS, strict=True)):
        times = 1e3 * np.asarray(history.timed_seconds)
        jitter = np.random.default_rng(row).uniform(-0.2, 0.2, times.size)
        axes.scatter(times, row + jitter, s=9, color=colour, alpha=0.45, linewidths=0)
        if times.size:
            axes.plot([np.median(times)] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=2, solid_capstyle="butt")
            label = f"{name}: median {np.median(times):.1f} ms"
            axes.annotate(label, (0.0, row - 0.38), xycoords=("axes fraction", "data"), color=INK, fontsize=9.5)
    every = [1e3 * second for history in histories.values() for second in history.timed_seconds]
    if every:
        axes.set_xlim(0, 1.15 * float(np.percentile(every, 95)))  # a few stray steps would squeeze the rest
    axes.set(title="Time of a step, ms", ylim=(len(histories) - 0.45, -0.6), yticks=[])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _statistics(axes: Any, histories: Mapping[str, History], name: str, channels: list[int]) -> None:
    first, second = histories
    for history, line in zip(histories.values(), LINES, strict=True):
        values = np.stack(getattr(history, name))[:, channels]
        for column, colour in zip(values.T, CHANNEL_COLOURS, strict=False):
            axes.plot(_steps(column), column, color=colour, **line)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    heights = _spread(values[-1], 0.055 * (high - low))
    for channel, height, colour in zip(channels, heights, CHANNEL_COLOURS, strict=False):
        axes.annotate(
            str(channel),
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
        )
    title = f"{name.replace('_', ' ').capitalize()} of {WATCHED}, {len(channels)} channels"
    axes.set(title=title, xlabel=f"step (broad: {first}, thin: {second})")


def _spread(heights: Any, gap: float) -> list[float]:
    """`heights` moved apart until any two are at least `gap` from each other, so that labels there can be read."""
    order = np.argsort(heights)
    placed = np.asarray(heights, float)[order]
    for _ in range(100):
        short = gap - np.diff(placed)
        if (short <= 1e-9 * gap).all():
            break
        push = np.maximum(short, 0) / 2
        placed[:-1] -= push
        placed[1:] += push
    result = np.empty_like(placed)
    result[order] = placed
    return [float(height) for height in result]


def _steps(values: Any) -> Any:
    return np.arange(1, len(values) + 1)


def _liveliest(values: list[Any]) -> list[int]:
    """The channels whose value moved farthest over the training, in ascending order."""
    travelled = np.ptp(np.stack(values), axis=0)
    return sorted(int(channel) for channel in np.argsort(travelled)[-CHANNELS:])
