"""What the steps of the NumPy layer hand to each other: a batch, how the layer treats it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult

__all__ = ["Batch", "Passed", "Policy", "Renorm", "State"]

State = Mapping[str, Array]  # moving_mean, moving_variance and renorm's vectors, which training moves in place


class Batch(NamedTuple):
    """x and what is applied to it. With labels, one a sample, gamma and beta have one row a class: (classes, C)."""

    x: Array
    axis: int | tuple[int, ...]
    axes: Axes
    gamma: Array | None
    beta: Array | None
    mask: Any
    residual: Any
    activation: str | None
    negative_slope: float
    labels: Array | None = None

    @property
    def fused(self) -> dict[str, Any]:
        """The words that forward and backward must have in common, the mask aside."""
        return {
            "axis": self.axis,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "residual": self.residual,
        }


class Renorm(NamedTuple):
    clipping: Any
    momentum: float


class Policy(NamedTuple):
    """How the layer trains. momentum: a number, also where the layer has none and counts batches."""

    momentum: float
    epsilon: float
    correction: int
    nan_policy: str
    virtual_batch_size: int | None
    virtual_batch_grouping: str | None
    renorm: Renorm | None


class Passed(NamedTuple):
    """y; backward: dy -> its gradients, which refers to x, mask and residual (no copies) and takes x=, the batch's x in
    the dtype of dy, where that is another one; whether there was anything that could move statistics."""

    y: Array
    backward: Callable[..., GradResult]
    present: bool
