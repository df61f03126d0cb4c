"""The reference: the formulas of all norms in NumPy, slow and obvious.

Batch norm reshapes every array to (M, C), channels last and all other axes flattened, and computes in float64, or in
long double if the input is float64. Results have that dtype and the shape of x; each test has its own tolerance.
Nothing is written. New moving statistics are returned.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Train(NamedTuple):
    y: Any
    mean: Any
    variance: Any
    invstd: Any
    moving_mean: Any
    moving_variance: Any
    count: float


class Grad(NamedTuple):
    dx: Any
    dgamma: Any
    dbeta: Any
    dresidual: Any


def wide_dtype(x):
    return np.longdouble if np.asarray(x).dtype == np.float64 else np.float64


def rows(x, axis, dtype):
    """x as (M, C)."""
    moved = np.moveaxis(np.asarray(x), axis, -1)
    return moved.astype(dtype).reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def unrows(r, x, axis):
    """(M, C) back to the shape of x."""
    moved = np.moveaxis(np.empty(np.shape(x), np.int8), axis, -1).shape
    return np.moveaxis(r.reshape(moved), -1, axis)


def weights(mask, x, axis, dtype):
    """The mask as (M, 1) weights; ones without a mask."""
    shape = list(np.shape(x))
    axis = axis % len(shape)
    if mask is None:
        return np.ones((math.prod(shape[:axis] + shape[axis + 1 :]), 1), dtype)
    mask = np.asarray(mask).astype(dtype)
    if mask.ndim == len(shape):
        shape[axis] = 1
        mask = np.squeeze(np.broadcast_to(mask, shape), axis)
    return mask.reshape(-1, 1)


def moments(x, *, axis=-1, mask=None):
    """count, mean, population variance."""
    dtype = wide_dtype(x)
    r, w = rows(x, axis, dtype), weights(mask, x, axis, dtype)
    count = w.sum()
    if count == 0:
        return 0.0, np.zeros(r.shape[1], dtype), np.zeros(r.shape[1], dtype)
    keep = w[:, 0] > 0  # values of weight 0 do not count, even if they are NaN
    r, w = r[keep], w[keep]
    mean = (w * r).sum(0) / count
    return float(count), mean, (w * (r - mean) ** 2).sum(0) / count


def inverse_std(variance, epsilon):
    total = variance + epsilon
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total == 0, 0, 1 / np.sqrt(total))


SELU_SCALE, SELU_ALPHA = np.longdouble("1.0507009873554804934193"), np.longdouble("1.6732632423543772848170")


def sigmoid(z):
    w = np.exp(-abs(z))
    return np.where(z < 0, w, 1) / (1 + w)


def normal_cdf(z):
    """Phi, with the digits of float64."""
    return np.vectorize(math.erfc, otypes=[np.float64])(-np.asarray(z, np.float64) / math.sqrt(2)) / 2


def gelu_argument(z):
    """gelu_tanh(z) is z*sigmoid of it."""
    return 2 * np.sqrt(2 / z.dtype.type(np.pi)) * (z + z.dtype.type(0.044715) * z**3)


def gelu_tanh_slope(z):
    u = gelu_argument(z)
    return sigmoid(u) + sigmoid(u) * sigmoid(-u) * (3 * u - 4 * np.sqrt(2 / z.dtype.type(np.pi)) * z)  # z*u'(z)


SMOOTH = {  # by name: the function and its derivative
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * sigmoid(-z))),
    "hard_silu": (
        lambda z: z * (z + 3).clip(0, 6) / 6,
        lambda z: np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6)),
    ),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "hard_sigmoid": (lambda z: (z + 3).clip(0, 6) / 6, lambda z: np.where(abs(z) < 3, 1 / z.dtype.type(6), 0)),
    "tanh": (np.tanh, lambda z: 4 * sigmoid(2 * z) * sigmoid(-2 * z)),
    "gelu": (
        lambda z: z * normal_cdf(z),
        lambda z: normal_cdf(z) + z * np.exp(-z * z / 2) / np.sqrt(2 * z.dtype.type(np.pi)),
    ),
    "gelu_tanh": (lambda z: z * sigmoid(gelu_argument(z)), lambda z: gelu_tanh_slope(z)),
    "elu": (lambda z: np.where(z < 0, np.expm1(z.clip(None, 0)), z), lambda z: np.exp(z.clip(None, 0))),
    "selu": (
        lambda z: (
            SELU_SCALE.astype(z.dtype) * np.where(z < 0, SELU_ALPHA.astype(z.dtype) * np.expm1(z.clip(None, 0)), z)
        ),
        lambda z: SELU_SCALE.astype(z.dtype) * np.where(z < 0, SELU_ALPHA.astype(z.dtype) * np.exp(z.clip(None, 0)), 1),
    ),
    "softplus": (lambda z: z.clip(0, None) + np.log1p(np.exp(-abs(z))), sigmoid),
    "mish": (
        lambda z: z * np.tanh(SMOOTH["softplus"][0](z)),
        lambda z: np.tanh(SMOOTH["softplus"][0](z)) + z * sigmoid(z) * (1 - np.tanh(SMOOTH["softplus"][0](z)) ** 2),
    ),
}


def activate(z, activation, negative_slope=0.2):
    if activation is None:
        return z
    if activation in SMOOTH:
        return SMOOTH[activation][0](z)
    if activation == "leaky_relu":
        return np.where(z < 0, z * negative_slope, z)
    z = np.where(z < 0, 0, z)  # NaN stays NaN
    return np.where(z > 6, 6, z) if activation == "relu6" else z


def activation_slope(z, activation, negative_slope=0.2):
    if activation is None:
        return np.ones_like(z)
    if activation in SMOOTH:
        return SMOOTH[activation][1](z)
    if activation == "leaky_relu":
        return np.where(z > 0, 1, np.asarray(negative_slope, z.dtype))
    return ((z > 0) & ((z < 6) if activation == "relu6" else True)).astype(z.dtype)


def parameters(gamma, beta, channels, dtype):
    gamma = np.ones(channels, dtype) if gamma is None else np.asarray(gamma).astype(dtype)
    beta = np.zeros(channels, dtype) if beta is None else np.asarray(beta).astype(dtype)
    return gamma, beta


def preactivation(x, mean, invstd, gamma=None, beta=None, *, axis=-1, residual=None):
    """gamma*(x - mean)*invstd + beta + residual."""
    dtype = wide_dtype(x)
    r = rows(x, axis, dtype)
    gamma, beta = parameters(gamma, beta, r.shape[1], dtype)
    z = gamma * ((r - np.asarray(mean).astype(dtype)) * np.asarray(invstd).astype(dtype)) + beta
    if residual is not None:
        z = z + rows(residual, axis, dtype)
    return unrows(z, x, axis)


def infer(x, moving_mean, moving_variance, gamma=None, beta=None, *, axis=-1, epsilon=1e-3, activation=None,
          negative_slope=0.2, residual=None):  # fmt: skip
    invstd = inverse_std(np.asarray(moving_variance).astype(wide_dtype(x)), epsilon)
    z = preactivation(x, moving_mean, invstd, gamma, beta, axis=axis, residual=residual)
    return activate(z, activation, negative_slope)


def train(x, gamma=None, beta=None, moving_mean=None, moving_variance=None, *, axis=-1, momentum=0.99, epsilon=1e-3,
          mask=None, activation=None, negative_slope=0.2, residual=None, correction=0,
          nan_policy="propagate"):  # fmt: skip
    dtype = wide_dtype(x)
    count, mean, variance = moments(x, axis=axis, mask=mask)
    finite = np.isfinite(mean) & np.isfinite(variance)
    if nan_policy == "raise" and not finite.all():
        raise FloatingPointError(f"channels {np.flatnonzero(~finite)}")
    invstd = inverse_std(variance, epsilon)
    z = preactivation(x, mean, invstd, gamma, beta, axis=axis, residual=residual)
    if moving_mean is not None:
        moving_mean, moving_variance = (np.asarray(a).astype(dtype) for a in (moving_mean, moving_variance))
        update = (count > 0) & (finite | (nan_policy == "propagate"))
        bessel = count / (count - 1) if correction and count > 1 else 1.0
        new_mean = moving_mean * momentum + mean * (1 - dtype(momentum))
        new_variance = moving_variance * momentum + variance * bessel * (1 - dtype(momentum))
        moving_mean = np.where(update, new_mean, moving_mean)
        moving_variance = np.where(update, new_variance, moving_variance)
    return Train(activate(z, activation, negative_slope), mean, variance, invstd, moving_mean, moving_variance, count)


def grad(dy, x, mean, invstd, gamma=None, beta=None, *, axis=-1, mask=None, activation=None, negative_slope=0.2,
         residual=None, training=True, dmean=None, dvariance=None):  # fmt: skip
    dtype = wide_dtype(x)
    z = preactivation(x, mean, invstd, gamma, beta, axis=axis, residual=residual)
    dz = rows(dy, axis, dtype) * rows(activation_slope(z, activation, negative_slope), axis, dtype)
    r, w = rows(x, axis, dtype), weights(mask, x, axis, dtype)
    gamma, _ = parameters(gamma, beta, r.shape[1], dtype)
    mean, invstd = np.asarray(mean).astype(dtype), np.asarray(invstd).astype(dtype)
    xhat = (r - mean) * invstd
    dbeta, dgamma = dz.sum(0), (dz * xhat).sum(0)
    dx = gamma * invstd * dz
    if training and w.sum() > 0:
        share = w / w.sum()
        dx = dx - gamma * invstd * (share * dbeta + share * xhat * dgamma)
        if dmean is not None:
            dx = dx + share * np.asarray(dmean).astype(dtype)
        if dvariance is not None:
            dx = dx + share * np.asarray(dvariance).astype(dtype) * 2 * (r - mean)
    return Grad(unrows(dx, x, axis), dgamma, dbeta, None if residual is None else unrows(dz, x, axis))


def weight_norm(v, g, axes):
    """g * v/|v|, |v| over `axes`; g broadcasts against v."""
    v = np.asarray(v).astype(wide_dtype(v))
    return g * v / np.sqrt((v * v).sum(axes, keepdims=True))


def weight_norm_grad(dw, v, g, axes):
    """dv, dg, the latter with extent 1 along `axes`."""
    dw, v = (np.asarray(a).astype(wide_dtype(v)) for a in (dw, v))
    norm = np.sqrt((v * v).sum(axes, keepdims=True))
    dg = (dw * v).sum(axes, keepdims=True) / norm
    return g / norm * dw - g * dg / norm**2 * v, dg


def standardize(w, axes, epsilon):
    """xhat, mean and invstd of w (float64 or long double) over `axes`. An empty row has mean and variance 0."""
    count = max(math.prod(w.shape[i] for i in axes), 1)
    mean = w.sum(axes, keepdims=True) / count
    invstd = inverse_std(((w - mean) ** 2).sum(axes, keepdims=True) / count, epsilon)
    return (w - mean) * invstd, mean, invstd


def normalized_gradient(g, xhat, invstd, axes):
    """dx, where g is the gradient with respect to xhat."""
    count = max(math.prod(g.shape[i] for i in axes), 1)
    sum_g, sum_g_xhat = g.sum(axes, keepdims=True), (g * xhat).sum(axes, keepdims=True)
    return invstd * (g - sum_g / count - xhat * sum_g_xhat / count)


def group_norm(x, groups, gamma=None, beta=None, *, axis=-1, epsilon=1e-3, dy=None):
    """y, mean, invstd and, if dy is given, dx, dgamma, dbeta. Statistics have shape (N, groups)."""
    first = np.moveaxis(np.asarray(x), axis, 1)
    split = (len(first), groups, first.shape[1] // groups, math.prod(first.shape[2:]))
    xhat, mean, invstd = standardize(first.astype(wide_dtype(x)).reshape(split), (2, 3), epsilon)
    gamma, beta = (p.reshape(1, *split[1:3], 1) for p in parameters(gamma, beta, first.shape[1], wide_dtype(x)))

    def back(a):
        return np.moveaxis(a.reshape(first.shape), 1, axis)

    results = [back(gamma * xhat + beta), mean[..., 0, 0], invstd[..., 0, 0]]
    if dy is not None:
        dy = np.moveaxis(np.asarray(dy), axis, 1).astype(xhat.dtype).reshape(split)
        results += [back(normalized_gradient(gamma * dy, xhat, invstd, (2, 3)))]
        results += [(dy * xhat).sum((0, 3)).reshape(-1), dy.sum((0, 3)).reshape(-1)]
    return results


def layer_norm(x, gamma=None, beta=None, *, axes=(-1,), epsilon=1e-3, dy=None):
    """As group_norm. gamma and beta have the extents of `axes` as shape, statistics those of the other axes."""
    axes = tuple(sorted(a % np.ndim(x) for a in axes))
    xhat, mean, invstd = standardize(np.asarray(x).astype(wide_dtype(x)), axes, epsilon)
    shape = [n if i in axes else 1 for i, n in enumerate(np.shape(x))]
    gamma, beta = (p.reshape(shape) for p in parameters(gamma, beta, shape, xhat.dtype))
    results = [gamma * xhat + beta, np.squeeze(mean, axes), np.squeeze(invstd, axes)]
    if dy is not None:
        dy = np.asarray(dy).astype(xhat.dtype)
        others = tuple(i for i in range(dy.ndim) if i not in axes)
        results += [normalized_gradient(gamma * dy, xhat, invstd, axes), (dy * xhat).sum(others), dy.sum(others)]
    return results


def central_differences(f, a, h=1e-6):
    """Central differences of the scalar f with respect to every entry of a."""
    d = np.zeros_like(a)
    for i in np.ndindex(a.shape):
        keep = a[i]
        a[i] = keep + h
        up = f()
        a[i] = keep - h
        down = f()
        a[i] = keep
        d[i] = (up - down) / (2 * h)
    return d
