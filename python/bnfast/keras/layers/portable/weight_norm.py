"""Weight normalization in Keras's ops: w = g * v/|v|, and its data-dependent initialization.

|v| is taken over the axes `over`, which are all but the output channels. Lengths and w are computed in float32 or, for
float64 v, in float64. Source: Salimans and Kingma 2016, arXiv:1602.07868.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from .batch import compute_dtype, dtype_of
from .mode import static_bool


def as_tensor(variable: Any) -> Any:
    """The current value of a variable."""
    return ops.convert_to_tensor(variable)


def copy_of(tensor: Any) -> Any:
    """The same values in a tensor of its own."""
    return ops.copy(tensor)


def kernel(v: Any, g: Any, over: tuple[int, ...]) -> Any:
    """g * v/|v| in the dtype of v, and 0 where |v| is 0."""
    values, squares = _squares(v, over)
    positive = squares > 0
    # the inner where keeps 0/0 out of the gradient
    inverse = ops.where(positive, 1 / ops.sqrt(ops.where(positive, squares, 1)), 0)
    return ops.cast(values * (ops.reshape(_widen(g), tuple(squares.shape)) * inverse), dtype_of(v))


def length(v: Any, over: tuple[int, ...], shape: Any, dtype: Any) -> Any:
    """|v| with the shape of g."""
    return ops.cast(ops.reshape(ops.sqrt(_squares(v, over)[1]), tuple(shape)), dtype or dtype_of(v))


def replicas() -> int:
    """1: only TensorFlow's strategies have replicas."""
    return 1


def choose(training: Any, initialized: Any, new: Callable[[], Any], now: list[Any]) -> Any:
    """new() in a training call before the initialization, else `now`."""
    wanted = ops.logical_and(ops.cast(training, "bool"), ops.logical_not(initialized))
    known = static_bool(wanted)
    if known is not None:
        return new() if known else now
    return ops.cond(wanted, new, lambda: now)


def from_batch(outputs: Any, inputs: Any, channels_first: bool, v_shape: Any, g: Any, bias: Any) -> list[Any]:
    """g and, if there is one, the bias that give `outputs` mean 0 and variance 1; and whether any channel varies.

    Args:
        outputs: what the layer computes from `inputs` with g = 1, without bias and activation.
    """
    t = _widen(outputs)
    channel = 1 if channels_first else len(t.shape) - 1
    mean, variance = ops.moments(t, [axis for axis in range(len(t.shape)) if axis != channel])
    # t = x.v/|v| is a sum of fan_in terms with a rounding error of about eps*|x|, whatever cancels. A deviation below
    # 8 such errors means a channel of equal values, whose variance is noise.
    eps = float(np.finfo(dtype_of(t)).eps)
    fan_in = math.prod(v_shape) // max(math.prod(g.shape), 1)
    varies = variance > (8 * eps) ** 2 * fan_in * ops.mean(ops.square(_widen(inputs)))
    scale = 1 / ops.sqrt(ops.where(varies, variance, 1))
    new = [_where(varies, scale, g)]
    if bias is not None:
        new.append(_where(varies, -mean * scale, bias))
    return [*new, ops.any(varies)]


def _squares(v: Any, over: tuple[int, ...]) -> tuple[Any, Any]:
    """v in the compute dtype, and the sum of its squares, which broadcasts against it."""
    values = _widen(v)
    return values, ops.sum(ops.square(values), over, keepdims=True)


def _widen(value: Any) -> Any:
    value = ops.convert_to_tensor(value)
    return ops.cast(value, compute_dtype(value))


def _where(condition: Any, new: Any, old: Any) -> Any:
    """`new` where the condition holds, else `old`, in the shape and dtype of `old`."""
    shape = tuple(old.shape)
    return ops.where(ops.reshape(condition, shape), ops.cast(ops.reshape(new, shape), dtype_of(old)), old)
