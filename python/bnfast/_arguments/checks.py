"""One function an argument: it returns the argument in plain form, or raises the error that names it.

Messages say what was wanted and what was received: ValueError for values and shapes, TypeError for types and dtypes.
Arrays come back as they lie in memory (no copies): what overlaps what can still be told.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import Array, as_array, overlap, same_memory

if TYPE_CHECKING:
    from .axes import Axes

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu")
NAN_POLICIES = ("propagate", "skip_update", "raise")


def tensor(name: str, value: Any) -> Array:
    """An array of at least one axis and one of the four dtypes; strides as they came."""
    array = as_array(name, value)
    if not (array.dtype.char in "fde" or array.dtype.name == "bfloat16") or not array.dtype.isnative:  # name: 2 us
        wanted = "float32, float64, float16 or bfloat16 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis. Received: shape ()")
    return array


def channel_axes(axis: Any) -> int | tuple[int, ...]:
    """One axis as an int, several as a tuple; whether they fit is seen with x (Axes.of)."""
    if not isinstance(axis, tuple | list):
        return integer("axis", axis)
    if not axis:
        raise ValueError(f"axis must name an axis. Received: {axis!r}")
    axes = tuple([integer("axis", one) for one in axis])
    return axes if len(axes) > 1 else axes[0]


def vector(name: str, value: Any, axes: Axes, required: bool = False) -> Array | None:
    """One float32 or float64 value a channel."""
    if value is None:
        if required:
            raise TypeError(f"{name} must be an array of shape {axes.shape}. Received: None")
        return None
    array = as_array(name, value)
    if array.dtype.char not in "fd" or not array.dtype.isnative:
        wanted = "float32 or float64 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    if array.shape != axes.shape:
        raise ValueError(f"{name} must have shape {axes.shape} to match {axes} of x. Received: {array.shape}")
    return array


def state(name: str, value: Any, axes: Axes) -> Array | None:
    """A vector that is updated in place, so it can't be converted on the way."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, as it is updated in place. Received: {type(value).__name__}")
    array = vector(name, value, axes)
    assert array is not None
    writable_in_place(name, array)
    return array


def writable_in_place(name: str, array: Array) -> None:
    for wanted, fine in (
        ("C-contiguous", array.flags.c_contiguous),
        ("aligned", array.flags.aligned),
        ("writeable", array.flags.writeable),
    ):
        if not fine:
            received = f"shape {array.shape}, strides {array.strides}, flags {array.flags.num}"
            raise ValueError(f"{name} must be {wanted}, as it is written in place. Received: {received}")


def like(name: str, value: Any, other: str, x: Array) -> Array | None:
    """An array of x's shape and dtype."""
    if value is None:
        return None
    array = as_array(name, value)
    if array.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {x.dtype}. Received: {array.dtype}")
    if array.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {other}, {x.shape}. Received: {array.shape}")
    return array


def target(out: Any, exactly: dict[str, Array], others: dict[str, Array | None], name: str = "out") -> Array | None:
    """The array to write: exactly one of `exactly` or apart from it, and apart from all others."""
    if out is None:
        return None
    if not isinstance(out, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array. Received: {type(out).__name__}")
    array = like(name, out, *next(iter(exactly.items())))
    assert array is not None
    writable_in_place(name, array)
    if not any(same_memory(array, a) for a in exactly.values()):
        others = {**exactly, **others}
    apart(name, array, others, " or ".join(exactly))
    return array


def apart(name: str, array: Array, others: dict[str, Array | None], may_be: str = "") -> None:
    exception = f" (or be exactly {may_be})" if may_be else ""
    for other, b in others.items():
        if b is not None and overlap(array, b):
            raise ValueError(f"{name} must not overlap {other}{exception}. Received: arrays that share memory")


def array_or_none(value: Any) -> Array | None:
    return None if value is None else as_array("mask", value)


def weights(mask: Any, x: Array, axes: Axes) -> Array | None:
    """The mask as N*S contiguous weights, float64 for float64 x, else float32."""
    if mask is None:
        return None
    array = as_array("mask", mask)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"mask must have a boolean, integer or floating dtype. Received: {array.dtype}")
    full = axes.off
    if array.shape != full:
        kept = axes.kept
        if array.ndim != x.ndim or any(have not in (1, want) for have, want in zip(array.shape, kept, strict=True)):
            wanted = f"have shape {full}, or broadcast to {kept} with as many axes as x"
            raise ValueError(f"mask must {wanted}. Received: {array.shape}")
        array = np.broadcast_to(array, kept)
    with np.errstate(over="ignore"):  # a weight above float32's range is reported below, as infinite
        wide = np.float64 if x.dtype == np.float64 else np.float32
        flat: Array = np.require(array, wide, ("C_CONTIGUOUS", "ALIGNED")).reshape(-1)
    if flat.size and not (flat.min() >= 0 and flat.max() < np.inf):  # NaN fails both
        bad = flat[~((flat >= 0) & (flat < np.inf))][0]
        raise ValueError(f"mask must hold finite weights of at least 0. Received: {bad}")
    return flat


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer. Received: {value!r} ({type(value).__name__})")
    return int(value.__index__())


def extents(name: str, value: Any, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's vectors: C, or the extents of several axes."""
    count = 1 if isinstance(axis, int) else len(axis)
    given = value if isinstance(value, tuple | list) else (value,)
    if len(given) != count:
        wanted = "an integer" if count == 1 else f"{count} integers, one for each of the axes {axis}"
        raise ValueError(f"{name} must be {wanted}. Received: {value!r}")
    shape = tuple([integer(name, one) for one in given])
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{name} must be at least 0. Received: {value!r}")
    return shape


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False. Received: {value!r} ({type(value).__name__})")
    return bool(value)


def optional_boolean(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be None, True or False. Received: {value!r} ({type(value).__name__})")
    return None if value is None else bool(value)


def parameter_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The dtype of a layer's parameters."""
    if dtype is None:
        return None
    try:
        parsed: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be float32, float64 or None. Received: {dtype!r}") from None
    if parsed.char not in "fd" or not parsed.isnative:
        raise TypeError(f"dtype must be float32, float64 or None. Received: {dtype!r}")
    return parsed


def bessel(correction: Any) -> int:
    ddof = integer("correction", correction)
    if ddof not in (0, 1):
        raise ValueError(f"correction must be 0 (population variance) or 1 (sample variance). Received: {ddof}")
    return ddof


def real(name: str, value: Any, upper: float = math.inf) -> float:
    """A float in [0, upper], and finite."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number. Received: {value!r} ({type(value).__name__})")
    if not (0 <= value <= upper and value < math.inf):
        wanted = "finite and at least 0" if upper == math.inf else f"in [0, {upper:g}]"
        raise ValueError(f"{name} must be {wanted}. Received: {value}")
    return float(value)


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be one of {allowed}. Received: {value!r} ({type(value).__name__})")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}. Received: {value!r}")
    return value
