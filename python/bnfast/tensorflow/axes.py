"""The channel axes of x, one or several, and one axis in place of several.

axis=[1, 2] normalizes every pair of indices separately; weights then have the rank of x. Adjacent axes merge by a
reshape. Others are moved to the end first: x is copied before the step and y after it, and so are dy and dx. Channels
are numbered in the order of the axes in x, whatever the order in which they were given. One axis needs no merging:
every method is then the identity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf


class Axes(NamedTuple):
    axes: tuple[int, ...]  # ascending, >= 0
    rank: int

    @staticmethod
    def of(axes: list[int], shape: Any, *, known: bool = True) -> Axes:
        """Raises ValueError if they don't fit the shape of inputs or, with `known`, if an extent along them is None."""
        rank = len(shape)
        for axis in axes:
            if not -rank <= axis < rank:
                raise ValueError(f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}. Received: {axis}")
            if known and shape[axis] is None:
                raise ValueError(f"axis {axis} of inputs must have a known extent. Received: {tuple(shape)}")
        ascending = tuple(sorted({axis % rank for axis in axes}))
        if len(ascending) < len(axes):
            raise ValueError(f"axis must name each axis once. Received: {axes} for inputs of rank {rank}")
        return Axes(ascending, rank)

    @property
    def place(self) -> int:
        """The one axis, after `merge`."""
        return self.axes[0] if self._adjacent else self.rank - len(self.axes)

    def weight_shape(self, shape: Any) -> tuple[int, ...]:
        """The shape of weights for several axes, as in tf.keras 2: the rank of x, with extent 1 off the axes."""
        return tuple(shape[i] if i in self.axes else 1 for i in range(self.rank))

    def merge(self, x: tf.Tensor) -> tf.Tensor:
        """x, or a tensor of its rank, with its axes as one at `place`."""
        if len(self.axes) == 1:
            return x
        x = x if self._adjacent else tf.transpose(x, self._order)
        extents = [tf.shape(x)[i] if extent is None else extent for i, extent in enumerate(x.shape)]
        end = self.place + len(self.axes)
        return tf.reshape(x, [*extents[: self.place], math.prod(x.shape[self.place : end]), *extents[end:]])

    def split(self, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """The inverse of `merge`: y in the shape of x."""
        if len(self.axes) == 1:
            return y
        if self._adjacent:
            y = tf.reshape(y, tf.shape(x))
        else:
            y = tf.transpose(tf.reshape(y, tf.gather(tf.shape(x), self._order)), tf.argsort(self._order))
        y.set_shape(x.shape)
        return y

    def mask(self, mask: Any, x: tf.Tensor, attached: bool) -> tf.Tensor:
        """A mask as booleans of the rank of x, before `merge`.

        Its shape is that of x without the axes, or x.shape[:-1] if Keras attached it to x, or extents of 1 in either.
        A mask along one axis that fits only one of the two readings is read that way.
        """
        mask = tf.cast(mask, tf.bool)
        along = mask.shape.rank == self.rank - len(self.axes)
        if len(self.axes) == 1:
            if not along:
                raise ValueError(
                    f"mask must have one dimension less than inputs. Received: mask.shape={mask.shape}, "
                    f"inputs.shape={x.shape}"
                )
            last: tuple[int, ...] = (self.rank - 1,)
            readings = [last, self.axes] if attached else [self.axes, last]
        else:
            readings = [self.axes] if along and not attached else [(mask.shape.rank,)]
        fitting = (wide for wide in (_expand(mask, axes) for axes in readings) if _fits(wide, x))
        wide = next(fitting, None)
        if wide is None:
            without = f"axis {self.axes[0]}" if len(self.axes) == 1 else f"axes {list(self.axes)}"
            raise ValueError(
                f"mask must have the shape of inputs without {without}, or extents of 1 in it. "
                f"Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
            )
        constant = len(self.axes) == 1 or all(wide.shape[axis] == 1 for axis in self.axes)
        return wide if constant else tf.broadcast_to(wide, tf.shape(x))

    @property
    def _adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def _order(self) -> list[int]:
        return [*(i for i in range(self.rank) if i not in self.axes), *self.axes]


def _expand(mask: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """The mask with an extent of 1 on each of these axes of the result."""
    for axis in axes:
        mask = tf.expand_dims(mask, axis)
    return mask


def _fits(mask: tf.Tensor, x: tf.Tensor) -> bool:
    """Whether the mask has the rank of x and broadcasts to it, as far as extents are known."""
    if mask.shape.rank != x.shape.rank:
        return False
    return all(m in (1, None) or n in (m, None) for m, n in zip(mask.shape, x.shape, strict=True))
