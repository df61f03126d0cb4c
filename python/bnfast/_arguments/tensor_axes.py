"""The channel axes of a framework's tensor, by its shape alone. Merging them is left to the framework's own `Axes`.

axis=[1, 2] normalizes every pair of indices separately; weights then have the rank of x. Channels are numbered in the
order of the axes in x, whatever the order in which they were given. A shape is a tuple, or TensorFlow's TensorShape,
with None for extents that a graph doesn't know.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

__all__ = ["TensorAxes"]

Own = TypeVar("Own", bound="TensorAxes")


class TensorAxes(NamedTuple):
    axes: tuple[int, ...]  # ascending, >= 0
    rank: int

    @classmethod
    def of(cls: type[Own], axes: list[int], shape: Any, *, known: bool = True) -> Own:
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
        return cls(ascending, rank)

    @property
    def place(self) -> int:
        """The one axis, after `merge`."""
        return self.axes[0] if self.adjacent else self.rank - len(self.axes)

    @property
    def adjacent(self) -> bool:
        return self.axes[-1] - self.axes[0] == len(self.axes) - 1

    @property
    def order(self) -> list[int]:
        """The axes of x with the channel axes last."""
        return [*(i for i in range(self.rank) if i not in self.axes), *self.axes]

    def weight_shape(self, shape: Any) -> tuple[int, ...]:
        """The shape of weights for several axes, as in tf.keras 2: the rank of x, with extent 1 off the axes."""
        return tuple(shape[i] if i in self.axes else 1 for i in range(self.rank))

    def mask_axes(self, mask_shape: Any, x_shape: Any, attached: bool) -> tuple[int, ...]:
        """The axes on which a mask gets an extent of 1, one after the other, to have the rank of x.

        Its shape is that of x without the channel axes, or x.shape[:-1] if Keras attached it to x, or extents of 1 in
        either. A mask along one axis that fits only one of the two readings is read that way.

        Raises:
            ValueError: the mask fits neither.
        """
        rank = len(mask_shape) if isinstance(mask_shape, tuple) else mask_shape.rank
        along = rank == self.rank - len(self.axes)
        if len(self.axes) == 1:
            if not along:
                raise ValueError(
                    f"mask must have one dimension less than inputs. Received: mask.shape={mask_shape}, "
                    f"inputs.shape={x_shape}"
                )
            last: tuple[int, ...] = (self.rank - 1,)
            readings = [last, self.axes] if attached else [self.axes, last]
        else:
            readings = [self.axes] if along and not attached else [(rank,)]
        for axes in readings:
            if _fits(mask_shape, axes, x_shape):
                return axes
        without = f"axis {self.axes[0]}" if len(self.axes) == 1 else f"axes {list(self.axes)}"
        raise ValueError(
            f"mask must have the shape of inputs without {without}, or extents of 1 in it. "
            f"Received: mask.shape={mask_shape}, inputs.shape={x_shape}"
        )


def _fits(mask_shape: Any, axes: tuple[int, ...], x_shape: Any) -> bool:
    """Whether the mask, with an extent of 1 on each axis, broadcasts to x, as far as extents are known."""
    extents = list(mask_shape)
    for axis in axes:
        extents.insert(axis, 1)
    if len(extents) != len(x_shape):
        return False
    return all(m in (1, None) or n in (m, None) for m, n in zip(extents, x_shape, strict=True))
