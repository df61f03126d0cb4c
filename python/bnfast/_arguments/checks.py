"""Checks of scalar arguments: each function returns its argument as a plain Python value or raises an error.

An error names the argument, what was wanted and what was received: ValueError for values, TypeError for types.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

__all__ = [
    "ACTIVATIONS",
    "NAN_POLICIES",
    "PIECEWISE_LINEAR",
    "activation",
    "boolean",
    "channel_axes",
    "check_correction",
    "choice",
    "extents",
    "integer",
    "optional_boolean",
    "parameter_dtype",
    "real",
]

# The gradient of these can be told from y, and their second derivative is 0.
PIECEWISE_LINEAR = (None, "relu", "relu6", "leaky_relu")
SMOOTH = (
    "silu",
    "hard_silu",
    "sigmoid",
    "hard_sigmoid",
    "tanh",
    "gelu",
    "gelu_tanh",
    "elu",
    "selu",
    "softplus",
    "mish",
)
ACTIVATIONS = PIECEWISE_LINEAR + SMOOTH
ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}
NAN_POLICIES = ("propagate", "skip_update", "raise")


def integer(name: str, value: Any) -> int:
    """An int, from anything with `__index__` except booleans."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:  # also an array that isn't one integer
        pass
    raise TypeError(f"{name} must be an integer. Received: {value!r} ({type(value).__name__})")


def boolean(name: str, value: Any) -> bool:
    """True or False; 0 and 1 are errors."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False. Received: {value!r} ({type(value).__name__})")
    return bool(value)


def optional_boolean(name: str, value: Any) -> bool | None:
    """None, True or False."""
    if value is not None and not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be None, True or False. Received: {value!r} ({type(value).__name__})")
    return None if value is None else bool(value)


def real(name: str, value: Any, upper: float = math.inf) -> float:
    """A finite float in [0, upper]."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise TypeError(f"{name} must be a real number. Received: {value!r} ({type(value).__name__})")
    try:
        number = float(value)  # first: an int or a longdouble may be finite and above float64's range
    except OverflowError:
        number = math.inf
    if not (0 <= number <= upper and number < math.inf):
        wanted = "finite and at least 0" if upper == math.inf else f"in [0, {upper:g}]"
        raise ValueError(f"{name} must be {wanted}. Received: {value}")
    return number


def choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> str | None:
    """One of `allowed`."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be one of {allowed}. Received: {value!r} ({type(value).__name__})")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}. Received: {value!r}")
    return value


def activation(value: Any) -> str | None:
    """One of ACTIVATIONS; an alias becomes the word that it stands for."""
    return choice("activation", ALIASES.get(value, value) if isinstance(value, str) else value, ACTIVATIONS)


def check_correction(correction: Any) -> int:
    """0 (population variance) or 1 (sample variance)."""
    ddof = integer("correction", correction)
    if ddof not in (0, 1):
        raise ValueError(f"correction must be 0 (population variance) or 1 (sample variance). Received: {ddof}")
    return ddof


def channel_axes(axis: Any) -> int | tuple[int, ...]:
    """One axis as an int, several as a tuple. `Axes.of` checks them against x."""
    if not isinstance(axis, tuple | list):
        return integer("axis", axis)
    if not axis:
        raise ValueError(f"axis must name at least one axis. Received: {axis!r}")
    axes = tuple([integer("axis", one) for one in axis])
    return axes if len(axes) > 1 else axes[0]


def extents(name: str, value: Any, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's vectors: (C,), or one extent per axis."""
    count = 1 if isinstance(axis, int) else len(axis)
    given = value if isinstance(value, tuple | list) else (value,)
    if len(given) != count:
        wanted = "an integer" if count == 1 else f"{count} integers, one for each of the axes {axis}"
        raise ValueError(f"{name} must be {wanted}. Received: {value!r}")
    shape = tuple([integer(name, one) for one in given])
    if any(extent < 0 for extent in shape):
        raise ValueError(f"{name} must be at least 0. Received: {value!r}")
    return shape


def parameter_dtype(dtype: Any) -> np.dtype[Any] | None:
    """The dtype of a layer's parameters: float32, float64, or None if the first input decides."""
    if dtype is None:
        return None
    try:
        parsed: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be float32, float64 or None. Received: {dtype!r}") from None
    if parsed.char not in "fd" or not parsed.isnative:
        raise TypeError(f"dtype must be float32, float64 or None. Received: {dtype!r}")
    return parsed
