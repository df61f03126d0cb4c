"""Batch norm as pure functions over JAX arrays: train, infer, grad, moments; those of bnfast.functional, with results
where those write in place.

They can be traced: by jax.jit, jax.grad (to any order), jax.vmap, jax.checkpoint, jax.shard_map. Buffers are read and
written where XLA has them. Notation: M values per channel, invstd = 1/sqrt(variance + epsilon),
xhat = (x - mean)*invstd.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax

from .._arguments.axes import Axes
from .._arguments.checks import NAN_POLICIES, PIECEWISE_LINEAR, boolean, check_correction, choice, real
from . import calls
from .arguments import batch_options, like, mask_weights, operands, restore, tensor, vectors
from .options import Options
from .support import OWN_OPS

__all__ = ["GradResult", "TrainResult", "batch_norm_grad", "batch_norm_infer", "batch_norm_train", "moments"]

Array: TypeAlias = Any  # a jax.Array, a tracer of one, or what jnp.asarray accepts


class TrainResult(NamedTuple):
    """What `batch_norm_train` returns: a pytree.

    Attributes:
        y: the normalized array, in the shape and dtype of x.
        mean, variance: the batch mean and population variance, of shape (C,): float64 with x64 enabled, else float32.
        invstd: 1/sqrt(variance + epsilon), likewise; 0 where variance + epsilon is 0.
        moving_mean, moving_variance: the updated moving statistics in the dtype of the given ones; None without.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> result = bnfast.jax.batch_norm_train(jnp.array([[1.0], [5.0]]))
        >>> result.mean.tolist(), result.variance.tolist(), result.moving_mean
        ([3.0], [4.0], None)
    """

    y: Array
    mean: Array
    variance: Array
    invstd: Array
    moving_mean: Array | None
    moving_variance: Array | None


class GradResult(NamedTuple):
    """What `batch_norm_grad` returns: a pytree.

    Attributes:
        dx: in the shape and dtype of x.
        dgamma, dbeta: of shape (C,), even if gamma or beta was None.
        dresidual: in the shape and dtype of x; None without residual and y.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0], [5.0]])
        >>> result = bnfast.jax.batch_norm_train(x)
        >>> bnfast.jax.batch_norm_grad(jnp.ones((2, 1)), x, result.mean, result.invstd).dbeta.tolist()
        [2.0]
    """

    dx: Array
    dgamma: Array
    dbeta: Array
    dresidual: Array | None


def batch_norm_train(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    moving_mean: Array | None = None,
    moving_variance: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    mask: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Array | None = None,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> TrainResult:
    """Normalize x with the statistics of this batch, and return the updated moving statistics.

        y = activation(gamma * (x - mean)*invstd + beta + residual)
        moving = moving*momentum + batch*(1 - momentum)

    Args:
        x: array of rank >= 1, float32, float64 (with x64 enabled), float16 or bfloat16.
        gamma, beta: scale and offset of shape (C,), in any of these dtypes. None means ones and zeros.
        moving_mean, moving_variance: both or neither; of shape (C,), in any of these dtypes.
        axis: the channel axis, whose extent is C, or several: see bnfast.batch_norm_train.
        momentum: weight of the old moving value, a number in [0, 1]. PyTorch's momentum is 1 minus this.
        epsilon: added to the variance, a number >= 0.
        mask: weights >= 0 for the statistics, of the shape of x without the channel axes, or broadcastable to x with
            extent 1 on them. A constant to gradients.
        activation: None, "relu", "relu6", "leaky_relu" (with slope `negative_slope` below 0), "silu" (or "swish"),
            "hard_silu" (or "hard_swish"), "sigmoid", "hard_sigmoid", "tanh", "gelu" (with erf), "gelu_tanh", "elu"
            (alpha 1), "selu", "softplus" or "mish".
        residual: array with the shape and dtype of x, added before the activation.
        correction: 1 averages the sample variance in moving_variance, 0 the population variance. y is the same.
        nan_policy: if the statistics of a channel are not finite, "propagate" updates its moving statistics with
            them, "skip_update" leaves those unchanged, "raise" is an error of XLA when the call runs.

    Returns:
        TrainResult(y, mean, variance, invstd, moving_mean, moving_variance), all differentiable with respect to x,
        gamma, beta, residual and the moving statistics. The bits of y are those of bnfast.batch_norm_train.

    Raises:
        ValueError, TypeError: an argument is wrong.
        jax.errors.JaxRuntimeError: the mask holds a negative or non-finite weight, or nan_policy="raise" raised.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> result = bnfast.jax.batch_norm_train(x, None, None, jnp.zeros(2), jnp.ones(2), momentum=0.5)
        >>> result.y.round(2)
        Array([[-1., -1.],
               [ 1.,  1.]], dtype=float32)
        >>> result.moving_mean
        Array([ 1., 10.], dtype=float32)

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    parameters = vectors(axes, gamma=gamma, beta=beta)
    if (moving_mean is None) != (moving_variance is None):
        one = "moving_mean" if moving_variance is None else "moving_variance"
        raise ValueError(f"moving_mean and moving_variance must be given together. Received: {one} alone")
    moving = vectors(axes, moving_mean=moving_mean, moving_variance=moving_variance)
    weights = mask_weights(mask, x, axes)
    residual = like("residual", residual, x)
    options = batch_options(
        x,
        axes,
        activation,
        negative_slope,
        momentum=real("momentum", momentum, 1.0),
        epsilon=real("epsilon", epsilon),
        correction=check_correction(correction),
        nan_policy=choice("nan_policy", nan_policy, NAN_POLICIES),
    )
    if nan_policy == "raise" and options.way == OWN_OPS:
        raise ValueError('nan_policy must be "propagate" or "skip_update" where JAX\'s own ops run. Received: "raise"')
    given = parameters | moving | weights | {"x": x} | ({} if residual is None else {"residual": residual})
    result: TrainResult = _train(options, axes, given)
    return result


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _train(options: Options, axes: Axes, given: dict[str, Array]) -> TrainResult:
    y, statistics, *moving = calls.train(options, operands(axes, given))
    if moving:
        old = (given["moving_mean"], given["moving_variance"])
        moving = [new.astype(one.dtype) for new, one in zip(moving, old, strict=True)]
    vectors = [*statistics, *(moving or (None, None))]
    return TrainResult(restore(axes, y), *(one if one is None else one.reshape(axes.shape) for one in vectors))


def batch_norm_infer(
    x: Array,
    moving_mean: Array,
    moving_variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Array | None = None,
) -> Array:
    """Normalize x with given statistics.

        y = activation(gamma * (x - moving_mean)/sqrt(moving_variance + epsilon) + beta + residual)

    Args:
        moving_mean, moving_variance: of shape (C,).
        x, gamma, beta, axis, epsilon, activation, negative_slope, residual: as in `batch_norm_train`.

    Returns:
        y in the shape and dtype of x, differentiable with respect to all arrays.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> x, mean, variance = jnp.array([[1.0, 10.0], [3.0, 30.0]]), jnp.array([2.0, 20.0]), jnp.array([1.0, 100.0])
        >>> bnfast.jax.batch_norm_infer(x, mean, variance, activation="relu", epsilon=0.0)
        Array([[0., 0.],
               [1., 1.]], dtype=float32)

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    moving = vectors(axes, required=True, moving_mean=moving_mean, moving_variance=moving_variance)
    parameters = vectors(axes, gamma=gamma, beta=beta)
    residual = like("residual", residual, x)
    options = batch_options(x, axes, activation, negative_slope, epsilon=real("epsilon", epsilon), training=False)
    given = moving | parameters | {"x": x} | ({} if residual is None else {"residual": residual})
    return _infer(options, axes, given)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _infer(options: Options, axes: Axes, given: dict[str, Array]) -> Array:
    return restore(axes, calls.infer(options, operands(axes, given)))


def batch_norm_grad(
    dy: Array,
    x: Array,
    mean: Array,
    invstd: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    mask: Array | None = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Array | None = None,
    y: Array | None = None,
    training: bool = True,
    dmean: Array | None = None,
    dvariance: Array | None = None,
) -> GradResult:
    """Gradients of a loss with respect to x, gamma, beta and residual, from dy, its gradient with respect to y.

        dz = dy * activation'(z), where z is recomputed from x with the operations of the forward pass
        dbeta = sum dz;  dgamma = sum dz*xhat
        training: dx = gamma*invstd*(dz - (w/W)*(dbeta + xhat*dgamma)) + (w/W)*(dmean + dvariance*2*(x - mean)),
                  where w/W = 1/M without a mask
        frozen (training=False: mean and invstd are constants): dx = gamma*invstd*dz

    For a backward pass of one's own: jax.grad of `batch_norm_train` needs no such call, and keeps the statistics in
    float64 even where JAX has only float32. The derivatives of this function take mean and invstd as arguments of
    their own, not as functions of x.

    Args:
        dy, x: arrays of equal shape and dtype; x as in the forward call.
        mean, invstd: of shape (C,), as returned by `batch_norm_train`.
        gamma, beta, axis, mask, activation, negative_slope, residual: as in the forward call.
        y: the forward call's result, instead of residual, for "relu", "relu6" and "leaky_relu".
        training: True if mean and invstd are those of this batch, False if they are constants.
        dmean, dvariance: of shape (C,), both or neither: gradients of the loss with respect to the batch's mean and
            variance. Ignored with training=False.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual).

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> x, dy = jnp.array([[1.0], [3.0]]), jnp.array([[4.0], [2.0]])
        >>> result = bnfast.jax.batch_norm_train(x, epsilon=0.0)
        >>> bnfast.jax.batch_norm_grad(dy, x, result.mean, result.invstd).dgamma
        Array([-2.], dtype=float32)

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    tensors = {"dy": like("dy", tensor("dy", dy), x), "x": x, "residual": like("residual", residual, x)}
    tensors["y"] = like("y", y, x)
    if residual is not None and y is not None:
        raise ValueError("y must be None if residual is given, as y replaces it. Received: both")
    options = batch_options(x, axes, activation, negative_slope, training=boolean("training", training))
    if y is not None and options.activation not in PIECEWISE_LINEAR:
        raise ValueError(
            f"y must be None with activation={activation!r}, whose gradient needs the residual in its place. "
            f"Received: an array"
        )
    if (dmean is None) != (dvariance is None):
        one = "dmean" if dvariance is None else "dvariance"
        raise ValueError(f"dmean and dvariance must be given together. Received: {one} alone")
    given = {name: one for name, one in tensors.items() if one is not None}
    has_residual = "residual" in given or "y" in given
    if options.activation is None:
        given = {name: one for name, one in given.items() if name not in ("residual", "y")}
    given |= vectors(axes, required=True, mean=mean, invstd=invstd) | vectors(axes, gamma=gamma, beta=beta)
    if training:
        given |= vectors(axes, dmean=dmean, dvariance=dvariance) | mask_weights(mask, x, axes)
    found: GradResult = _grad(options, axes, given)
    return found._replace(dresidual=given["dy"]) if has_residual and found.dresidual is None else found


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _grad(options: Options, axes: Axes, given: dict[str, Array]) -> GradResult:
    dx, dgamma, dbeta, *dresidual = calls.gradient(options, operands(axes, given))

    def in_its_dtype(name: str, vector: Array) -> Array:
        return vector.reshape(axes.shape).astype(given[name].dtype if name in given else vector.dtype)

    last = restore(axes, dresidual[0]) if dresidual else None
    return GradResult(restore(axes, dx), in_its_dtype("gamma", dgamma), in_its_dtype("beta", dbeta), last)


def moments(x: Array, *, axis: int | Sequence[int] = -1, mask: Array | None = None) -> tuple[Array, Array]:
    """(mean, variance) of each channel of x: the population variance; (C,), float64 with x64 enabled, else float32.

        mean = sum(w*x)/W;  variance = sum(w*(x - mean)^2)/W;  W = sum w, without a mask w = 1

    Args:
        x, axis, mask: as in `batch_norm_train`.

    Returns:
        (mean, variance), both zero for an empty or fully masked batch. They pass no gradient on.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast.jax
        >>> import jax.numpy as jnp
        >>> bnfast.jax.moments(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        (Array([ 2., 20.], dtype=float32), Array([  1., 100.], dtype=float32))

    Source: the mean and variance of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    options = batch_options(x, axes, None, 0.2)
    result: tuple[Array, Array] = _moments(options, axes, {"x": x} | mask_weights(mask, x, axes))
    return result


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _moments(options: Options, axes: Axes, given: dict[str, Array]) -> tuple[Array, Array]:
    mean, variance = calls.moments(options, operands(axes, given))
    return mean.reshape(axes.shape), variance.reshape(axes.shape)
