"""Ghost batches (Hoffer 2017, arXiv:1705.08741): every group of `size` samples is normalized on its own.

The ghost's index becomes part of the channel axis, so that one call of the kernels serves all ghosts:

    x (B, ..., C, ...) -> (size, ..., G*C, ...), G = B/size, channel c of ghost g at g*C + c

"contiguous": ghost g holds samples g*size to (g + 1)*size - 1; "strided": samples g, g + G, g + 2G ..., as TF 1 has it.
Strided ghosts with axis=1, or of rank 2, are a reshape. Else x is copied once on its way in and y on its way out, and
so are dy and dx; one ghost needs no copy, and gives the bits of no ghosts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from ..._arguments import checks as _checks

GROUPINGS = ("contiguous", "strided")


def check(size: Any, renorm: bool) -> None:
    """The errors of the arguments."""
    if _checks.integer("virtual_batch_size", size) < 1:
        raise ValueError(f"virtual_batch_size must be at least 1. Received: {size}")
    if renorm:
        raise ValueError(f"virtual_batch_size must be None where renorm=True. Received: {size}")


class Ghosts(NamedTuple):
    size: int
    grouping: str = "contiguous"

    def count(self, x: tf.Tensor) -> Any:
        """G: an int where the batch's extent is known, else a tensor that checks it when it runs.

        Raises ValueError where the size doesn't divide the batch; in a graph tf.errors.InvalidArgumentError.
        """
        batch = x.shape[0]
        if batch is not None:
            if batch % self.size:
                raise ValueError(
                    f"virtual_batch_size must divide the batch. Received: {self.size}, and inputs of shape {x.shape}"
                )
            return batch // self.size
        batch = tf.shape(x)[0]
        message = f"virtual_batch_size must divide the batch. Received: {self.size}, and a batch as x says here"
        with tf.control_dependencies([tf.debugging.assert_equal(batch % self.size, 0, message)]):
            return tf.identity(batch // self.size)

    def merge(self, x: tf.Tensor, axis: int, count: Any) -> tf.Tensor:
        """(B, ..., C, ...) as (size, ..., G*C, ...); axis > 0."""
        extents = _extents(x)
        pair = [count, self.size] if self.grouping == "contiguous" else [self.size, count]
        x = _transpose(tf.reshape(x, [*pair, *extents[1:]]), self._order(axis, len(extents)), count)
        return tf.reshape(x, [self.size, *extents[1:axis], count * extents[axis], *extents[axis + 1 :]])

    def split(self, y: tf.Tensor, x: tf.Tensor, axis: int, count: Any) -> tf.Tensor:
        """What merge made of x's like, back in x's shape."""
        extents, order = _extents(x), self._order(axis, x.shape.rank)
        y = tf.reshape(y, [self.size, *extents[1:axis], count, *extents[axis:]])
        y = tf.reshape(_transpose(y, [order.index(i) for i in range(len(order))], count), extents)
        y.set_shape(x.shape)
        return y

    def _order(self, axis: int, rank: int) -> list[int]:
        """The axes of the reshaped x in the order that has the ghost's right before the channels'."""
        ghost = 0 if self.grouping == "contiguous" else 1
        return [1 - ghost, *range(2, axis + 1), ghost, *range(axis + 1, rank + 1)]


def _extents(x: tf.Tensor) -> list[Any]:
    """The shape as ints, and tensors where an extent isn't known."""
    return [tf.shape(x)[i] if extent is None else extent for i, extent in enumerate(x.shape)]


def _transpose(x: tf.Tensor, order: list[int], count: Any) -> tf.Tensor:
    straight = order == sorted(order) or (isinstance(count, int) and count == 1)
    if not straight:
        return tf.transpose(x, order)
    return tf.reshape(x, [_extents(x)[i] for i in order])  # moving an extent of 1 moves nothing
