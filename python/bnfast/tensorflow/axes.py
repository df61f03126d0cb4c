"""Several channel axes as one: axis=[1, 2] normalizes every pair of indices on its own, with weights of x's rank.

Axes side by side merge by a reshape. Others are brought together at the end: x is copied once on its way in and y on
its way out, and so are dy and dx. Channels are numbered in the order of the axes in x, however they were given.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf


class Axes(NamedTuple):
    axes: tuple[int, ...]  # ascending, >= 0
    rank: int

    @staticmethod
    def of(axes: list[int], shape: Any) -> Axes:
        """Raises ValueError where they don't fit the shape of inputs."""
        rank = len(shape)
        for axis in axes:
            if not -rank <= axis < rank:
                raise ValueError(f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}. Received: {axis}")
            if shape[axis] is None:
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
        """tf.keras 2's: of x's rank, with extents of 1 off the axes."""
        return tuple(shape[i] if i in self.axes else 1 for i in range(self.rank))

    def merge(self, x: tf.Tensor) -> tf.Tensor:
        """x, or a mask of its rank, with its axes as one at `place`."""
        x = x if self._adjacent else tf.transpose(x, self._order)
        extents = [tf.shape(x)[i] if extent is None else extent for i, extent in enumerate(x.shape)]
        end = self.place + len(self.axes)
        return tf.reshape(x, [*extents[: self.place], math.prod(x.shape[self.place : end]), *extents[end:]])

    def split(self, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        """What `merge` made of x's like, in x's shape."""
        if self._adjacent:
            y = tf.reshape(y, tf.shape(x))
        else:
            y = tf.transpose(tf.reshape(y, tf.gather(tf.shape(x), self._order)), tf.argsort(self._order))
        y.set_shape(x.shape)
        return y

    def mask(self, mask: Any, x: tf.Tensor, attached: bool) -> tf.Tensor:
        """A mask as booleans of x's rank: x.shape without the axes, or (attached by Keras) x.shape[:-1]."""
        mask = wide = tf.cast(mask, tf.bool)
        if mask.shape.rank == self.rank - len(self.axes) and not attached:
            for axis in self.axes:
                wide = tf.expand_dims(wide, axis)
        else:
            wide = tf.expand_dims(mask, -1)
        fits = wide.shape.rank == self.rank
        if not (fits and all(m in (1, None) or n in (m, None) for m, n in zip(wide.shape, x.shape, strict=True))):
            raise ValueError(
                f"mask must have the shape of inputs without axes {list(self.axes)}, or extents of 1 in it. "
                f"Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
            )
        plain = all(wide.shape[axis] == 1 for axis in self.axes)
        return wide if plain else tf.broadcast_to(wide, tf.shape(x))

    @property
    def _adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def _order(self) -> list[int]:
        return [*(i for i in range(self.rank) if i not in self.axes), *self.axes]


def mask_along(mask: Any, x: tf.Tensor, places: tuple[int, int]) -> tf.Tensor:
    """The mask as booleans of x's rank, its missing axis at the first of `places` where its extents fit."""
    mask = tf.cast(mask, tf.bool)
    if mask.shape.rank != x.shape.rank - 1:
        raise ValueError(
            f"mask must have one dimension less than inputs. Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
        )
    for place in places:
        weights = tf.expand_dims(mask, place)
        if all(m in (1, None) or n in (m, None) for m, n in zip(weights.shape, x.shape, strict=True)):
            return weights
    raise ValueError(
        f"mask must have the shape of inputs without axis {places[0]}, or extents of 1 in it. "
        f"Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
    )
