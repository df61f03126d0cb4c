"""The channel axes of x, one or several, and how several are merged into the one axis that _core takes.

axis=(1, 2) treats every pair of indices on axes 1 and 2 as one channel. Adjacent axes merge by a reshape, without a
copy if x is C-contiguous. Other axes are transposed to the end first: one copy of x on the way in and of y on the way
out, and the same for residual, dy and dx. Channels are numbered in the order of the axes in x, whatever order the
caller gave. Vectors have the extents of the axes as their shape: (C,) for one axis, (3, 4) for two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .arrays import Array, contiguous
from .checks import integer

__all__ = ["Axes"]


class Axes(NamedTuple):
    """The channel axes of one x."""

    axes: tuple[int, ...]  # ascending, >= 0
    x_shape: tuple[int, ...]
    shape: tuple[int, ...]  # of the vectors

    @staticmethod
    def of(axis: Any, x: Array) -> Axes:
        """Raises ValueError or TypeError if `axis` is not one or more axes of x."""
        if isinstance(axis, tuple | list) and not axis:
            raise ValueError(f"axis must name at least one axis. Received: {axis!r}")
        given = [integer("axis", one) for one in (axis if isinstance(axis, tuple | list) else (axis,))]
        for one in given:
            if not -x.ndim <= one < x.ndim:
                raise ValueError(f"axis must be in [{-x.ndim}, {x.ndim}) for x of shape {x.shape}. Received: {one}")
        axes = tuple(sorted({one % x.ndim for one in given}))
        if len(axes) < len(given):
            raise ValueError(f"axis must name each axis once. Received: {axis!r} for x of shape {x.shape}")
        return Axes(axes, x.shape, tuple([x.shape[i] for i in axes]))

    def __str__(self) -> str:
        """For error messages. The last axis alone is called -1, its default."""
        if len(self.axes) > 1:
            return f"axes {self.axes}"
        return f"axis {self.axes[0] if self.axes[0] < len(self.x_shape) - 1 else -1}"

    @property
    def other_shape(self) -> tuple[int, ...]:
        """The extents of the axes that are not channel axes: the shape of a mask."""
        return tuple([extent for i, extent in enumerate(self.x_shape) if i not in self.axes])

    @property
    def keepdims_shape(self) -> tuple[int, ...]:
        """The shape of x with extent 1 on the channel axes."""
        return tuple(1 if i in self.axes else extent for i, extent in enumerate(self.x_shape))

    @property
    def merged_axis(self) -> int:
        """The index of the channel axis after `merge`."""
        return self.axes[0] if self.adjacent else len(self.x_shape) - len(self.axes)

    def merge(self, array: Array | None) -> Array | None:
        """An array with the shape of x as a C-contiguous array with one channel axis."""
        if array is None or len(self.axes) == 1:
            return contiguous(array)
        array = contiguous(array if self.adjacent else array.transpose(self.order))
        assert array is not None
        axis, end = self.merged_axis, self.merged_axis + len(self.axes)
        return array.reshape(*array.shape[:axis], math.prod(self.shape), *array.shape[end:])

    def merge_out(self, out: Array | None) -> Array | None:
        """The array for _core to write: a view of `out`, or None if the axes are not adjacent; then `restore` copies
        the result to `out`."""
        return self.merge(out) if self.adjacent else None

    def flatten(self, vector: Array | None, dtype: Any = None) -> Array | None:
        """A vector as a C-contiguous array of shape (C,). Vectors that are written in place are checked to be
        C-contiguous before, so they are never copied."""
        vector = contiguous(vector, dtype)
        return vector if vector is None or len(self.axes) == 1 else vector.reshape(-1)

    def restore(self, result: tuple[Any, ...], *outs: Array | None) -> tuple[Any, ...]:
        """The arrays that _core returned, reshaped to the shapes of x and of the vectors. outs[i], if it is not None,
        takes the values of result[i] and its place."""
        if len(self.axes) == 1:
            return result
        items = [self._split(item) if hasattr(item, "reshape") else item for item in result]
        for i, out in enumerate(outs):
            if out is not None:
                if not self.adjacent:
                    out[...] = items[i]
                items[i] = out
        return tuple(items)

    def _split(self, array: Array) -> Array:
        """A (C,) vector, or an array with merged axes, reshaped. A rank-1 result for x itself means that all axes of x
        are channel axes, so x has the shape of the vectors."""
        if array.ndim == 1:
            return array.reshape(self.shape)
        if self.adjacent:
            return array.reshape(self.x_shape)
        order = self.order
        transposed = array.reshape([self.x_shape[i] for i in order])
        restored = contiguous(transposed.transpose([order.index(i) for i in range(len(order))]))
        assert restored is not None
        return restored

    @property
    def adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def order(self) -> list[int]:
        """The axes of x with the channel axes moved to the end."""
        return [*(i for i in range(len(self.x_shape)) if i not in self.axes), *self.axes]
