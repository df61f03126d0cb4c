"""What was measured of a model's batch norms: the input of the verdicts. Arrays are float64 of shape (C,).

    shift   (moving_mean - mean)/sqrt(variance + epsilon)                     in standard deviations of the data
    ratio   log2((moving_variance + epsilon)/(variance + epsilon))
    gap     sqrt(mean(shift^2 + (ratio*ln(2)/2)^2)) over the channels, each term cut off at 4

gap is how far the layer's normalized output in inference is from what it is with the data's own statistics: 0.1 means a
tenth of a standard deviation. A difference in the variance enters as the logarithm of the standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

MOST_PER_CHANNEL = 4.0  # one channel that is off by more says no more


@dataclass
class LayerFigures:
    """One batch norm.

    Attributes:
        frozen: training leaves its moving statistics as they are.
        always_batch: it normalizes with the batch's statistics in inference, too, and why; "" if it doesn't.
        never_training: what the model passes to it in training is training=False.
        trained: whether gamma or beta have left their starting values; None if the layer has neither.
        start: the starting values of the moving statistics; None if they are random.
        mean, variance: of all data, with batch statistics in the layers before.
        within: the average of the batches' variances. between: the variance of the batches' means.
        count: values per channel in all data. per_batch: in the average batch. samples: samples in the average batch.
        sites: the mean and variance at each call of the layer within one call of the model.
        infinite_batches: batches in which its input was not finite.
        top_row, top_share: the sample with the largest share in the variances, and that share in each channel.
        other: mean and variance of other data (`data2`).
        effect: how far the model's output moves if this layer alone normalizes with its moving statistics.
        step: how far one training step moves its mean, as `shift`; None if it was not tried.
    """

    name: str
    epsilon: float
    momentum: float | None
    moving_mean: Vector
    moving_variance: Vector
    axis: tuple[int, ...] = (-1,)
    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"
    frozen: bool = False
    always_batch: str = ""
    never_training: bool = False
    trained: bool | None = True
    updates_known: bool = True
    start: tuple[Vector, Vector] | None = None
    gamma: Vector | None = None
    mean: Vector | None = None
    variance: Vector | None = None
    within: Vector | None = None
    between: Vector | None = None
    count: float = 0.0
    batches: int = 0
    per_batch: float = 0.0
    samples: float = 0.0
    sites: list[tuple[Vector, Vector]] = field(default_factory=list)
    infinite_batches: int = 0
    infinite_state: tuple[str, ...] = ()
    top_row: Any = None
    top_share: Vector | None = None
    other: tuple[Vector, Vector] | None = None
    effect: float | None = None
    step: float | None = None
    expected_axis: int | None = None
    classes: str = "BatchNormalization"

    @property
    def seen(self) -> bool:
        """Whether there are finite statistics of data for it."""
        return self.mean is not None

    @property
    def usable(self) -> bool:
        """Whether the moving statistics can be compared with the data's."""
        return self.seen and not self.infinite_state

    @property
    def shift(self) -> Vector:
        return self._shift(self.moving_mean)

    @property
    def ratio(self) -> Vector:
        return self._ratio(self.moving_variance)

    @property
    def gap(self) -> float:
        """0 for a layer that always uses the batch's statistics: its moving ones don't count."""
        if not self.usable or self.always_batch:
            return 0.0
        return distance(self.shift, self.ratio)

    def _shift(self, mean: Vector) -> Vector:
        assert self.mean is not None
        assert self.variance is not None
        return (mean - self.mean) / np.sqrt(self.variance + self._epsilon)

    def _ratio(self, variance: Vector) -> Vector:
        assert self.variance is not None
        return np.log2((np.maximum(variance, 0) + self._epsilon) / (self.variance + self._epsilon))

    @property
    def _epsilon(self) -> float:
        return max(self.epsilon, 1e-12)

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """Which channels have one value, up to rounding: their standard deviation is below 1e-6 of their mean."""
        assert self.mean is not None
        assert self.variance is not None
        return self.variance <= 1e-12 * self.mean**2 + 1e-30

    @property
    def start_share(self) -> tuple[float, float]:
        """(share, fit): moving = share*start + (1 - share)*data, by least squares, and how much of the squared distance
        between moving and data that explains. (0, 0) where there is nothing to explain."""
        parts = self._shares()
        share, fit, _ = _fit(*(np.concatenate(pair) for pair in zip(*parts, strict=True))) if parts else (0.0, 0.0, 0.0)
        return share, fit

    @property
    def share_agrees(self) -> bool:
        """Whether means and variances, each by itself, say the same of the share of the starting values: the number of
        updates is one. (Weights that grow make old variances look like a share of the starting ones; the means don't
        agree.) A part whose start is within 0.1 of the data says nothing."""
        shares = [share for share, _, size in (_fit(*pair) for pair in self._shares()) if size > 0.1]
        return bool(shares) and max(shares) - min(shares) <= 0.13

    def _shares(self) -> list[tuple[Vector, Vector]]:
        """(start - data, moving - data) of the means and of the variances, in units in which channels compare."""
        if self.start is None or not self.usable:
            return []
        means = _cut(self._shift(self.start[0]), 50.0), _cut(self.shift, 50.0)
        return [means, (self._deviation(self.start[1]), self._deviation(self.moving_variance))]

    def _deviation(self, variance: Vector) -> Vector:
        """variance as relative deviation from the data's, which is linear in variance. Large ones count less."""
        assert self.variance is not None
        assert self.start is not None
        scale = np.maximum(self.variance, self.start[1]) + self._epsilon
        return (variance - self.variance) / scale

    @property
    def at_start(self) -> bool:
        """Whether the moving statistics are their starting values, to the bit."""
        if self.start is None:
            return False
        return bool(
            np.array_equal(self.moving_mean, self.start[0]) and np.array_equal(self.moving_variance, self.start[1])
        )


@dataclass
class ModelFigures:
    """A model. Distances are root mean squares of differences, in standard deviations of the output.

    Attributes:
        layers: the batch norms in the order of the data flow.
        samples: how many samples the statistics were taken of, 0 if that is unknown. compared: how many the outputs.
        other_samples: how many the other data had.
        distance: between the outputs with moving statistics and with those of the data (a recalibration).
        batch_distance: between the outputs with the batch's statistics and with those of the data.
        scores: loss and metrics by the statistics that normalize: "moving", "batch", "recalibrated". other_scores: of
            the other data, normalized with the statistics of the first.
        iterations, learning_rate: of the optimizer; None if there is none.
        infinite_weights: the names of weights that hold NaN or Inf.
        epsilon_trial: {epsilon: loss}, with moving statistics, where others were tried.
        unreached: batch norms that the model doesn't call.
    """

    name: str
    layers: list[LayerFigures]
    samples: int = 0
    other_samples: int = 0
    compared: int = 0
    batches: int = 0
    distance: float = 0.0
    batch_distance: float = 0.0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    other_scores: dict[str, float] = field(default_factory=dict)
    iterations: int | None = None
    learning_rate: float | None = None
    infinite_weights: tuple[str, ...] = ()
    epsilon_trial: Mapping[float, float] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    passes: float = 0.0


def distance(shift: Vector, ratio: Vector) -> float:
    """The gap, as defined at the top."""
    if not shift.size:
        return 0.0
    square = shift**2 + (ratio * (math.log(2) / 2)) ** 2
    return float(np.sqrt(np.mean(np.minimum(square, MOST_PER_CHANNEL**2))))


def between(first: tuple[Vector, Vector], second: tuple[Vector, Vector], epsilon: float) -> float:
    """The gap between two pairs (mean, variance), in standard deviations of the second."""
    epsilon = max(epsilon, 1e-12)
    shift = (first[0] - second[0]) / np.sqrt(second[1] + epsilon)
    return distance(shift, np.log2((first[1] + epsilon) / (second[1] + epsilon)))


def _fit(a: Vector, b: Vector) -> tuple[float, float, float]:
    """(share, fit, size) of b = share*a: the least squares, how much of b it explains, and the size of a."""
    total, square = float(b @ b), float(a @ a)
    if total < 1e-12 or square < 1e-12:
        return 0.0, 0.0, 0.0
    share = float(a @ b) / square
    rest = b - share * a
    return share, 1.0 - float(rest @ rest) / total, math.sqrt(square / a.size)


def _cut(values: Vector, most: float) -> Vector:
    return np.clip(values, -most, most)
