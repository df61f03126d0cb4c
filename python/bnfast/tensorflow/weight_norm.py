"""Weight normalization in TensorFlow's ops: w = g * v/|v|, and its data-dependent initialization.

|v| is taken over the axes `over`, which are all but the output channels. Lengths and w are computed in float32 or, for
float64 v, in float64. Source: Salimans and Kingma 2016, arXiv:1602.07868.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def as_tensor(variable: Any) -> tf.Tensor:
    """The current value of a variable."""
    return tf.convert_to_tensor(variable)


def copy_of(tensor: tf.Tensor) -> tf.Tensor:
    """The same values in a tensor of its own."""
    return tf.identity(tensor)


def kernel(v: tf.Tensor, g: tf.Tensor, over: tuple[int, ...]) -> tf.Tensor:
    """g * v/|v| in the dtype of v, and 0 where |v| is 0."""
    wide, squares = _squares(v, over)
    positive = squares > 0
    # the inner tf.where keeps 0/0 out of the gradient
    inverse = tf.where(positive, 1 / tf.sqrt(tf.where(positive, squares, 1)), 0)
    return tf.cast(wide * (tf.reshape(_widen(g), squares.shape) * inverse), v.dtype)


def length(v: tf.Tensor, over: tuple[int, ...], shape: Any, dtype: Any) -> tf.Tensor:
    """|v| with the shape of g."""
    return tf.cast(tf.reshape(tf.sqrt(_squares(v, over)[1]), shape), dtype or v.dtype)


def replicas() -> int:
    """The number of replicas of the current strategy if this runs inside one of them, else 1."""
    count = int(tf.distribute.get_strategy().num_replicas_in_sync)
    return count if count > 1 and not tf.distribute.in_cross_replica_context() else 1


def initialized_already(read: Callable[[], Any]) -> bool:
    """The value of a boolean variable outside the graph that is being traced."""
    with tf.init_scope():
        return bool(read())


def choose(training: Any, initialized: tf.Tensor, new: Callable[[], Any], now: list[tf.Tensor]) -> Any:
    """new() in a training call before the initialization, else `now`."""
    wanted = tf.logical_and(tf.cast(training, tf.bool), tf.logical_not(initialized))
    return tf.cond(wanted, new, lambda: now)


def from_batch(
    outputs: tf.Tensor,
    inputs: Any,
    channels_first: bool,
    v_shape: Any,
    g: tf.Tensor,
    bias: tf.Tensor | None,
) -> list[tf.Tensor]:
    """g and, if there is one, the bias that give `outputs` mean 0 and variance 1; and whether any channel varies.

    Args:
        outputs: what the layer computes from `inputs` with g = 1, without bias and activation.
    """
    t = _widen(outputs)
    channel = 1 if channels_first else t.shape.rank - 1
    mean, variance = tf.nn.moments(t, [axis for axis in range(t.shape.rank) if axis != channel])
    # t = x.v/|v| is a sum of fan_in terms with a rounding error of about eps*|x|, whatever cancels. A deviation below
    # 8 such errors means a channel of equal values, whose variance is noise.
    eps = np.finfo(t.dtype.as_numpy_dtype).eps
    fan_in = math.prod(v_shape) // max(math.prod(g.shape), 1)
    varies = variance > (8 * eps) ** 2 * fan_in * tf.reduce_mean(tf.square(_widen(inputs)))
    scale = 1 / tf.sqrt(tf.where(varies, variance, 1))
    new = [_where(varies, scale, g)]
    if bias is not None:
        new.append(_where(varies, -mean * scale, bias))
    return [*new, tf.reduce_any(varies)]


def _squares(v: tf.Tensor, over: tuple[int, ...]) -> tuple[tf.Tensor, tf.Tensor]:
    """v in the compute dtype, and the sum of its squares, which broadcasts against it."""
    wide = _widen(v)
    return wide, tf.reduce_sum(tf.square(wide), over, keepdims=True)


def _widen(value: Any) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def _where(condition: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """`new` where the condition holds, else `old`, in the shape and dtype of `old`."""
    return tf.where(tf.reshape(condition, old.shape), tf.cast(tf.reshape(new, old.shape), old.dtype), old)
