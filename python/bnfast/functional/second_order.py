"""Double backward: gradients through batch_norm_grad, for losses that hold a gradient (penalties, Hessian products).

Each pass over x is a kernel that is there already: what falls to ddy is an affine function of xhat with a residual
(batch_norm_infer), what falls to x is batch_norm_grad of another dy. Half types are computed in float32.
Nothing given is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from .._arguments.axes import Axes
from .batch_norm import batch_norm_grad, batch_norm_infer

__all__ = ["GradGradResult", "batch_norm_grad_grad"]


class GradGradResult(NamedTuple):
    """ddy and dx in the shape and dtype of x; dgamma of shape (C,), also where gamma was None, in the dtype of gamma,
    else float64 for float64 x and float32 otherwise."""

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
    """Gradients of a loss with respect to dy, x and gamma, through the results of `batch_norm_grad` on them.

    With u = ddx, dz = dy*activation'(z), s = invstd, p = w/W (1/M without a mask) and the sums over a channel
    B = sum dz, G = sum dz*xhat, U = sum p*u, V = sum p*u*xhat:

        ddy = activation'(z) * (gamma*s*(u - U - xhat*V) + ddgamma*xhat + ddbeta + ddresidual)
        dgamma = s*(sum u*dz - B*U - G*V), which is sum u*dx of batch_norm_grad with gamma = 1
        t = (ddgamma - gamma*s*V)*dz - gamma*s*G*p*u, the gradient with respect to xhat
        dx = s*(t - p*(sum t + xhat*(sum t*xhat + gamma*dgamma)))
        frozen (training=False, mean and invstd being constants): U = V = 0;  dgamma = s*sum u*dz;  dx = s*ddgamma*dz

    The activations are piecewise linear: what lies in their kinks counts as 0. In training mean and invstd are taken as
    the functions of x that they are.

    Args:
        ddx: gradient of the loss with respect to batch_norm_grad's dx: an array of x's shape and dtype.
        dy, x, mean, invstd, gamma, beta, axis, mask, activation, negative_slope, residual, training: as in the call of
            `batch_norm_grad`; one with dmean or dvariance has no double backward here.
        ddgamma, ddbeta: (C,), float32 or float64: gradients with respect to its dgamma and dbeta. None: zeros.
        ddresidual: gradient with respect to its dresidual, like x. None: zeros.

    Returns:
        GradGradResult(ddy, dx, dgamma). Gradients with respect to beta and residual are 0.

    Raises:
        ValueError, TypeError: as in `batch_norm_train`. Values that aren't finite are no error.

    Source: the chain rule on the formulas of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    x = _checks.tensor("x", x)
    axes = Axes.of(axis, x)
    vectors = {
        "mean": _checks.vector("mean", mean, axes, required=True),
        "invstd": _checks.vector("invstd", invstd, axes, required=True),
        "gamma": _checks.vector("gamma", gamma, axes),
        "beta": _checks.vector("beta", beta, axes),
        "ddgamma": _checks.vector("ddgamma", ddgamma, axes),
        "ddbeta": _checks.vector("ddbeta", ddbeta, axes),
    }
    if residual is None and ddresidual is not None:
        raise ValueError(f"ddresidual must be None without a residual. Received: {type(ddresidual).__name__}")
    tensors: dict[str, Any] = {"ddx": _checks.tensor("ddx", ddx), "dy": _checks.tensor("dy", dy)}
    tensors |= {"residual": residual, "ddresidual": ddresidual}
    tensors = {name: _checks.like(name, value, "x", x) for name, value in tensors.items()}
    weights = _checks.weights(mask, x, axes)
    activation = _checks.choice("activation", activation, _checks.ACTIVATIONS)
    negative_slope = _checks.real("negative_slope", negative_slope)
    training = _checks.boolean("training", training)

    merged = {name: axes.merge(array) for name, array in tensors.items()}
    given = axes.merge(x)
    assert given is not None
    flat = {name: axes.flat(vector) for name, vector in vectors.items()}
    slope = _Slope(given, flat, axes.place, activation, negative_slope, merged["residual"])
    ddz, dx, dgamma = _through(
        *(_wide(merged["ddx"]), _wide(slope(merged["dy"])), _wide(given), flat, _wide(merged["ddresidual"])),
        *(axes.place, None if weights is None else weights.reshape(axes.off), training),
    )
    parameter = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    dtype = parameter if vectors["gamma"] is None else vectors["gamma"].dtype
    with np.errstate(over="ignore"):
        ddy = slope(ddz.astype(x.dtype, copy=False))
        result = ddy, dx.astype(x.dtype, copy=False), dgamma.astype(dtype, copy=False)
    return GradGradResult(*axes.restore(result))


class _Slope(NamedTuple):
    """activation'(z) times an array: dresidual of batch_norm_grad, with z as the forward had it."""

    x: Array
    vectors: dict[str, Array | None]
    axis: int
    activation: str | None
    negative_slope: float
    residual: Array | None

    def __call__(self, dz: Any) -> Array:
        if self.activation is None:
            return np.asarray(dz)
        names = ("mean", "invstd", "gamma", "beta")
        result = batch_norm_grad(
            *(dz, self.x, *(self.vectors[name] for name in names)),
            axis=self.axis,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=np.zeros_like(self.x) if self.residual is None else self.residual,
            training=False,
        )
        assert result.dresidual is not None
        return result.dresidual


def _through(
    ddx: Any, dz: Any, x: Any, vectors: dict[str, Array | None], ddz: Any, axis: int, mask: Array | None, training: bool
) -> tuple[Array, Array, Array]:
    """Gradients with respect to dz, x and gamma; all arrays float32 or all float64, one channel axis."""
    channels = x.shape[axis]
    one = np.ones(channels)

    def vector(name: str, default: float = 0.0) -> Array:
        value = vectors[name]
        return np.full(channels, default) if value is None else value.astype(np.float64)

    def times(vector: Array, array: Array) -> Array:
        product: Array = vector.astype(array.dtype).reshape(-1, *(1,) * (array.ndim - axis - 1)) * array
        return product

    mean, invstd, gamma, ddgamma = vector("mean"), vector("invstd"), vector("gamma", 1.0), vector("ddgamma")
    words: dict[str, Any] = {"axis": axis, "training": training, "mask": mask}
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        unit, sum_dz_xhat, *_ = batch_norm_grad(dz, x, mean, invstd, one, **words)
        dgamma = np.einsum("ncs,ncs->c", _three(ddx, axis), _three(unit, axis), dtype=np.float64, casting="safe")
        scaled = batch_norm_grad(ddx, x, mean, invstd, gamma, axis=axis, training=False, out=unit).dx
        weighed = _weighed(scaled, axis, mask) if training else np.zeros_like(scaled)  # gamma*s*p*u
        _, scaled_v, scaled_u, _ = batch_norm_grad(weighed, x, mean, invstd, one, axis=axis, training=False)
        scale, shift = ddgamma - scaled_v, vector("ddbeta") - scaled_u
        inner = times(scale, dz)
        inner -= times(sum_dz_xhat, weighed)
        added = scaled if ddz is None else scaled + ddz
        ddz = batch_norm_infer(x, mean, 1 / invstd**2, scale, shift, axis=axis, epsilon=0.0, residual=added)
        dvariance = -0.5 * invstd**2 * gamma * dgamma  # gamma*dgamma/s is the gradient with respect to s
        dx = batch_norm_grad(inner, x, mean, invstd, one, dvariance=dvariance, **words).dx
    return ddz, dx, dgamma


def _weighed(array: Array, axis: int, mask: Array | None) -> Array:
    """p*array: over M, or times w/W; what has weight 0 has no say, NaN or not."""
    if mask is None:
        even: Array = array * array.dtype.type(array.shape[axis] / max(array.size, 1))
        return even
    total = mask.sum(dtype=np.float64)
    share = np.expand_dims(mask / (total or 1), axis).astype(array.dtype)
    weighed: Array = np.where(share > 0, array * share, array.dtype.type(0))
    return weighed


def _three(array: Array, axis: int) -> Array:
    """As (N, C, S)."""
    n = int(np.prod(array.shape[:axis]))
    return array.reshape(n, array.shape[axis], int(np.prod(array.shape[axis + 1 :])))


def _wide(array: Array | None) -> Array | None:
    return array.astype(np.float32) if array is not None and array.dtype.itemsize == 2 else array
