"""What a training step normalizes (`Batch`) and how (`Options`), as every file of this folder passes it around."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import keras
from keras import ops

from ...._arguments.options import Options

__all__ = [
    "FLOATS",
    "Batch",
    "Options",
    "as_input",
    "compute_dtype",
    "constant",
    "divide",
    "dtype_of",
    "has_values",
    "mask_varies_by_channel",
    "parameter",
    "per_channel",
]

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Batch(NamedTuple):
    """The tensors of one training step; absent ones are None.

    x is float32, float64, float16 or bfloat16. gamma and beta have shape (C,) and are float32 or float64. mask has the
    rank of x and holds the weights of the statistics; the kernels need extent 1 on the channel axis. residual has the
    shape and dtype of x and is added before the activation.
    """

    x: Any
    gamma: Any = None
    beta: Any = None
    mask: Any = None
    residual: Any = None


def dtype_of(x: Any) -> str:
    name: str = keras.backend.standardize_dtype(x.dtype)
    return name


def as_input(inputs: Any, rank: int | None = None) -> Any:
    """inputs as a tensor that the kernels accept: integers and booleans become float32, as in Keras.

    Raises:
        TypeError: inputs are neither floats nor integers nor booleans.
    """
    x = inputs if ops.is_tensor(inputs) else ops.convert_to_tensor(inputs)
    name = dtype_of(x)
    if name in FLOATS:
        return x
    if not (name == "bool" or name.startswith(("int", "uint"))):
        raise TypeError(f"inputs must have a float, integer or boolean dtype. Received: {name}")
    return ops.cast(x, "float32")


def compute_dtype(x: Any) -> str:
    """float64 for float64 x, else float32."""
    return "float64" if dtype_of(x) == "float64" else "float32"


def per_channel(values: Any, x: Any, axis: int) -> Any:
    """Values of shape (C,), reshaped and cast so that they broadcast over x."""
    shape = [1] * len(x.shape)
    shape[axis] = x.shape[axis]
    return ops.reshape(ops.cast(values, compute_dtype(x)), shape)


def parameter(variable: Any) -> Any:
    """A layer's weight as the kernels need it: shape (C,), and float32 if it is a half type. A scalar stays scalar."""
    value = variable.value if isinstance(variable, keras.Variable) else ops.convert_to_tensor(variable)
    value = ops.reshape(value, (-1,)) if len(value.shape) > 1 else value
    return ops.cast(value, "float32") if dtype_of(value) in ("float16", "bfloat16") else value


def mask_varies_by_channel(mask: Any, options: Options) -> bool:
    """Whether each channel has weights of its own, which the kernels don't accept."""
    return mask is not None and mask.shape[options.axis] != 1


def has_values(x: Any, mask: Any) -> Any:
    """Whether the batch holds any value that counts: a bool, or a boolean scalar tensor."""
    present = math.prod(x.shape) > 0
    return present if mask is None or not present else ops.any(ops.cast(mask, "bool"))


def constant(tensor: Any) -> Any:
    """The tensor without its gradient."""
    return ops.stop_gradient(tensor)


def divide(numerator: Any, denominator: Any) -> Any:
    """0 where the denominator is 0."""
    positive = denominator > 0
    return ops.where(positive, numerator / ops.where(positive, denominator, 1), 0)
