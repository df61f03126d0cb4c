"""What the steps of a NumPy layer pass to each other: the batch, how the layer treats it, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._arguments.arrays import Array
from .._arguments.axes import Axes
from ..functional.batch_norm import GradResult

__all__ = ["Batch", "ForwardPass", "Policy", "Renorm", "State"]

State = Mapping[str, Array]  # moving_mean, moving_variance and renorm's vectors; training updates them in place


class Batch(NamedTuple):
    """x and what is applied to it. With labels, one per sample, gamma and beta have one row per class: (classes, C)."""

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
        """The keyword arguments, other than mask, that forward and backward must share."""
        return {
            "axis": self.axis,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "residual": self.residual,
        }

    @property
    def without_affine(self) -> Batch:
        """The same batch without gamma, beta, residual and activation: its y is xhat."""
        return self._replace(gamma=None, beta=None, residual=None, activation=None)


class Renorm(NamedTuple):
    """Options of batch renormalization."""

    clipping: Any
    momentum: float


class Policy(NamedTuple):
    """How the layer trains. momentum is a number even if the layer averages all batches (momentum=None)."""

    momentum: float
    epsilon: float
    correction: int
    nan_policy: str
    virtual_batch_size: int | None
    virtual_batch_grouping: str | None
    renorm: Renorm | None


class ForwardPass(NamedTuple):
    """The result of one call.

    backward: dy -> GradResult. It holds references to x, mask and residual, not copies. Its keyword x replaces the
    batch's x, for a dy of another dtype.
    has_values: whether the batch had any value that could change the moving statistics.
    """

    y: Array
    backward: Callable[..., GradResult]
    has_values: bool
