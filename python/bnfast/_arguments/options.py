"""What a batch norm of a framework's tensors computes, its tensors aside."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Options"]


class Options(NamedTuple):
    """Names and meaning are those of bnfast.batch_norm_train.

    epsilon is a float or a scalar tensor. With a tensor an Options isn't hashable.
    """

    axis: int = -1
    epsilon: Any = 1e-3
    activation: str | None = None
    negative_slope: float = 0.2
