"""Batch norm in Keras's own ops, for what no kernel of bnfast's takes; differentiable to any order.

    mean = sum(w*x)/W, variance = sum(w*(x - mean)^2)/W, W = sum(w)
    y = activation(gamma*(x - mean)*invstd + beta + residual)
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

It computes in float32, or in float64 for float64 x. W = 0 gives mean = variance = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from .batch import Batch, Options, compute_dtype, constant, divide, dtype_of, per_channel

_mish: Any = getattr(keras.activations, "mish", None)  # Keras 3.8 and later

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": ops.relu,
    "relu6": ops.relu6,
    "silu": ops.silu,
    "hard_silu": ops.hard_silu,
    "sigmoid": ops.sigmoid,
    "hard_sigmoid": ops.hard_sigmoid,
    "tanh": ops.tanh,
    "gelu": lambda z: ops.gelu(z, approximate=False),
    "gelu_tanh": lambda z: ops.gelu(z, approximate=True),
    "elu": ops.elu,
    "selu": ops.selu,
    "softplus": ops.softplus,
    "mish": _mish or (lambda z: z * ops.tanh(ops.softplus(z))),
}


SMOOTH = tuple(name for name in ACTIVATIONS if name not in ("relu", "relu6"))


def add_affine(xhat: Any, gamma: Any, beta: Any, residual: Any, axis: int) -> Any:
    """gamma*xhat + beta + residual in the dtype of xhat, which is a compute dtype; absent ones are None."""
    y = xhat if gamma is None else xhat * per_channel(gamma, xhat, axis)
    y = y if beta is None else y + per_channel(beta, xhat, axis)
    return y if residual is None else y + ops.cast(residual, dtype_of(y))


def activate(z: Any, options: Options) -> Any:
    """The fused activation as an op of Keras's."""
    if options.activation is None:
        return z
    if options.activation == "leaky_relu":
        return ops.where(z > 0, z, z * options.negative_slope)
    return ACTIVATIONS[options.activation](z)


def train(batch: Batch, options: Options) -> tuple[Any, Any, Any, Any]:
    """y in the dtype of x, and mean, variance and W of shape (C,) in the compute dtype.

    The mask is any tensor that broadcasts to x, the channel axis included.
    """
    values = ops.cast(batch.x, compute_dtype(batch.x))
    mean, variance, total = _moments(values, batch.mask, options)
    shifted = variance + ops.cast(options.epsilon, dtype_of(variance))
    positive = shifted > 0
    invstd = ops.where(positive, ops.rsqrt(ops.where(positive, shifted, 1)), 0)
    y = add_affine((values - mean) * invstd, batch.gamma, batch.beta, batch.residual, options.axis)
    mean, variance, total = (ops.reshape(t, (-1,)) for t in (mean, variance, total))
    return ops.cast(activate(y, options), dtype_of(batch.x)), mean, variance, total


def train_step(
    batch: Batch,
    moving: tuple[Any, Any],
    momentum: Any,
    options: Options,
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[Any, Any, Any]:
    """`kernels.train_step` for any mask that broadcasts to x. Channels with W = 0 keep their moving statistics."""
    y, mean, variance, total = train(batch, options)
    mean, variance, total = map(constant, (mean, variance, total))
    valid = total > 0
    if nan_policy == "skip_update":
        valid = valid & ops.isfinite(mean) & ops.isfinite(variance)
    if correction:
        variance = variance * ops.where(total > 1, total / ops.where(total > 1, total - 1, 1), 1)

    moved = average(moving, (mean, variance), momentum)
    return y, *(ops.where(valid, new, old) for new, old in zip(moved, moving, strict=True))


def average(moving: Sequence[Any], statistics: Sequence[Any], momentum: Any) -> tuple[Any, ...]:
    """moving*momentum + statistics*(1 - momentum), in the dtype of the moving ones."""

    def one(old: Any, new: Any) -> Any:
        name = dtype_of(old)
        weight = ops.cast(momentum, name)
        return old * weight + ops.cast(new, name) * (1 - weight)

    return tuple(map(one, moving, statistics))


def moments(x: Any, mask: Any, options: Options) -> tuple[Any, Any, Any]:
    """mean, variance and W of shape (C,) in the compute dtype; they pass no gradient on."""
    values = ops.cast(constant(x), compute_dtype(x))
    mean, variance, total = (ops.reshape(t, (-1,)) for t in _moments(values, mask, options))
    return mean, variance, total


def infer(batch: Batch, moving: tuple[Any, Any], options: Options) -> Any:
    """y in inference mode, in the dtype of x; the mask is ignored."""
    x = ops.cast(batch.x, compute_dtype(batch.x))
    mean, variance = (per_channel(statistic, x, options.axis) for statistic in moving)
    xhat = (x - mean) * ops.rsqrt(variance + ops.cast(options.epsilon, dtype_of(x)))
    y = add_affine(xhat, batch.gamma, batch.beta, batch.residual, options.axis)
    return ops.cast(activate(y, options), dtype_of(batch.x))


def _moments(values: Any, mask: Any, options: Options) -> tuple[Any, Any, Any]:
    """mean, variance and W with the rank of `values`, which have a compute dtype."""
    rank = len(values.shape)
    axes = [i for i in range(rank) if i != options.axis % rank]
    weights = ops.ones_like(values) if mask is None else _broadcast(ops.cast(mask, dtype_of(values)), values)
    total = ops.sum(weights, axes, keepdims=True)
    present = weights > 0  # masked values must not reach the sums: 0*NaN is NaN
    mean = divide(ops.sum(weights * ops.where(present, values, 0), axes, keepdims=True), total)
    deviation = ops.where(present, values - mean, 0)
    variance = divide(ops.sum(weights * ops.square(deviation), axes, keepdims=True), total)
    return mean, variance, total


def _broadcast(mask: Any, values: Any) -> Any:
    return ops.broadcast_to(mask, tuple(values.shape))
