"""Training-mode batch normalization as plain TensorFlow ops: slow, and differentiable as often as anyone likes.

    mean = sum(w*x)/W, variance = sum(w*(x - mean)^2)/W, W = sum(w)
    y = activation(gamma*(x - mean)*invstd + beta + residual), invstd = 1/sqrt(variance + epsilon), 0 where that is 1/0

Two uses: the derivative of the kernels' backward (`derivative_of_gradient`), and masks that differ between channels,
which the kernels don't take (`train_step`). Computes in float32, in float64 for float64 x; W = 0 gives mean = variance
= 0. It doesn't stop the gradient at the mean inside the variance, as tf.nn.moments does: that is right in the first
order and wrong in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

Merge = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]
PRIMAL = ("x", "gamma", "beta", "residual")  # what a gradient is asked for, in this order


class Options(NamedTuple):
    """What a batch norm op does, its tensors aside: words and meaning as in bnfast.batch_norm_train."""

    axis: int = -1
    epsilon: float = 1e-3
    activation: str | None = None
    negative_slope: float = 0.2


class Batch(NamedTuple):
    """What a training step normalizes, and with what; absent ones are None.

    x is float32, float64, float16 or bfloat16; gamma and beta are (C,), float32 or float64. mask has x's rank and
    weighs the statistics; the kernels take one of extent 1 on the channel axis. residual is of x's shape and dtype
    and is added before the activation.
    """

    x: tf.Tensor
    gamma: tf.Tensor | None = None
    beta: tf.Tensor | None = None
    mask: tf.Tensor | None = None
    residual: tf.Tensor | None = None

    @property
    def primal(self) -> dict[str, tf.Tensor]:
        """Those that are there and get a gradient, by name."""
        return {name: getattr(self, name) for name in PRIMAL if getattr(self, name) is not None}


def activate(y: tf.Tensor, options: Options) -> tf.Tensor:
    """The fused activation as a TensorFlow op."""
    if options.activation is None:
        return y
    if options.activation == "leaky_relu":
        if y.dtype == tf.float64:  # TensorFlow's op holds its slope in float32: 0.2 would be 3e-9 off
            return tf.where(y > 0, y, y * options.negative_slope)
        return tf.nn.leaky_relu(y, options.negative_slope)
    return {"relu": tf.nn.relu, "relu6": tf.nn.relu6}[options.activation](y)


def kept(primal: Mapping[str, tf.Tensor], y: tf.Tensor, options: Options) -> dict[str, tf.Tensor]:
    """What a gradient keeps of a forward: primal without the residual.

    With an activation it needs y in its place, which the next layer keeps anyway; without one dresidual is dy.
    """
    rest = {name: tensor for name, tensor in primal.items() if name != "residual"}
    return rest if options.activation is None or "residual" not in primal else {**rest, "y": tf.stop_gradient(y)}


def gate(y: tf.Tensor, options: Options) -> tf.Tensor:
    """activation'(z), read off y = activation(z), in the dtype of computation. As in the kernels, NaN passes a relu."""
    one = tf.ones((), compute_dtype(y))
    if options.activation == "leaky_relu":
        return tf.where(y > 0, one, one * options.negative_slope)
    closed = (y <= 0) | (y >= 6) if options.activation == "relu6" else y <= 0
    return tf.where(closed, 0 * one, one)


def compute_dtype(x: tf.Tensor) -> tf.DType:
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def per_channel(values: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """(C,) values in the shape and dtype that broadcast over x."""
    shape = [1] * x.shape.rank
    shape[axis] = -1
    return tf.reshape(tf.cast(values, compute_dtype(x)), shape)


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    mask: tf.Tensor | None,
    options: Options,
    residual: tf.Tensor | None = None,
    merge: Merge | None = None,
    slopes: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """y (x's dtype), and mean, variance (float64) and W, all (C,). mask broadcasts to x, the channel axis included.

    slopes: what z is multiplied by in place of the activation. merge: what becomes of mean, variance and W (float64)
    before they are used, differentiable; None: nothing.
    """
    values = tf.cast(x, compute_dtype(x))
    axes = [i for i in range(x.shape.rank) if i != options.axis % x.shape.rank]
    weights = tf.ones_like(values) if mask is None else tf.broadcast_to(tf.cast(mask, values.dtype), tf.shape(x))
    total = tf.reduce_sum(weights, axes, keepdims=True)
    present = weights > 0  # 0*NaN is NaN: what the mask leaves out must not reach the sums
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.where(present, values, 0), axes, keepdims=True), total)
    deviation = tf.where(present, values - mean, 0)
    variance = tf.math.divide_no_nan(tf.reduce_sum(weights * deviation**2, axes, keepdims=True), total)
    if merge is not None:
        own = (tf.cast(tf.reshape(t, [-1]), tf.float64) for t in (mean, variance, total))
        mean, variance, total = (per_channel(t, x, options.axis) for t in merge(*own))
    shifted = variance + options.epsilon
    invstd = tf.where(shifted > 0, tf.math.rsqrt(tf.where(shifted > 0, shifted, 1)), 0)
    y = (values - mean) * invstd
    if gamma is not None:
        y *= per_channel(gamma, x, options.axis)
    if beta is not None:
        y += per_channel(beta, x, options.axis)
    if residual is not None:
        y += tf.cast(residual, y.dtype)
    mean, variance, total = (tf.cast(tf.reshape(t, [-1]), tf.float64) for t in (mean, variance, total))
    y = activate(y, options) if slopes is None else y * slopes
    return tf.cast(y, x.dtype), mean, variance, total


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: float,
    options: Options,
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """bridge.train_step on plain ops, for any mask that broadcasts to x. Channels with W = 0 keep their statistics."""
    y, mean, variance, total = train(batch.x, batch.gamma, batch.beta, batch.mask, options, batch.residual)
    moves = total > 0
    if nan_policy == "skip_update":
        moves &= tf.math.is_finite(mean) & tf.math.is_finite(variance)
    if correction:
        variance *= tf.where(total > 1, total / tf.maximum(total - 1, 1e-300), 1)

    def update(old: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        return tf.where(moves, old * momentum + tf.cast(new, old.dtype) * (1 - momentum), old)

    return y, update(moving[0], mean), update(moving[1], variance)


def derivative_of_gradient(
    given: Mapping[str, tf.Tensor],
    cotangents: Sequence[tf.Tensor],
    mask: tf.Tensor | None,
    options: Options,
    merge: Merge | None = None,
) -> list[tf.Tensor | None]:
    """Vector-Jacobian product of the backward pass (given -> dx, dgamma, dbeta, dresidual), one cotangent for each.

    given: dy, x, and where present dmean, dvariance, gamma, beta and, for dresidual, y; the derivatives come in its
    order, that of y, which the gate is read off, as None.
    """
    upstream = [name for name in ("dy", "dmean", "dvariance") if name in given]
    arguments = {name: given[name] for name in PRIMAL if name in given}
    slopes = None
    if "y" in given:
        arguments["residual"], slopes = tf.zeros_like(given["x"]), gate(given["y"], options)
    primal = list(arguments.values())
    with tf.GradientTape() as outer:
        watched = {name: tensor for name, tensor in given.items() if name != "y"}
        outer.watch(list(watched.values()))
        with tf.GradientTape() as inner:
            inner.watch(primal)
            words = {"gamma": None, "beta": None, **arguments}
            y, mean, variance, _ = train(mask=mask, options=options, merge=merge, slopes=slopes, **words)
        outputs = {"dy": y, "dmean": mean, "dvariance": variance}
        gradients = inner.gradient(
            [outputs[name] for name in upstream], primal, output_gradients=[given[name] for name in upstream]
        )
    derivatives = outer.gradient(gradients, watched, output_gradients=list(cotangents), unconnected_gradients="zero")
    return [derivatives.get(name) for name in given]
