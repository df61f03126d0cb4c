"""Double backward: gradients through batch_norm_grad, for losses that contain a gradient (penalties, Hessian products).

Each pass over x is an existing kernel call: the gradient with respect to dy is an affine function of xhat plus a
residual (batch_norm_infer), the gradient with respect to x is batch_norm_grad of another dy. float16 and bfloat16 are
computed in float32. No input is written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .._arguments import checks
from .._arguments.array_checks import grad_vectors, like, mask_weights, tensor
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from .batch_norm import batch_norm_grad, batch_norm_infer

__all__ = ["GradGradResult", "batch_norm_grad_grad"]


class GradGradResult(NamedTuple):
    """What `batch_norm_grad_grad` returns.

    Attributes:
        ddy, dx: gradients with respect to dy and x, in the shape and dtype of x.
        dgamma: of shape (C,), even if gamma was None; in the dtype of gamma, else float64 for float64 x and float32
            otherwise.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, ones = np.array([[1.0], [3.0]]), np.ones((2, 1))
        >>> _, mean, _, invstd = bnfast.batch_norm_train(x, epsilon=0.0)
        >>> result = bnfast.batch_norm_grad_grad(ones, ones, x, mean, invstd, training=False)
        >>> result.ddy
        array([[1.],
               [1.]])
        >>> result.dgamma
        array([2.])
    """

    ddy: Array
    dx: Array
    dgamma: Array


def batch_norm_grad_grad(
    ddx: Any,
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    ddgamma: Any = None,
    ddbeta: Any = None,
    ddresidual: Any = None,
    axis: int | tuple[int, ...] | list[int] = -1,
    mask: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    training: bool = True,
) -> GradGradResult:
    """Gradients of a loss with respect to dy, x and gamma, through the results of `batch_norm_grad`.

    With u = ddx, dz = dy*activation'(z), s = invstd, p = w/W (1/M without a mask) and the sums per channel
    B = sum dz, G = sum dz*xhat, U = sum p*u, V = sum p*u*xhat:

        ddy = activation'(z) * (gamma*s*(u - U - xhat*V) + ddgamma*xhat + ddbeta + ddresidual)
        dgamma = s*(sum u*dz - B*U - G*V), which is sum u*dx with the dx of batch_norm_grad for gamma = 1
        t = (ddgamma - gamma*s*V)*dz - gamma*s*G*p*u, the gradient with respect to xhat
        dx = s*(t - p*(sum t + xhat*(sum t*xhat + gamma*dgamma)))
        frozen (training=False: mean and invstd are constants): U = V = 0;  dgamma = s*sum u*dz;  dx = s*ddgamma*dz

    The activation must be piecewise linear: None, "relu", "relu6" or "leaky_relu". Its second derivative at the kinks
    counts as 0. In training, mean and invstd
    are treated as functions of x.

    Args:
        ddx: gradient of the loss with respect to batch_norm_grad's dx: an array with the shape and dtype of x.
        dy, x, mean, invstd, gamma, beta, axis, mask, activation, negative_slope, residual, training: as in the call of
            `batch_norm_grad`. Calls with dmean or dvariance are not supported.
        ddgamma, ddbeta: gradients with respect to its dgamma and dbeta, float32 or float64 of shape (C,). None means
            zeros.
        ddresidual: gradient with respect to its dresidual, with the shape and dtype of x. None means zeros.

    Returns:
        GradGradResult(ddy, dx, dgamma). The gradients with respect to beta and residual are 0.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed. Non-finite values are not an error.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> x, dy = np.array([[1.0], [2.0], [4.0]]), np.array([[1.0], [0.0], [0.0]])
        >>> _, mean, _, invstd = bnfast.batch_norm_train(x)
        >>> dx = bnfast.batch_norm_grad(dy, x, mean, invstd).dx
        >>> ddy, _, _ = bnfast.batch_norm_grad_grad(2 * dx, dy, x, mean, invstd)  # of the loss (dx**2).sum()
        >>> ddy.round(3)
        array([[ 0.367],
               [-0.551],
               [ 0.184]])

    Source: the chain rule on the formulas of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    vectors = grad_vectors(axes, mean, invstd, gamma=gamma, beta=beta, ddgamma=ddgamma, ddbeta=ddbeta)
    if residual is None and ddresidual is not None:
        raise ValueError(f"ddresidual must be None without a residual. Received: {type(ddresidual).__name__}")
    tensors: dict[str, Any] = {"ddx": tensor("ddx", ddx), "dy": tensor("dy", dy)}
    tensors |= {"residual": residual, "ddresidual": ddresidual}
    tensors = {name: like(name, value, "x", x) for name, value in tensors.items()}
    weights = mask_weights(mask, x, axes)
    activation = checks.activation(activation)
    if activation not in checks.PIECEWISE_LINEAR:
        raise ValueError(
            f"activation must be one of {checks.PIECEWISE_LINEAR}, whose second derivative is 0. "
            f"Received: {activation!r}"
        )
    negative_slope = checks.real("negative_slope", negative_slope)
    training = checks.boolean("training", training)

    merged = {name: axes.merge(array) for name, array in tensors.items()}
    merged_x = axes.merge(x)
    assert merged_x is not None
    flat = {name: axes.flatten(array) for name, array in vectors.items()}
    times_slope = _ActivationSlope(merged_x, flat, axes.merged_axis, activation, negative_slope, merged["residual"])
    ddz, dx, dgamma = _double_backward(
        _at_least_float32(merged["ddx"]),
        _at_least_float32(times_slope(merged["dy"])),
        _at_least_float32(merged_x),
        flat,
        _at_least_float32(merged["ddresidual"]),
        axes.merged_axis,
        None if weights is None else weights.reshape(axes.other_shape),
        training,
    )
    parameter = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    dtype = parameter if vectors["gamma"] is None else vectors["gamma"].dtype
    with np.errstate(over="ignore"):
        ddy = times_slope(ddz.astype(x.dtype, copy=False))
        result = ddy, dx.astype(x.dtype, copy=False), dgamma.astype(dtype, copy=False)
    return GradGradResult(*axes.restore(result))


class _ActivationSlope(NamedTuple):
    """Multiplies an array by activation'(z): the dresidual of batch_norm_grad, with the z of the forward pass."""

    x: Array
    vectors: dict[str, Array | None]
    axis: int
    activation: str | None
    negative_slope: float
    residual: Array | None

    def __call__(self, dz: Any) -> Array:
        if self.activation is None:
            return np.asarray(dz)
        result = batch_norm_grad(
            dz,
            self.x,
            self.vectors["mean"],
            self.vectors["invstd"],
            self.vectors["gamma"],
            self.vectors["beta"],
            axis=self.axis,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=np.zeros_like(self.x) if self.residual is None else self.residual,
            training=False,
        )
        assert result.dresidual is not None
        return result.dresidual


def _double_backward(
    ddx: Any, dz: Any, x: Any, vectors: dict[str, Array | None], ddz: Any, axis: int, mask: Array | None, training: bool
) -> tuple[Array, Array, Array]:
    """Gradients with respect to dz, x and gamma; all arrays float32 or all float64, one channel axis."""
    channels = x.shape[axis]
    ones = np.ones(channels)

    def vector64(name: str, default: float = 0.0) -> Array:
        value = vectors[name]
        return np.full(channels, default) if value is None else value.astype(np.float64)

    def per_channel(factor: Array, array: Array) -> Array:
        product: Array = factor.astype(array.dtype).reshape(-1, *(1,) * (array.ndim - axis - 1)) * array
        return product

    mean, invstd, gamma, ddgamma = vector64("mean"), vector64("invstd"), vector64("gamma", 1.0), vector64("ddgamma")
    kwargs: dict[str, Any] = {"axis": axis, "training": training, "mask": mask}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        unit_dx, sum_dz_xhat, *_ = batch_norm_grad(dz, x, mean, invstd, ones, **kwargs)
        dgamma = np.einsum("ncs,ncs->c", _as_ncs(ddx, axis), _as_ncs(unit_dx, axis), dtype=np.float64, casting="safe")
        scaled_u = batch_norm_grad(ddx, x, mean, invstd, gamma, axis=axis, training=False, out=unit_dx).dx
        weighted_u = _weighted(scaled_u, axis, mask) if training else np.zeros_like(scaled_u)  # gamma*s*p*u
        _, scaled_v, scaled_sum_u, _ = batch_norm_grad(weighted_u, x, mean, invstd, ones, axis=axis, training=False)
        scale, shift = ddgamma - scaled_v, vector64("ddbeta") - scaled_sum_u
        dxhat = per_channel(scale, dz)  # t of the formulas
        dxhat -= per_channel(sum_dz_xhat, weighted_u)
        added = scaled_u if ddz is None else scaled_u + ddz
        ddz = batch_norm_infer(x, mean, 1 / invstd**2, scale, shift, axis=axis, epsilon=0.0, residual=added)
        dvariance = -0.5 * invstd**2 * gamma * dgamma  # gamma*dgamma/s is the gradient with respect to s
        dx = batch_norm_grad(dxhat, x, mean, invstd, ones, dvariance=dvariance, **kwargs).dx
    return ddz, dx, dgamma


def _weighted(array: Array, axis: int, mask: Array | None) -> Array:
    """p*array: 1/M without a mask, else w/W. Values of weight 0 become 0, even if they are NaN."""
    if mask is None:
        unmasked: Array = array * array.dtype.type(array.shape[axis] / max(array.size, 1))
        return unmasked
    total = mask.sum(dtype=np.float64)
    share = np.expand_dims(mask / (total or 1), axis).astype(array.dtype)
    weighted: Array = np.where(share > 0, array * share, array.dtype.type(0))
    return weighted


def _as_ncs(array: Array, axis: int) -> Array:
    """The array as (N, C, S)."""
    return array.reshape(math.prod(array.shape[:axis]), array.shape[axis], math.prod(array.shape[axis + 1 :]))


def _at_least_float32(array: Array | None) -> Array | None:
    return array.astype(np.float32) if array is not None and array.dtype.itemsize == 2 else array
