"""Batch normalization in training mode as TensorFlow's own ops: slow, and differentiable to any order.

    mean = sum(w*x)/W, variance = sum(w*(x - mean)^2)/W, W = sum(w)
    y = activation(gamma*(x - mean)*invstd + beta + residual)
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

It serves three purposes: the derivative of the kernels' backward pass (`derivative_of_gradient`), masks that differ
between channels, which the kernels don't accept (`train_step`), and machines with a GPU (`own_ops`). It computes in
float32, or in float64 for float64 x.
W = 0 gives mean = variance = 0. Unlike tf.nn.moments, it lets the gradient flow through the mean inside the variance:
without that term the first derivative is right and the second is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from . import folding, scalars
from .batch import PRIMALS, Batch, Options, compute_dtype, per_channel
from .pullback import pullback
from .scalars import Scalar


def softplus(z: tf.Tensor) -> tf.Tensor:
    """log(1 + e^z), in a form that TensorFlow can run where z is the sum of a folded convolution and a residual."""
    special = folding.softplus(z)
    return tf.math.softplus(z) if special is None else special


# The smooth activations by name, as Keras defines them. The gradient needs z: y alone doesn't tell it.
SMOOTH: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "silu": lambda z: z * tf.sigmoid(z),
    "hard_silu": lambda z: z * (tf.nn.relu6(z + 3) / 6),
    "sigmoid": tf.sigmoid,
    "hard_sigmoid": lambda z: tf.nn.relu6(z + 3) / 6,
    "tanh": tf.tanh,
    "gelu": lambda z: tf.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: tf.nn.gelu(z, approximate=True),
    "elu": tf.nn.elu,
    "selu": tf.nn.selu,
    "softplus": tf.math.softplus,
    "mish": lambda z: z * tf.tanh(softplus(z)),
}

Merge = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]


def add_affine(
    xhat: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, residual: tf.Tensor | None, axis: int
) -> tf.Tensor:
    """gamma*xhat + beta + residual in the dtype of xhat, which is a compute dtype; absent ones are None."""
    y = xhat if gamma is None else xhat * per_channel(gamma, xhat, axis)
    y = y if beta is None else y + per_channel(beta, xhat, axis)
    return y if residual is None else y + tf.cast(residual, y.dtype)


def activate(y: tf.Tensor, options: Options) -> tf.Tensor:
    """The fused activation as a TensorFlow op."""
    if options.activation is None:
        return y
    if options.activation == "leaky_relu":
        if y.dtype == tf.float64:  # TensorFlow's op stores the slope in float32: 0.2 would be off by 3e-9
            return tf.where(y > 0, y, y * options.negative_slope)
        return tf.nn.leaky_relu(y, options.negative_slope)
    return {"relu": tf.nn.relu, "relu6": tf.nn.relu6, **SMOOTH}[options.activation](y)


def kept_for_gradient(primals: Mapping[str, tf.Tensor], y: tf.Tensor, options: Options) -> dict[str, tf.Tensor]:
    """The tensors of a forward pass that its gradient needs: the primals without the residual.

    With a residual and a relu, the gradient reads y in place of the residual. The next layer keeps y anyway. With a
    smooth activation it reads the residual. Without an activation dresidual is dy, and neither is needed.
    """
    if options.activation in SMOOTH:
        return dict(primals)
    kept = {name: tensor for name, tensor in primals.items() if name != "residual"}
    if options.activation is not None and "residual" in primals:
        kept["y"] = tf.stop_gradient(y)
    return kept


def before_activation(dout: tf.Tensor, z: tf.Tensor, out: tf.Tensor, options: Options) -> tf.Tensor:
    """The gradient of z, from that of out = activation(z); z is read only if the activation is smooth."""
    wide = tf.cast(dout, compute_dtype(out))
    if options.activation in SMOOTH:
        (dz,) = pullback(lambda z: [activate(z, options)], [tf.cast(z, wide.dtype)], [wide])
        return tf.cast(dz, out.dtype)
    return tf.cast(wide * slope_at(out, options), out.dtype)


def slope_at(y: tf.Tensor, options: Options) -> tf.Tensor:
    """activation'(z) of a relu, from y = activation(z), in the compute dtype. As in the kernels, NaN passes."""
    one = tf.ones((), compute_dtype(y))
    if options.activation == "leaky_relu":
        return tf.where(y > 0, one, one * options.negative_slope)
    closed = (y <= 0) | (y >= 6) if options.activation == "relu6" else y <= 0
    return tf.where(closed, 0 * one, one)


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
    """y in the dtype of x, and mean, variance and W as float64 of shape (C,).

    Args:
        mask: any tensor that broadcasts to x, the channel axis included.
        merge: a differentiable function applied to mean, variance and W (float64) before they are used, or None.
        slopes: factors that multiply z in place of the activation, or None.
    """
    values = tf.cast(x, compute_dtype(x))
    mean, variance, total = moments(values, mask, options)
    if merge is not None:
        own = (tf.cast(tf.reshape(t, [-1]), tf.float64) for t in (mean, variance, total))
        mean, variance, total = (per_channel(t, x, options.axis) for t in merge(*own))
    shifted = variance + scalars.like(options.epsilon, variance)
    invstd = tf.where(shifted > 0, tf.math.rsqrt(tf.where(shifted > 0, shifted, 1)), 0)
    y = add_affine((values - mean) * invstd, gamma, beta, residual, options.axis)
    mean, variance, total = (tf.cast(tf.reshape(t, [-1]), tf.float64) for t in (mean, variance, total))
    y = activate(y, options) if slopes is None else y * slopes
    return tf.cast(y, x.dtype), mean, variance, total


def moments(values: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """mean, variance and W with the rank of `values`, which have a compute dtype; the mask as in `train`.

    Not of x: its gradient would arrive in two parts and be added in a half type.
    """
    rank = values.shape.rank
    axes = [i for i in range(rank) if i != options.axis % rank]
    weights = tf.ones_like(values) if mask is None else tf.broadcast_to(tf.cast(mask, values.dtype), tf.shape(values))
    total = tf.reduce_sum(weights, axes, keepdims=True)
    present = weights > 0  # masked values must not reach the sums: 0*NaN is NaN
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.where(present, values, 0), axes, keepdims=True), total)
    deviation = tf.where(present, values - mean, 0)
    variance = tf.math.divide_no_nan(tf.reduce_sum(weights * deviation**2, axes, keepdims=True), total)
    return mean, variance, total


def infer(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tf.Tensor:
    """y in inference mode, in the dtype of x; the mask is ignored."""
    x = tf.cast(batch.x, compute_dtype(batch.x))
    mean, variance = (per_channel(statistic, x, options.axis) for statistic in moving)
    xhat = (x - mean) * tf.math.rsqrt(variance + scalars.like(options.epsilon, x))
    y = add_affine(xhat, batch.gamma, batch.beta, batch.residual, options.axis)
    return tf.cast(activate(y, options), batch.x.dtype)


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: Scalar,
    options: Options,
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train_step` for any mask that broadcasts to x. Channels with W = 0 keep their moving statistics."""
    y, mean, variance, total = train(batch.x, batch.gamma, batch.beta, batch.mask, options, batch.residual)
    moved = update(moving, mean, variance, total, momentum=momentum, correction=correction, nan_policy=nan_policy)
    return (y, *moved)


def update(
    moving: tuple[tf.Tensor, tf.Tensor],
    mean: tf.Tensor,
    variance: tf.Tensor,
    total: tf.Tensor,
    *,
    momentum: Scalar,
    correction: int,
    nan_policy: str,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The moving statistics after a batch with these statistics, as in `ops.train_step`."""
    valid = total > 0
    if nan_policy == "skip_update":
        valid &= tf.math.is_finite(mean) & tf.math.is_finite(variance)
    if correction:
        variance *= tf.where(total > 1, total / tf.maximum(total - 1, 1e-300), 1)

    def one(old: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
        weight = scalars.like(momentum, old)
        return tf.where(valid, old * weight + tf.cast(new, old.dtype) * (1 - weight), old)

    return one(moving[0], mean), one(moving[1], variance)


def derivative_of_gradient(
    given: Mapping[str, tf.Tensor],
    cotangents: Sequence[tf.Tensor],
    mask: tf.Tensor | None,
    options: Options,
    merge: Merge | None = None,
) -> list[tf.Tensor | None]:
    """The vector-Jacobian product of the backward pass, which maps `given` to (dx, dgamma, dbeta, dresidual).

    Args:
        given: dy and x and, where present, dmean, dvariance, gamma, beta and (if dresidual is asked for) y, or the
            residual, as in `kept_for_gradient`.
        cotangents: one for each output of the backward pass.

    Returns:
        One derivative for each entry of `given`, in its order; None for y, which only selects the slopes.
    """
    upstream = [name for name in ("dy", "dmean", "dvariance") if name in given]
    arguments = {name: given[name] for name in PRIMALS if name in given}
    slopes = None
    if "y" in given:
        arguments["residual"], slopes = tf.zeros_like(given["x"]), slope_at(given["y"], options)

    def forward(*primals: tf.Tensor) -> list[tf.Tensor]:
        kwargs = {"gamma": None, "beta": None, **dict(zip(arguments, primals, strict=True))}
        y, mean, variance, _ = train(mask=mask, options=options, merge=merge, slopes=slopes, **kwargs)
        outputs = {"dy": y, "dmean": mean, "dvariance": variance}
        return [outputs[name] for name in upstream]

    def backward(*values: tf.Tensor) -> list[tf.Tensor]:
        tensors = {**arguments, **dict(zip(watched, values, strict=True))}
        gradients = pullback(forward, [tensors[name] for name in arguments], [tensors[name] for name in upstream])
        if any(gradient is None for gradient in gradients):  # TensorFlow has stopped all tapes, this one, too
            raise NotImplementedError(
                "forward-mode differentiation (tf.autodiff.ForwardAccumulator) needs bnfast's TensorFlow op, and this "
                'call goes through numpy_function: bridge="op", or leave BNFAST_BRIDGE unset'
            )
        return gradients

    watched = [name for name in given if name != "y"]
    derivatives = dict(zip(watched, pullback(backward, [given[name] for name in watched], cotangents), strict=True))
    return [
        tf.zeros_like(given[name]) if name in derivatives and derivatives[name] is None else derivatives.get(name)
        for name in given
    ]
