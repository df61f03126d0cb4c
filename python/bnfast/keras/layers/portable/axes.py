"""The channel axes of x, one or several, and one axis in place of several: bnfast.tensorflow.axes over keras.ops.

axis=[1, 2] normalizes every pair of indices separately; weights then have the rank of x. Adjacent axes merge by a
reshape. Others are moved to the end first: x is copied before the step and y after it, and so are dy and dx. Channels
are numbered in the order of the axes in x, whatever the order in which they were given. One axis needs no merging:
every method is then the identity.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from keras import ops


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

    def merge(self, x: Any) -> Any:
        """x, or a tensor of its rank, with its axes as one at `place`."""
        if len(self.axes) == 1:
            return x
        x = x if self._adjacent else ops.transpose(x, self._order)
        shape, end = x.shape, self.place + len(self.axes)
        return ops.reshape(x, (*shape[: self.place], math.prod(shape[self.place : end]), *shape[end:]))

    def split(self, y: Any, x: Any) -> Any:
        """The inverse of `merge`: y in the shape of x."""
        if len(self.axes) == 1:
            return y
        if self._adjacent:
            return ops.reshape(y, tuple(x.shape))
        y = ops.reshape(y, tuple(x.shape[i] for i in self._order))
        return ops.transpose(y, [self._order.index(i) for i in range(self.rank)])

    def mask(self, mask: Any, x: Any, attached: bool) -> Any:
        """A mask as booleans of the rank of x, before `merge`.

        Its shape is that of x without the axes, or x.shape[:-1] if Keras attached it to x, or extents of 1 in either.
        A mask along one axis that fits only one of the two readings is read that way.
        """
        mask = ops.cast(ops.convert_to_tensor(mask), "bool")
        rank = len(mask.shape)
        along = rank == self.rank - len(self.axes)
        if len(self.axes) == 1:
            if not along:
                raise ValueError(
                    f"mask must have one dimension less than inputs. Received: mask.shape={tuple(mask.shape)}, "
                    f"inputs.shape={tuple(x.shape)}"
                )
            last: tuple[int, ...] = (self.rank - 1,)
            readings = [last, self.axes] if attached else [self.axes, last]
        else:
            readings = [self.axes] if along and not attached else [(rank,)]
        fitting = (wide for wide in (_expand(mask, axes) for axes in readings) if _fits(wide, x))
        wide = next(fitting, None)
        if wide is None:
            without = f"axis {self.axes[0]}" if len(self.axes) == 1 else f"axes {list(self.axes)}"
            raise ValueError(
                f"mask must have the shape of inputs without {without}, or extents of 1 in it. "
                f"Received: mask.shape={tuple(mask.shape)}, inputs.shape={tuple(x.shape)}"
            )
        constant = len(self.axes) == 1 or all(wide.shape[axis] == 1 for axis in self.axes)
        return wide if constant else ops.broadcast_to(wide, tuple(x.shape))

    @property
    def _adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def _order(self) -> list[int]:
        return [*(i for i in range(self.rank) if i not in self.axes), *self.axes]


def _expand(mask: Any, axes: tuple[int, ...]) -> Any:
    """The mask with an extent of 1 on each of these axes of the result."""
    for axis in axes:
        mask = ops.expand_dims(mask, axis)
    return mask


def _fits(mask: Any, x: Any) -> bool:
    """Whether the mask has the rank of x and broadcasts to it."""
    if len(mask.shape) != len(x.shape):
        return False
    return all(m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True))
