"""momentum and epsilon: numbers, or scalar tensors and variables: bnfast.tensorflow.scalars over keras.ops.

    check    the argument of a constructor: its type, its rank, and its range where the value is known
    read     the value that one call computes with: a float, or a scalar tensor while JAX traces
    current  the value that a config holds: a float

Both are constants to every gradient.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from .batch import constant, dtype_of


def check(name: str, value: Any) -> Any:
    """A number as a float; a tensor as it is.

    Raises:
        TypeError, ValueError: neither a number nor a tensor of rank 0, or out of range.
    """
    if ops.is_tensor(value):
        if not dtype_of(value).startswith(("float", "bfloat", "int", "uint")):
            raise TypeError(f"{name} must be a number or a scalar tensor. Received: dtype {dtype_of(value)}")
        _check_rank(name, value)
        known = _known(value)
    else:
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number or a scalar tensor. Received: {value!r} ({type(value).__name__})")
        if np.ndim(value):
            raise ValueError(f"{name} must be a number or a scalar tensor. Received: shape {np.shape(value)}")
        value = known = _as_float(value)
    if known is not None and not in_range(name, known):
        wanted = "in [0, 1]" if name == "momentum" else "finite and >= 0"
        raise ValueError(f"{name} must be {wanted}. Received: {known}")
    return value


def of_variable(name: str, variable: Any) -> Any:
    """The tensor that is the memory of a keras.Variable, so that assigning to the variable takes effect.

    Raises:
        TypeError: on JAX, whose variables have no memory of their own.
    """
    if keras.backend.backend() != "torch":
        raise TypeError(
            f"{name} must be a number or a scalar array on {keras.backend.backend()}: a keras.Variable holds a new "
            "array after each assignment, which the layer would not see, and Keras would count it among the layer's "
            f"weights. Received: {variable!r}"
        )
    return variable.value.detach()


def in_range(name: str, value: float) -> bool:
    return 0 <= value <= 1 if name == "momentum" else 0 <= value < math.inf


def read(name: str, value: Any) -> Any:
    """Raises ValueError for a tensor that isn't a scalar, or whose value is known and out of range."""
    if not ops.is_tensor(value):
        return float(value)
    _check_rank(name, value)
    known = _known(value)
    if known is None:
        return constant(value)
    if not in_range(name, known):
        wanted = "in [0, 1]" if name == "momentum" else "finite and >= 0"
        raise ValueError(f"{name} must be {wanted}. Received: {known}")
    return known


def current(name: str, value: Any) -> float:
    """Raises ValueError for a tensor that is being traced, which has no value yet."""
    known = _known(value)
    if known is None:
        raise ValueError(f"{name} must have a value where it is written to a config. Received: {value!r}")
    return known


def _known(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, RuntimeError):  # of a tracer of JAX's; of PyTorch's tensors without memory
        return None


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int above float64's range
        return math.inf


def _check_rank(name: str, tensor: Any) -> None:
    if len(tensor.shape):
        raise ValueError(f"{name} must be a number or a scalar tensor. Received: shape {tuple(tensor.shape)}")
