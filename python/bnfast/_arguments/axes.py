"""The channel axes of x, one or several, and what _core is given in place of several: one axis.

axis=(1, 2) normalizes every pair of indices on its own. Axes side by side merge by a reshape, without a copy where x is
C-contiguous. Others are brought to the end first: x is copied once on its way in and y on its way out, and so are
residual, dy and dx. Channels are numbered in the order of the axes in x, however they were given; vectors have the
extents of the axes as their shape, (3, 4) for two axes, as (C,) for one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .arrays import Array, contiguous
from .checks import integer

__all__ = ["Axes"]


class Axes(NamedTuple):
    axes: tuple[int, ...]  # ascending, >= 0
    x_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of the vectors

    @staticmethod
    def of(axis: Any, x: Array) -> Axes:
        """Raises ValueError or TypeError where `axis` names no axes of x."""
        if isinstance(axis, tuple | list) and not axis:
            raise ValueError(f"axis must name an axis. Received: {axis!r}")
        given = [integer("axis", one) for one in (axis if isinstance(axis, tuple | list) else (axis,))]
        for one in given:
            if not -x.ndim <= one < x.ndim:
                raise ValueError(f"axis must be in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}. Received: {one}")
        axes = tuple(sorted({one % x.ndim for one in given}))
        if len(axes) < len(given):
            raise ValueError(f"axis must name each axis once. Received: {axis!r} for x of shape {x.shape}")
        return Axes(axes, x.shape, tuple([x.shape[i] for i in axes]))

    def __str__(self) -> str:
        """As an error says it: the last axis alone is -1, its default."""
        if len(self.axes) > 1:
            return f"axes {self.axes}"
        return f"axis {self.axes[0] if self.axes[0] < len(self.x_shape) - 1 else -1}"

    @property
    def off(self) -> tuple[int, ...]:
        """The extents of the other axes: the shape of a mask."""
        return tuple([extent for i, extent in enumerate(self.x_shape) if i not in self.axes])

    @property
    def kept(self) -> tuple[int, ...]:
        """That shape with extents of 1 on the axes."""
        return tuple(1 if i in self.axes else extent for i, extent in enumerate(self.x_shape))

    @property
    def place(self) -> int:
        """The one axis after `merge`."""
        return self.axes[0] if self._adjacent else len(self.x_shape) - len(self.axes)

    def merge(self, array: Array | None) -> Array | None:
        """x or its like, C-contiguous, with the axes as one."""
        if array is None or len(self.axes) == 1:
            return contiguous(array)
        array = contiguous(array if self._adjacent else array.transpose(self._order))
        assert array is not None
        end = self.place + len(self.axes)
        return array.reshape(*array.shape[: self.place], math.prod(self.shape), *array.shape[end:])

    def merge_out(self, out: Array | None) -> Array | None:
        """Where _core writes: `out` merged, or None where that is a copy, which `restore` brings to `out`."""
        return self.merge(out) if self._adjacent else None

    def flat(self, vector: Array | None, dtype: Any = None) -> Array | None:
        """A vector as C-contiguous (C,); one that is written in place is C-contiguous already and stays where it is."""
        vector = contiguous(vector, dtype)
        return vector if vector is None or len(self.axes) == 1 else vector.reshape(-1)

    def restore(self, result: tuple[Any, ...], *outs: Array | None) -> tuple[Any, ...]:
        """What _core returned in the shapes of x and of the vectors; the first of them in `outs`, where given."""
        if len(self.axes) == 1:
            return result
        items = [self._split(item) if hasattr(item, "reshape") else item for item in result]
        for i, out in enumerate(outs):
            if out is not None:
                if not self._adjacent:
                    out[...] = items[i]
                items[i] = out
        return tuple(items)

    def _split(self, array: Array) -> Array:
        """A (C,) vector, or an array that is merged like x: where that is of rank 1 too, x has the vectors' shape."""
        if array.ndim == 1:
            return array.reshape(self.shape)
        if self._adjacent:
            return array.reshape(self.x_shape)
        order = self._order
        wide = array.reshape([self.x_shape[i] for i in order])
        back = contiguous(wide.transpose([order.index(i) for i in range(len(order))]))
        assert back is not None
        return back

    @property
    def _adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def _order(self) -> list[int]:
        return [*(i for i in range(len(self.x_shape)) if i not in self.axes), *self.axes]
