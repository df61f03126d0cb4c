"""Ghost batches (Hoffer 2017, arXiv:1705.08741) as a transform: every group of `size` samples is normalized separately.

The ghost index is folded into the channel axis, so that one core step normalizes all ghosts:

    x (B, ..., C, ...) -> (size, ..., G*C, ...), G = B/size, channel c of ghost g at g*C + c

"contiguous": ghost g holds samples g*size to (g + 1)*size - 1; "strided": samples g, g + G, g + 2G ..., as in TF 1.
Strided ghosts with axis=1, or of rank 2, need only a reshape. Otherwise x is copied before the step and y after it, and
so are dy and dx. A single ghost needs no copy, and its result has the bits of a step without ghosts.
A mask differs between ghosts, so each merged channel has weights of its own: such a step runs on TensorFlow's ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from ..._arguments.features import GROUPINGS
from ..._arguments.features import check_ghosts as check
from ..batch import Batch
from .core import CoreStep, Finish, State, update_valid

__all__ = ["GROUPINGS", "Ghosts", "check", "transform"]


class Ghosts(NamedTuple):
    size: int
    grouping: str = "contiguous"

    def count(self, x: tf.Tensor) -> Any:
        """G: an int if the extent of the batch is known, else a tensor that checks it when the graph runs.

        Raises:
            ValueError: the size doesn't divide the batch; tf.errors.InvalidArgumentError if only the run can tell.
        """
        batch = x.shape[0]
        if batch is not None:
            if batch % self.size:
                raise ValueError(
                    f"virtual_batch_size must divide the batch. Received: {self.size}, and inputs of shape {x.shape}"
                )
            return batch // self.size
        batch = tf.shape(x)[0]
        message = f"virtual_batch_size must divide the batch. Received: {self.size}, and a batch of another size"
        with tf.control_dependencies([tf.debugging.assert_equal(batch % self.size, 0, message)]):
            return tf.identity(batch // self.size)

    def merge(self, x: tf.Tensor, axis: int, count: Any) -> tf.Tensor:
        """(B, ..., C, ...) as (size, ..., G*C, ...); axis > 0."""
        extents = _extents(x)
        pair = [count, self.size] if self.grouping == "contiguous" else [self.size, count]
        x = _transpose(tf.reshape(x, [*pair, *extents[1:]]), self._order(axis, len(extents)), count)
        return tf.reshape(x, [self.size, *extents[1:axis], count * extents[axis], *extents[axis + 1 :]])

    def split(self, y: tf.Tensor, x: tf.Tensor, axis: int, count: Any) -> tf.Tensor:
        """The inverse of `merge`: y in the shape of x."""
        extents, order = _extents(x), self._order(axis, x.shape.rank)
        y = tf.reshape(y, [self.size, *extents[1:axis], count, *extents[axis:]])
        y = tf.reshape(_transpose(y, [order.index(i) for i in range(len(order))], count), extents)
        y.set_shape(x.shape)
        return y

    def _order(self, axis: int, rank: int) -> list[int]:
        """The order of the reshaped axes that puts the ghost axis right before the channel axis."""
        ghost = 0 if self.grouping == "contiguous" else 1
        return [1 - ghost, *range(2, axis + 1), ghost, *range(axis + 1, rank + 1)]


def transform(core: CoreStep, ghosts: Ghosts) -> tuple[CoreStep, Finish]:
    """One batch with G*C channels before the core step; after it, the state moves by the mean over the ghosts.

    As in tf.keras 2, every ghost that holds values counts equally.
    """
    x, gamma, beta, mask, residual = core.batch
    axis = core.options.axis % x.shape.rank
    count, channels = ghosts.count(x), x.shape[axis]
    wide_mask = None if mask is None else tf.broadcast_to(mask, tf.shape(x))
    merged = Batch(
        ghosts.merge(x, axis, count),
        *(None if vector is None else tf.tile(tf.cast(vector, tf.float64), [count]) for vector in (gamma, beta)),
        *(None if tensor is None else ghosts.merge(tensor, axis, count) for tensor in (wide_mask, residual)),
    )
    zeros = tf.zeros([count * channels], tf.float64)

    def finish(y: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
        weights = tf.ones([count, 1], tf.float64)
        if merged.mask is not None:
            present = tf.reduce_any(merged.mask, [i for i in range(x.shape.rank) if i != axis])
            weights = tf.cast(tf.reshape(present, [count, channels]), tf.float64)
        total = tf.reduce_sum(weights, 0)
        statistics = {}
        for name in ("moving_mean", "moving_variance"):
            over_ghosts = tf.reduce_sum(weights * tf.reshape(state[name], [count, channels]), 0)
            statistics[name] = tf.stop_gradient(tf.math.divide_no_nan(over_ghosts, total))
        valid = (total > 0) & (tf.size(x) > 0)
        if core.nan_policy == "skip_update":
            for statistic in statistics.values():
                valid &= tf.math.is_finite(statistic)
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


def _extents(x: tf.Tensor) -> list[Any]:
    """The shape as ints, with a tensor for each unknown extent."""
    return [tf.shape(x)[i] if extent is None else extent for i, extent in enumerate(x.shape)]


def _transpose(x: tf.Tensor, order: list[int], count: Any) -> tf.Tensor:
    straight = order == sorted(order) or (isinstance(count, int) and count == 1)
    if not straight:
        return tf.transpose(x, order)
    return tf.reshape(x, [_extents(x)[i] for i in order])  # moving an axis of extent 1 moves no data
