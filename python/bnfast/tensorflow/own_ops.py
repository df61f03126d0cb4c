"""The bridge "tensorflow": batch norm in TensorFlow's own ops, where a GPU is and bnfast's op is not.

    train, train_step, moments, gradient   as in `ops`, which documents them

bnfast's op and callback run on the CPU, so on a machine whose tensors live on a GPU every call would copy x, y, dy and
dx over the bus. These functions run wherever TensorFlow places them, and XLA compiles them. A training step takes
TensorFlow's fused op where that fits (`_fits`), else the formula of `reference`. First and higher derivatives are
TensorFlow's own. The invariants of the kernels (same bits, 1e-6 at large offsets) don't hold here.
"""

from __future__ import annotations

import math

import tensorflow as tf

from . import reference
from .batch import Batch, GradientInputs, Options, compute_dtype, per_channel
from .scalars import Scalar

LEAST_EPSILON = 1.001e-5  # cuDNN refuses less; tf.compat.v1.nn.fused_batch_norm silently raises it to this


def train(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, mask: tf.Tensor | None, options: Options
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train`, by the formula: the fused op passes no gradient through its mean and variance."""
    x = tf.convert_to_tensor(x)
    y, mean, variance, _ = reference.train(x, gamma, beta, mask, options)
    return y, tf.cast(mean, compute_dtype(x)), tf.cast(variance, compute_dtype(x))


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: Scalar,
    options: Options,
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train_step`."""
    batch = batch._replace(x=tf.convert_to_tensor(batch.x))
    if not _fits(batch, options):
        return reference.train_step(batch, moving, momentum, options, correction=correction, nan_policy=nan_policy)
    y, *statistics = _fused(batch, options)
    moved = reference.update(
        moving, *map(tf.stop_gradient, statistics), momentum=momentum, correction=correction, nan_policy=nan_policy
    )
    return (y, *moved)


def moments(x: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    """`ops.moments`."""
    mean, variance, _ = reference.moments(tf.cast(tf.stop_gradient(x), compute_dtype(x)), mask, options)
    return tf.cast(tf.reshape(mean, [-1]), tf.float64), tf.cast(tf.reshape(variance, [-1]), tf.float64)


def gradient(inputs: GradientInputs, options: Options) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """`ops.gradient`.

    dx = gamma*invstd*(g - w/W*(sum(g) + xhat*sum(g*xhat))) + w/W*(dmean + 2*(x - mean)*dvariance), g = dy*activation'
    """
    dtype = compute_dtype(inputs.x)
    mean, invstd, gamma, beta, dmean, dvariance = (
        per_channel(vector, inputs.x, options.axis) for vector in inputs[2:8]
    )
    centered = tf.cast(inputs.x, dtype) - mean
    xhat = centered * invstd
    g = _before_activation(inputs, xhat * gamma + beta, options)
    axes = [i for i in range(inputs.x.shape.rank) if i != options.axis % inputs.x.shape.rank]
    dbeta, dgamma = (tf.reduce_sum(terms, axes, keepdims=True) for terms in (g, g * xhat))
    weights = tf.ones_like(g) if inputs.mask is None else tf.broadcast_to(tf.cast(inputs.mask, dtype), tf.shape(g))
    share = tf.math.divide_no_nan(weights, tf.reduce_sum(weights, axes, keepdims=True))
    through_statistics = dmean - gamma * invstd * dbeta + (2 * dvariance * centered - gamma * invstd * xhat * dgamma)
    dx = gamma * invstd * g + tf.where(weights > 0, share * through_statistics, 0)
    dgamma, dbeta = (tf.cast(tf.reshape(vector, [-1]), tf.float64) for vector in (dgamma, dbeta))
    return tf.cast(dx, inputs.x.dtype), dgamma, dbeta, None if inputs.y is None else tf.cast(g, inputs.x.dtype)


def _before_activation(inputs: GradientInputs, z: tf.Tensor, options: Options) -> tf.Tensor:
    """The gradient of the pre-activation, in the compute dtype. z: that without the residual."""
    dy = tf.cast(inputs.dy, z.dtype)
    if options.activation is None:
        return dy
    if options.activation in reference.SMOOTH:
        z = z if inputs.y is None else z + tf.cast(inputs.y, z.dtype)
        return reference.before_activation(dy, z, z, options)
    y = reference.activate(z, options) if inputs.y is None else tf.cast(inputs.y, z.dtype)
    return dy * reference.slope_at(y, options)


def _fits(batch: Batch, options: Options) -> bool:
    """Whether TensorFlow's fused op computes this step. M > 1 must be known: the op's variance is that of the sample,
    and cuDNN takes no single value."""
    x, epsilon = batch.x, options.epsilon
    if x.shape.rank != 4 or options.axis % 4 not in (1, 3) or batch.mask is not None or x.dtype == tf.float64:
        return False
    if tf.is_tensor(epsilon) or epsilon < LEAST_EPSILON:
        return False
    reduced = [extent for i, extent in enumerate(x.shape) if i != options.axis % 4]
    known: int = math.prod(extent for extent in reduced if extent is not None)
    return known > 1


def _fused(batch: Batch, options: Options) -> tuple[tf.Tensor, ...]:
    """y, and mean, variance (population) and M as float64 vectors of shape (C,)."""
    x, axis = batch.x, options.axis % 4
    channels = tf.shape(x)[axis : axis + 1]
    scale = tf.ones(channels) if batch.gamma is None else tf.cast(batch.gamma, tf.float32)
    offset = tf.zeros(channels) if batch.beta is None else tf.cast(batch.beta, tf.float32)
    result = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=scale,
        offset=offset,
        mean=[],
        variance=[],
        epsilon=options.epsilon,
        exponential_avg_factor=1.0,
        data_format="NHWC" if axis == 3 else "NCHW",
        is_training=True,
    )
    y = result.y if batch.residual is None else result.y + batch.residual
    mean, sample = (tf.cast(statistic, tf.float64) for statistic in (result.batch_mean, result.batch_variance))
    shape = tf.cast(tf.shape(x), tf.float64)
    count = tf.reduce_prod(shape) / tf.maximum(shape[axis], 1)
    variance = sample * ((count - 1) / tf.maximum(count, 1))
    return reference.activate(y, options), mean, variance, tf.fill(tf.shape(mean), count)
