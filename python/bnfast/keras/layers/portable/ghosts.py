"""Ghost batches (Hoffer 2017, arXiv:1705.08741) as a transform: every group of `size` samples is normalized separately.

The ghost index is folded into the channel axis, so that one core step normalizes all ghosts:

    x (B, ..., C, ...) -> (size, ..., G*C, ...), G = B/size, channel c of ghost g at g*C + c

bnfast.tensorflow.training.ghosts says more: this is the same over keras.ops.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from keras import ops

from ...._arguments.features import GROUPINGS
from ...._arguments.features import check_ghosts as check
from .batch import Batch, constant, divide
from .core import CoreStep, Finish, State, update_valid
from .kernels import wide

__all__ = ["GROUPINGS", "Ghosts", "check", "transform"]


class Ghosts(NamedTuple):
    size: int
    grouping: str = "contiguous"

    def count(self, x: Any) -> int:
        """G.

        Raises:
            ValueError: the size doesn't divide the batch.
        """
        batch: int = x.shape[0]
        if batch % self.size:
            raise ValueError(
                f"virtual_batch_size must divide the batch. Received: {self.size}, and inputs of shape {tuple(x.shape)}"
            )
        return batch // self.size

    def merge(self, x: Any, axis: int, count: int) -> Any:
        """(B, ..., C, ...) as (size, ..., G*C, ...); axis > 0."""
        shape = tuple(x.shape)
        pair = (count, self.size) if self.grouping == "contiguous" else (self.size, count)
        x = ops.transpose(ops.reshape(x, (*pair, *shape[1:])), self._order(axis, len(shape)))
        return ops.reshape(x, (self.size, *shape[1:axis], count * shape[axis], *shape[axis + 1 :]))

    def split(self, y: Any, x: Any, axis: int, count: int) -> Any:
        """The inverse of `merge`: y in the shape of x."""
        shape, order = tuple(x.shape), self._order(axis, len(x.shape))
        y = ops.reshape(y, (self.size, *shape[1:axis], count, *shape[axis:]))
        return ops.reshape(ops.transpose(y, [order.index(i) for i in range(len(order))]), shape)

    def _order(self, axis: int, rank: int) -> list[int]:
        """The order of the reshaped axes that puts the ghost axis right before the channel axis."""
        ghost = 0 if self.grouping == "contiguous" else 1
        return [1 - ghost, *range(2, axis + 1), ghost, *range(axis + 1, rank + 1)]


def transform(core: CoreStep, ghosts: Ghosts) -> tuple[CoreStep, Finish]:
    """One batch with G*C channels before the core step; after it, the state moves by the mean over the ghosts.

    As in tf.keras 2, every ghost that holds values counts equally.
    """
    x, gamma, beta, mask, residual = core.batch
    axis = core.options.axis % len(x.shape)
    count, channels = ghosts.count(x), x.shape[axis]
    wide_mask = None if mask is None else ops.broadcast_to(mask, tuple(x.shape))
    merged = Batch(
        ghosts.merge(x, axis, count),
        *(None if vector is None else ops.tile(wide(vector), (count,)) for vector in (gamma, beta)),
        *(None if tensor is None else ghosts.merge(tensor, axis, count) for tensor in (wide_mask, residual)),
    )
    zeros = wide(ops.zeros((count * channels,)))

    def finish(y: Any, state: State) -> tuple[Any, State]:
        weights = wide(ops.ones((count, 1)))
        if merged.mask is not None:
            present = ops.any(merged.mask, [i for i in range(len(x.shape)) if i != axis])
            weights = wide(ops.reshape(present, (count, channels)))
        total = ops.sum(weights, 0)
        statistics = {}
        for name in ("moving_mean", "moving_variance"):
            over_ghosts = ops.sum(weights * ops.reshape(state[name], (count, channels)), 0)
            statistics[name] = constant(divide(over_ghosts, total))
        valid = ops.logical_and(total > 0, math.prod(x.shape) > 0)
        if core.nan_policy == "skip_update":
            for statistic in statistics.values():
                valid = valid & ops.isfinite(statistic)
        return ghosts.split(y, x, axis, count), update_valid(core.state, statistics, core.momentum, valid)

    inner = core._replace(
        batch=merged,
        state={"moving_mean": zeros, "moving_variance": zeros},
        momentum=0.0,
        options=core.options._replace(axis=axis),
        nan_policy="propagate",
        on_reference=mask is not None,
    )
    return inner, finish
