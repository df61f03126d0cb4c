"""What a training step normalizes (`Batch`) and how (`Options`), as every file of this folder passes it around."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from .._arguments.options import Options

__all__ = [
    "PRIMALS",
    "Batch",
    "GradientInputs",
    "Options",
    "as_input",
    "compute_dtype",
    "has_values",
    "mask_varies_by_channel",
    "parameter",
    "per_channel",
]

PRIMALS = ("x", "gamma", "beta", "residual")  # the tensors that get a gradient, in this order


class Batch(NamedTuple):
    """The tensors of one training step; absent ones are None.

    x is float32, float64, float16 or bfloat16. gamma and beta have shape (C,) and are float32 or float64. mask has the
    rank of x and holds the weights of the statistics; the kernels need extent 1 on the channel axis. residual has the
    shape and dtype of x and is added before the activation.
    """

    x: tf.Tensor
    gamma: tf.Tensor | None = None
    beta: tf.Tensor | None = None
    mask: tf.Tensor | None = None
    residual: tf.Tensor | None = None

    @property
    def primals(self) -> dict[str, tf.Tensor]:
        """The tensors that are present and get a gradient, by name."""
        return {name: getattr(self, name) for name in PRIMALS if getattr(self, name) is not None}


class GradientInputs(NamedTuple):
    """What a backward pass reads. mean to dvariance are vectors of shape (C,)."""

    dy: tf.Tensor
    x: tf.Tensor
    mean: tf.Tensor
    invstd: tf.Tensor
    gamma: tf.Tensor
    beta: tf.Tensor
    dmean: tf.Tensor  # upstream gradients of the statistics
    dvariance: tf.Tensor
    mask: tf.Tensor | None = None
    y: tf.Tensor | None = None  # with residual and activation: the output, or, if that is smooth, the residual


def as_input(inputs: Any, rank: int | None = None) -> tf.Tensor:
    """inputs as a tensor that the kernels accept: integers and booleans become float32, as in Keras.

    rank: that of a tensor whose own rank the graph doesn't know.

    Raises:
        TypeError: inputs are neither floats nor integers nor booleans.
    """
    x = tf.convert_to_tensor(inputs)
    if x.shape.rank is None and rank is not None:
        x = tf.ensure_shape(x, [None] * rank)
    if x.dtype in (tf.float16, tf.bfloat16, tf.float32, tf.float64):
        return x
    if not (x.dtype.is_floating or x.dtype.is_integer or x.dtype.is_bool):
        raise TypeError(f"inputs must have a float, integer or boolean dtype. Received: {x.dtype.name}")
    return tf.cast(x, tf.float32)


def compute_dtype(x: tf.Tensor) -> tf.DType:
    """float64 for float64 x, else float32."""
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def per_channel(values: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """Values of shape (C,), reshaped and cast so that they broadcast over x."""
    shape = [1] * x.shape.rank
    shape[axis] = -1
    return tf.reshape(tf.cast(values, compute_dtype(x)), shape)


def parameter(variable: Any) -> tf.Tensor:
    """A layer's weight as the kernels need it: shape (C,), and float32 if it is a half type. A scalar stays scalar."""
    value = tf.convert_to_tensor(variable)
    value = tf.reshape(value, [-1]) if value.shape.rank > 1 else value
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value


def mask_varies_by_channel(mask: tf.Tensor | None, options: Options) -> bool:
    """Whether each channel has weights of its own, which the kernels don't accept."""
    return mask is not None and mask.shape[options.axis] != 1


def has_values(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Whether the batch holds any value that counts, as a boolean scalar."""
    present = tf.size(x) > 0
    return present if mask is None else present & tf.reduce_any(tf.cast(mask, tf.bool))
