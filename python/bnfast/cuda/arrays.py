"""Device arrays as the kernels need them: where they lie (`View`), and the (N, C, S) of a shape in memory (`Geometry`).

An array may be dense in any order of its axes: a torch tensor in channels_last format is read in place. A View is made
by the array's library (libraries.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from .._arguments import checks

DTYPES = ("float32", "float64", "float16", "bfloat16")  # in the order of bnfast.h
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


class View:
    """One array on a device. Strides count elements; None: C-contiguous. `owner` keeps the memory alive.

    A class with slots, because its sums are read more often than it is made: five of them are most of a call's time.
    """

    __slots__ = ("address", "device", "dtype", "end", "owner", "read_only", "shape", "size", "strides")

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
        dtype: str,
        device: int,
        read_only: bool,
        owner: Any,
    ) -> None:
        self.address, self.shape, self.strides, self.dtype = address, shape, strides, dtype
        self.device, self.read_only, self.owner = device, read_only, owner
        self.size: int = math.prod(shape)
        self.end: int = address + self.size * ITEM_BYTES[dtype]

    @property
    def bytes(self) -> int:
        return self.end - self.address

    def overlaps(self, other: View) -> bool:
        """Whether two dense arrays share a byte."""
        return self.address < other.end and other.address < self.end


class Geometry(NamedTuple):
    """The array in memory as N outer, C channel and S inner extents; and the shape of its vectors."""

    extents: tuple[int, int, int]
    vector_shape: tuple[int, ...]
    order: tuple[int, ...]  # the axes from the outermost in memory to the innermost, those of extent 1 left out

    @staticmethod
    def of(name: str, view: View, axis: Any) -> Geometry:
        """Raises ValueError if the array has holes, or several channel axes that don't lie side by side in memory."""
        return _geometry(name, view.shape, view.strides, checks.channel_axes(axis))


@functools.lru_cache(maxsize=1024)  # a model calls with the same shapes again and again
def _geometry(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, axis: int | tuple[int, ...]
) -> Geometry:
    axes = _channel_axes(name, shape, axis)
    vector_shape = tuple(shape[i] for i in axes)
    C, size = math.prod(vector_shape), math.prod(shape)
    order = memory_order(name, shape, strides)
    if size == 0:
        return Geometry((0, C, 1), vector_shape, order)
    channels = [order.index(i) for i in axes if shape[i] > 1]
    if not channels:
        return Geometry((size, 1, 1), vector_shape, order)
    first, last = channels[0], channels[-1]
    if channels != list(range(first, last + 1)):
        raise ValueError(
            f"axis must name axes that lie side by side in memory on a CUDA device. Received: axis={axis!r} for "
            f"{name} of shape {shape}"
        )
    outer = math.prod(shape[i] for i in order[:first])
    return Geometry((outer, C, size // (outer * C)), vector_shape, order)


@functools.lru_cache(maxsize=1024)
def memory_order(name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes from the outermost in memory to the innermost. Raises ValueError if the array isn't dense."""
    axes = [i for i, extent in enumerate(shape) if extent != 1]
    if strides is None or 0 in shape:
        return tuple(axes)
    axes.sort(key=lambda i: -strides[i])
    step = 1
    for i in reversed(axes):
        if strides[i] != step:
            raise ValueError(
                f"{name} must be contiguous, in any order of its axes: the kernels read it in place. Received: shape "
                f"{shape} with strides {strides}"
            )
        step *= shape[i]
    return tuple(axes)


def _channel_axes(name: str, shape: tuple[int, ...], given: int | tuple[int, ...]) -> tuple[int, ...]:
    rank = len(shape)
    if rank == 0:
        raise ValueError(f"{name} must have at least one axis. Received: shape ()")
    axes = [given] if isinstance(given, int) else list(given)
    for one in axes:
        if not -rank <= one < rank:
            raise ValueError(f"axis must be in [-{rank}, {rank}) for {name} of shape {shape}. Received: {one}")
    found = sorted(one % rank for one in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"axis must name each axis once. Received: {given!r}")
    return tuple(found)
