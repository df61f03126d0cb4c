"""The formulas of batch norm in JAX's own ops: slow, and differentiable to any order, in forward mode, too.

    mean = sum(w*x)/W, variance = sum(w*(x - mean)^2)/W, W = sum(w); without a mask w = 1 and W = M
    y = activation(gamma*(x - mean)*invstd + beta + residual)
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

They give the derivative of the kernels' backward pass, and run where the kernels can't. They compute in float32, or in
float64 for float64 x. `given` holds the operands of calls.py by name; absent ones aren't in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .options import Options

__all__ = ["activate", "gradient", "infer", "invstd_of", "mean_variance", "moments", "train"]

Array: TypeAlias = Any
Given: TypeAlias = Mapping[str, Array]

# As Keras defines them: JAX's hard_silu and gelu are the same functions.
_SMOOTH: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "hard_silu": jax.nn.hard_silu,
    "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "tanh": jnp.tanh,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "mish": lambda z: z * jnp.tanh(jax.nn.softplus(z)),
}


def activate(z: Array, activation: str | None, negative_slope: float) -> Array:
    """The fused activation as JAX's op."""
    if activation is None:
        return z
    if activation == "leaky_relu":
        return jnp.where(z > 0, z, z * negative_slope)
    return {"relu": jax.nn.relu, "relu6": jax.nn.relu6, **_SMOOTH}[activation](z)


def slope_at(y: Array, options: Options) -> Array:
    """activation'(z) of a relu, from y = activation(z). As in the kernels, NaN passes."""
    if options.activation == "leaky_relu":
        return jnp.where(y > 0, 1.0, options.negative_slope)
    closed = (y <= 0) | (y >= 6) if options.activation == "relu6" else y <= 0
    return jnp.where(closed, 0.0, 1.0)


def compute_dtype(x: Array) -> Any:
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def statistics_dtype() -> Any:
    """float64 where JAX has it, which takes x64 enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def moments(given: Given, options: Options) -> tuple[Array, Array, Array]:
    """mean, variance (C,) and W in the compute dtype."""
    x = given["x"].astype(compute_dtype(given["x"]))
    axes = [i for i in range(x.ndim) if i != options.axis % x.ndim]
    if "mask" not in given:
        total = jnp.asarray(x.size // max(x.shape[options.axis], 1), x.dtype)
        if not x.size:
            zeros = jnp.zeros(x.shape[options.axis], x.dtype)
            return zeros, zeros, total
        mean = x.mean(axes)
        return mean, jnp.square(x - _per_channel(mean, x, options)).mean(axes), total
    shape = [1 if i == options.axis % x.ndim else extent for i, extent in enumerate(x.shape)]
    weights = given["mask"].astype(x.dtype).reshape(shape)
    total = weights.sum()
    divisor = jnp.where(total > 0, total, 1)
    mean = (x * weights).sum(axes) / divisor
    return mean, (jnp.square(x - _per_channel(mean, x, options)) * weights).sum(axes) / divisor, total


def mean_variance(given: Given, options: Options) -> Array:
    """(2, C): mean and variance in the dtype of statistics."""
    return jnp.stack(moments(given, options)[:2]).astype(statistics_dtype())


def train(given: Given, options: Options, slopes: Array | None = None) -> tuple[Array, Array, tuple[Array, ...]]:
    """y, the statistics (3, C) and the updated moving statistics, if there are any.

    slopes: factors that multiply z in place of the activation.
    """
    mean, variance, total = moments(given, options)
    invstd = invstd_of(variance, options)
    y = _normalize(given, mean, invstd, options, slopes)
    moving = ()
    if "moving_mean" in given:
        moving = update((given["moving_mean"], given["moving_variance"]), (mean, variance), total, options)
    return y, jnp.stack([mean, variance, invstd]).astype(statistics_dtype()), moving


def update(
    moving: tuple[Array, Array], batch: tuple[Array, Array], total: Array, options: Options
) -> tuple[Array, ...]:
    """The moving statistics after a batch with these statistics and W = total."""
    mean, variance = batch
    valid = total > 0
    if options.nan_policy == "skip_update":
        valid &= jnp.isfinite(mean) & jnp.isfinite(variance)
    if options.correction:
        variance = variance * jnp.where(total > 1, total / jnp.where(total > 1, total - 1, 1), 1)
    return tuple(
        jnp.where(valid, old * options.momentum + new.astype(old.dtype) * (1 - options.momentum), old)
        for old, new in zip(moving, (mean, variance), strict=True)
    )


def infer(given: Given, options: Options, slopes: Array | None = None) -> Array:
    """y with given moving statistics."""
    dtype = compute_dtype(given["x"])
    invstd = invstd_of(given["moving_variance"].astype(dtype), options)
    return _normalize(given, given["moving_mean"].astype(dtype), invstd, options, slopes)


def gradient(given: Given, options: Options) -> tuple[Array, ...]:
    """dx, dgamma, dbeta and, with an activation and residual or y, dresidual.

    The statistics are mean and invstd or the moving ones, where given, and those of x otherwise.
    """
    if "mean" in given:
        return _gradient_at(given, options)
    x = given["x"]
    C = x.shape[options.axis]
    ones, zeros = jnp.ones(C, compute_dtype(x)), jnp.zeros(C, compute_dtype(x))
    primals = {"x": x, "gamma": given.get("gamma", ones), "beta": given.get("beta", zeros)}
    slopes = None
    if "y" in given:
        primals["residual"], slopes = jnp.zeros_like(x), slope_at(given["y"], options)
    elif "residual" in given:
        primals["residual"] = given["residual"]
    others = {name: value for name, value in given.items() if name not in primals}

    def forward(values: Given) -> tuple[Array, ...]:
        if not options.training:
            return (infer({**others, **values}, options, slopes),)
        statistics = {name: value for name, value in others.items() if name not in ("moving_mean", "moving_variance")}
        y, (mean, variance, _), _ = train({**statistics, **values}, options, slopes)
        return (y, mean, variance) if "dmean" in given else (y,)

    results, pull = jax.vjp(forward, primals)
    upstream = [given[name] for name in ("dy", "dmean", "dvariance") if name in given]
    (found,) = pull(tuple(u.astype(r.dtype) for u, r in zip(upstream, results, strict=True)))
    return tuple(found[name] for name in primals)


def _gradient_at(given: Given, options: Options) -> tuple[Array, ...]:
    """`gradient` for any mean and invstd: the formula of bnfast.functional.batch_norm_grad."""
    x = given["x"]
    values = x.astype(compute_dtype(x))
    axes = [i for i in range(x.ndim) if i != options.axis % x.ndim]

    def spread(vector: Array) -> Array:
        return _per_channel(vector, values, options)

    centered = values - spread(given["mean"])
    invstd = spread(given["invstd"])
    xhat = centered * invstd
    gamma = spread(given["gamma"]) if "gamma" in given else 1
    dz = given["dy"].astype(values.dtype)
    gated = options.activation is not None and ("y" in given or "residual" in given)
    if "y" in given:
        dz = dz * slope_at(given["y"], options).astype(dz.dtype)
    elif options.activation is not None:
        z = gamma * xhat + (spread(given["beta"]) if "beta" in given else 0)
        z = z + given["residual"].astype(z.dtype) if "residual" in given else z
        (dz,) = jax.vjp(lambda z: activate(z, options.activation, options.negative_slope), z)[1](dz)
    dbeta, dgamma = dz.sum(axes), (dz * xhat).sum(axes)
    dx = gamma * invstd * dz
    if options.training:
        share: Array = 1 / max(x.size // max(x.shape[options.axis], 1), 1)
        if "mask" in given:
            shape = [1 if i == options.axis % x.ndim else extent for i, extent in enumerate(x.shape)]
            total = given["mask"].sum()
            share = given["mask"].reshape(shape) / jnp.where(total > 0, total, 1)
        dx = dx - share * gamma * invstd * (spread(dbeta) + xhat * spread(dgamma))
        if "dmean" in given:
            dx = dx + share * (spread(given["dmean"]) + 2 * centered * spread(given["dvariance"]))
    dgamma = dgamma.astype(given["gamma"].dtype) if "gamma" in given else dgamma
    dbeta = dbeta.astype(given["beta"].dtype) if "beta" in given else dbeta
    return dx.astype(x.dtype), dgamma, dbeta, *([dz.astype(x.dtype)] if gated else [])


def _per_channel(vector: Array, x: Array, options: Options) -> Array:
    return vector.astype(x.dtype).reshape([-1 if i == options.axis % x.ndim else 1 for i in range(x.ndim)])


def invstd_of(variance: Array, options: Options) -> Array:
    """1/sqrt(variance + epsilon), or 0 where the sum is 0: y is beta there, and a constant's gradient is 0."""
    shifted = variance + options.epsilon
    root = jax.lax.rsqrt(jnp.where(shifted == 0, 1, shifted))  # never of 0: its derivative is infinite
    return jnp.where(shifted == 0, 0, root)


def _normalize(given: Given, mean: Array, invstd: Array, options: Options, slopes: Array | None) -> Array:
    x = given["x"]
    values = x.astype(compute_dtype(x))
    z = (values - _per_channel(mean, values, options)) * _per_channel(invstd, values, options)
    if "gamma" in given:
        z = z * _per_channel(given["gamma"], z, options)
    if "beta" in given:
        z = z + _per_channel(given["beta"], z, options)
    if "residual" in given:
        z = z + given["residual"].astype(z.dtype)
    z = activate(z, options.activation, options.negative_slope) if slopes is None else z * slopes.astype(z.dtype)
    return z.astype(x.dtype)
