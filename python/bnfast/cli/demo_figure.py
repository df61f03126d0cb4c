"""The picture of `bnfast demo`: loss, test accuracy, moving statistics and step times of the two trainings.

Equal curves coincide, so the first training is drawn as a broad pale line and the second as a thin dark line on top of
it. If they differ, the dark line leaves the pale one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bnfast.benchmark import style
from bnfast.benchmark.style import INK, MUTED
from bnfast.cli.demo_training import RECORDED_LAYER, History

COLOURS = ("#ec9a63", "#0b5c6b")  # the first training, the second
CHANNELS = 5  # of the recorded layer; more are hard to tell apart
CHANNEL_COLOURS = ("#0b5c6b", "#c2571a", "#5b4b9a", "#2f7d32", "#a62b5b")
MOSAIC = [
    ["loss", "loss", "accuracy", "accuracy", "time", "time"],
    ["mean", "mean", "mean", "variance", "variance", "variance"],
]
LINES = ({"linewidth": 5.0, "alpha": 0.45}, {"linewidth": 1.2, "alpha": 1.0})


def save(target: Path | BinaryIO, histories: Mapping[str, History], title: str, subtitle: str) -> None:
    """Draw the histories of two trainings and write the picture to `target` (PNG)."""
    from matplotlib.figure import Figure  # not pyplot: Figure needs no display and has no global state

    with style.settings():
        figure: Any = Figure(figsize=(12, 7.6), dpi=150, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(rect=(0.008, 0.0, 0.984, 0.895), hspace=0.07, wspace=0.04)  # titles above
        figure.text(0.013, 0.955, title, fontsize=15, fontweight="bold")
        figure.text(0.013, 0.917, subtitle, fontsize=10.5, color=MUTED)
        axes = figure.subplot_mosaic(MOSAIC)
        _draw_loss(axes["loss"], histories)
        _draw_accuracy(axes["accuracy"], histories)
        _draw_times(axes["time"], histories)
        channels = _most_changed_channels(next(iter(histories.values())).moving_mean)
        _draw_statistics(axes["mean"], histories, "moving_mean", channels)
        _draw_statistics(axes["variance"], histories, "moving_variance", channels)
        figure.savefig(target, format="png")


def _draw_loss(axes: Any, histories: Mapping[str, History]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for (name, history), colour, line in zip(histories.items(), COLOURS, LINES, strict=True):
        axes.plot(_steps(history.loss), history.loss, color=colour, label=name, **line)
    axes.set(title="Training loss", xlabel="step", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(loc="lower left")


def _draw_accuracy(axes: Any, histories: Mapping[str, History]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (name, history), colour, line in zip(histories.items(), COLOURS, LINES, strict=True):
        percent = [100 * accuracy for accuracy in history.test_accuracy]
        marker_size = 2.2 * line["linewidth"] ** 0.5 + 2
        axes.plot(_steps(percent), percent, color=colour, label=name, marker="o", markersize=marker_size, **line)
    axes.set(title="Test accuracy, %", xlabel="epoch", xlim=(0.5, len(percent) + 0.5), ylim=(0, 103))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_times(axes: Any, histories: Mapping[str, History]) -> None:
    for row, ((name, history), colour) in enumerate(zip(histories.items(), COLOURS, strict=True)):
        times = 1e3 * np.asarray(history.timed_seconds)
        jitter = np.random.default_rng(row).uniform(-0.2, 0.2, times.size)
        axes.scatter(times, row + jitter, s=9, color=colour, alpha=0.45, linewidths=0)
        if times.size:
            median = float(np.median(times))
            axes.plot([median, median], [row - 0.3, row + 0.3], color=INK, linewidth=2, solid_capstyle="butt")
            label = f"{name}: median {median:.1f} ms"
            axes.annotate(label, (0.0, row - 0.38), xycoords=("axes fraction", "data"), color=INK, fontsize=9.5)
    all_times = [1e3 * seconds for history in histories.values() for seconds in history.timed_seconds]
    if all_times:
        axes.set_xlim(0, 1.15 * float(np.percentile(all_times, 95)))  # a few slow steps would squeeze the others
    axes.set(title="Time per step, ms", ylim=(len(histories) - 0.45, -0.6), yticks=[])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _draw_statistics(axes: Any, histories: Mapping[str, History], name: str, channels: list[int]) -> None:
    first, second = histories
    for history, line in zip(histories.values(), LINES, strict=True):
        values = np.stack(getattr(history, name))[:, channels]
        for column, colour in zip(values.T, CHANNEL_COLOURS, strict=False):
            axes.plot(_steps(column), column, color=colour, **line)
    axes.margins(x=0.02)
    low, high = axes.get_ylim()
    heights = _spread_out(values[-1], 0.055 * (high - low))
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
    title = f"{name.replace('_', ' ').capitalize()} of {RECORDED_LAYER}, {len(channels)} channels"
    axes.set(title=title, xlabel=f"step (broad: {first}, thin: {second})")


def _spread_out(heights: Any, gap: float) -> list[float]:
    """Move `heights` apart until neighbours are at least `gap` apart, so that labels at these heights don't overlap."""
    order = np.argsort(heights)
    placed = np.asarray(heights, float)[order]
    for _ in range(100):
        overlap = gap - np.diff(placed)
        if (overlap <= 1e-9 * gap).all():
            break
        push = np.maximum(overlap, 0) / 2
        placed[:-1] -= push
        placed[1:] += push
    result = np.empty_like(placed)
    result[order] = placed
    return [float(height) for height in result]


def _steps(values: Any) -> Any:
    """1, 2, ..., one number per value."""
    return np.arange(1, len(values) + 1)


def _most_changed_channels(values: list[Any]) -> list[int]:
    """The channels whose value changed most during the training, in ascending order."""
    ranges = np.ptp(np.stack(values), axis=0)
    return sorted(int(channel) for channel in np.argsort(ranges)[-CHANNELS:])
