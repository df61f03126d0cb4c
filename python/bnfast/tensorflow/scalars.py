"""momentum and epsilon: numbers, or tensors and variables of rank 0 whose value may change from call to call.

    check    the argument of a constructor: its type, its rank, and its range where the value is known
    read     the value that one call computes with: a float, or a float64 tensor
    like     that value, to compute with a tensor of another dtype
    current  the value that a config holds: a float

Both are constants to every gradient. The kernels check the range of a tensor when they run.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

Scalar: TypeAlias = Any  # a float, or a float64 tensor of rank 0 (see `read`)


def check(name: str, value: Any) -> Any:
    """A number as a float; a tensor or variable as it is.

    Raises:
        TypeError, ValueError: neither a number nor a tensor of rank 0, or out of range.
    """
    if tf.is_tensor(value):  # a variable counts as a tensor here
        dtype = value.dtype.base_dtype
        if not (dtype.is_floating or dtype.is_integer):
            raise TypeError(f"{name} must be a number or a scalar tensor. Received: dtype {dtype.name}")
        _check_rank(name, value)
        known = tf.get_static_value(value)
    else:
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number or a scalar tensor. Received: {value!r} ({type(value).__name__})")
        if np.ndim(value):
            raise ValueError(f"{name} must be a number or a scalar tensor. Received: shape {np.shape(value)}")
        value = known = _as_float(value)
    if known is not None and not in_range(name, float(known)):
        wanted = "in [0, 1]" if name == "momentum" else "finite and >= 0"
        raise ValueError(f"{name} must be {wanted}. Received: {known}")
    return value


def of_variable(name: str, variable: Any) -> Any:
    """The tf.Variable of one of Keras's variables."""
    return variable._value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int above float64's range
        return math.inf


def in_range(name: str, value: float) -> bool:
    return 0 <= value <= 1 if name == "momentum" else 0 <= value < math.inf


def read(name: str, value: Any) -> Scalar:
    """Raises ValueError for a tensor whose rank is known and isn't 0."""
    if not tf.is_tensor(value):
        return float(value)
    _check_rank(name, value)
    return tf.stop_gradient(tf.cast(value, tf.float64))


def like(value: Scalar, tensor: tf.Tensor) -> Scalar:
    """A float as it is: TensorFlow converts it by itself."""
    return tf.cast(value, tensor.dtype) if tf.is_tensor(value) else value


def current(name: str, value: Any) -> float:
    """Raises ValueError for a tensor of a graph, which has no value yet."""
    if not tf.is_tensor(value):
        return float(value)
    with tf.init_scope():
        known = value.numpy() if hasattr(value, "numpy") else tf.get_static_value(value)
    if known is None:
        raise ValueError(f"{name} must have a value where it is written to a config. Received: {value!r}")
    return float(known)


def _check_rank(name: str, tensor: tf.Tensor) -> None:
    if tensor.shape.rank not in (0, None):
        raise ValueError(f"{name} must be a number or a scalar tensor. Received: shape {tensor.shape}")
