"""Checks of array arguments: each function returns its argument as an ndarray or raises an error that names it.

An error says what was wanted and what was received: ValueError for values and shapes, TypeError for types and dtypes.
Arrays are returned over the memory they came in, without a copy, so that overlaps can still be detected.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array, as_array, overlap, same_memory
from .axes import Axes

__all__ = [
    "check_disjoint",
    "like",
    "mask_weights",
    "moving_vector",
    "optional_mask",
    "output",
    "parameter",
    "tensor",
    "vector",
]


def tensor(name: str, value: Any) -> Array:
    """An array of rank >= 1 and dtype float32, float64, float16 or bfloat16, with any strides."""
    array = as_array(name, value)
    # bfloat16 is compared last: dtype.name takes 2 us
    if not (array.dtype.char in "fde" or array.dtype.name == "bfloat16") or not array.dtype.isnative:
        wanted = "float32, float64, float16 or bfloat16 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis. Received: shape ()")
    return array


def parameter(name: str, value: Any) -> Array:
    """An array of float32 or float64, of any shape."""
    array = as_array(name, value)
    if array.dtype.char not in "fd" or not array.dtype.isnative:
        wanted = "float32 or float64 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    return array


def vector(name: str, value: Any, axes: Axes, required: bool = False) -> Array | None:
    """One float32 or float64 value per channel."""
    if value is None:
        if required:
            raise TypeError(f"{name} must be an array of shape {axes.shape}. Received: None")
        return None
    array = parameter(name, value)
    if array.shape != axes.shape:
        raise ValueError(f"{name} must have shape {axes.shape} to match {axes} of x. Received: {array.shape}")
    return array


def grad_vectors(axes: Axes, mean: Any, invstd: Any, **optional: Any) -> dict[str, Array | None]:
    """The vectors of a gradient, by name: the required statistics, then the optional ones."""
    required = {"mean": mean, "invstd": invstd}
    return {
        **{name: vector(name, value, axes, required=True) for name, value in required.items()},
        **{name: vector(name, value, axes) for name, value in optional.items()},
    }


def moving_vector(name: str, value: Any, axes: Axes) -> Array | None:
    """A moving statistic. It must be an ndarray, because a conversion could not be updated in place."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, as it is updated in place. Received: {type(value).__name__}")
    array = vector(name, value, axes)
    assert array is not None
    _check_writable_in_place(name, array)
    return array


def like(name: str, value: Any, other: str, x: Array) -> Array | None:
    """An array with the shape and dtype of x, which the message calls `other`."""
    if value is None:
        return None
    array = as_array(name, value)
    check_like(name, array, other, x)
    return array


def check_like(name: str, array: Any, other: str, x: Any) -> None:
    """Raises an error unless the array, of whatever library, has the shape and dtype of x."""
    if array.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {x.dtype}. Received: {array.dtype}")
    if array.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {other}, {x.shape}. Received: {array.shape}")


def output(out: Any, exactly: dict[str, Array], others: dict[str, Array | None], name: str = "out") -> Array | None:
    """The array to write: exactly one of `exactly`, or disjoint from all of them; always disjoint from `others`."""
    if out is None:
        return None
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array. Received: {type(out).__name__}")
    array = like(name, out, *next(iter(exactly.items())))
    assert array is not None
    _check_writable_in_place(name, array)
    if not any(same_memory(array, a) for a in exactly.values()):
        others = {**exactly, **others}
    check_disjoint(name, array, others, " or ".join(exactly))
    return array


def _check_writable_in_place(name: str, array: Array) -> None:
    for wanted, fine in (
        ("C-contiguous", array.flags.c_contiguous),
        ("aligned", array.flags.aligned),
        ("writeable", array.flags.writeable),
    ):
        if not fine:
            received = f"shape {array.shape}, strides {array.strides}, flags {array.flags.num}"
            raise ValueError(f"{name} must be {wanted}, as it is written in place. Received: {received}")


def check_disjoint(name: str, array: Array, others: dict[str, Array | None], may_be: str = "") -> None:
    """Raise a ValueError if `array` shares memory with one of `others`."""
    exception = f" (or be exactly {may_be})" if may_be else ""
    for other, b in others.items():
        if b is not None and overlap(array, b):
            raise ValueError(f"{name} must not overlap {other}{exception}. Received: arrays that share memory")


def optional_mask(mask: Any) -> Array | None:
    """The mask as it was passed, for `check_disjoint`."""
    return None if mask is None else as_array("mask", mask)


def mask_weights(mask: Any, x: Array, axes: Axes) -> Array | None:
    """The mask as N*S contiguous weights: float64 if x is float64, else float32."""
    if mask is None:
        return None
    array = as_array("mask", mask)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"mask must have a boolean, integer or floating dtype. Received: {array.dtype}")
    if array.shape != axes.other_shape:
        full = axes.keepdims_shape
        if array.ndim != x.ndim or any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
            wanted = f"have shape {axes.other_shape}, or broadcast to {full} with as many axes as x"
            raise ValueError(f"mask must {wanted}. Received: {array.shape}")
        array = np.broadcast_to(array, full)
    with np.errstate(over="ignore"):  # a weight above float32's range becomes infinite, which is an error below
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        flat: Array = np.require(array, dtype, ("C_CONTIGUOUS", "ALIGNED")).reshape(-1)
    if flat.size and not (flat.min() >= 0 and flat.max() < np.inf):  # NaN fails both comparisons
        bad = flat[~((flat >= 0) & (flat < np.inf))][0]
        raise ValueError(f"mask must hold finite weights of at least 0. Received: {bad}")
    return flat
