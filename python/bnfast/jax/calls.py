"""The functions with derivative rules: the backward pass is the kernels', its derivative that of the formula.

train     -> y, statistics (3, C), the updated moving statistics; all are differentiable
infer     -> y
gradient  -> dx, dgamma, dbeta, dresidual
Each takes its operands by name, as kernels.py does. A forward rule calls its own function, not the
kernel: in a derivative of a derivative, the outer one differentiates that call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .._arguments.checks import PIECEWISE_LINEAR
from . import kernels, reference
from .options import Options
from .reference import Array, Given
from .support import OWN_OPS

__all__ = ["gradient", "infer", "moments", "train"]

_PARAMETERS = ("gamma", "beta")


def _zero(cotangent: Any) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _full(cotangent: Any) -> Array:
    return jnp.zeros(cotangent.shape, cotangent.dtype) if _zero(cotangent) else cotangent


def _values(given: Any) -> dict[str, Array]:
    return {name: primal.value for name, primal in given.items()}


def _kept(given: Given, y: Array, options: Options) -> dict[str, Array]:
    """What the gradient reads. y, which the next layer keeps anyway, in place of the residual where it tells the
    activation's slope; without an activation dresidual is dy, and neither is needed."""
    kept = {name: given[name] for name in ("x", *_PARAMETERS, "mask") if name in given}
    if "residual" in given and options.activation is not None:
        kept |= {"y": y} if options.activation in PIECEWISE_LINEAR else {"residual": given["residual"]}
    return kept


def _cotangents(given: Given, dy: Array, found: tuple[Array, ...], has_residual: bool) -> dict[str, Array | None]:
    """The results of `gradient` by the name of the operand."""
    dx, dgamma, dbeta, *dresidual = found
    named = {"x": dx, "gamma": dgamma, "beta": dbeta}
    cotangents: dict[str, Array | None] = {name: named.get(name) for name in given if name not in ("y", "residual")}
    if has_residual:
        cotangents["residual"] = dresidual[0] if dresidual else dy
    return cotangents


# ---- training --------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(options: Options, given: dict[str, Array]) -> tuple[Array, ...]:
    return kernels.train(given, options)


def _train_forward(options: Options, given: Any) -> Any:
    values = _values(given)
    results = _train(options, values)
    y, saved, statistics, *_ = results
    old = {name: values[name] for name in ("moving_mean", "moving_variance") if name in values}
    kept = _kept(values, y, options)
    # A residual of the rule is an array: an empty one tells that there was a residual.
    marks = (jnp.zeros(0),) * ("residual" in values)
    return results, (kept, old, saved, statistics, marks)


def _train_backward(options: Options, residuals: Any, cotangents: Any) -> Any:
    kept, old, saved, statistics, marks = residuals
    dy, _, dstatistics, *dmoving = cotangents
    upstream = {}
    moved: dict[str, Array | None] = {}
    if not (_zero(dstatistics) and all(map(_zero, dmoving))):
        total = _total(kept, options)
        dmean, dvariance, dinvstd = _full(dstatistics).astype(statistics.dtype)
        dvariance = dvariance - 0.5 * statistics[2] ** 3 * dinvstd
        if dmoving:
            _, pull = jax.vjp(
                lambda moving, mean, variance: reference.update(moving, (mean, variance), total, options),
                tuple(old.values()), *statistics[:2],
            )  # fmt: skip
            new, through_mean, through_variance = pull(tuple(map(_full, dmoving)))
            moved = dict(zip(old, new, strict=True))
            dmean, dvariance = dmean + through_mean, dvariance + through_variance
        upstream = {"dmean": dmean, "dvariance": dvariance}
    dy = _full(dy)
    found = _gradient(options, {"dy": dy, **kept, "saved": saved, **upstream})
    return ({**_cotangents(kept, dy, found, bool(marks)), **(moved or dict.fromkeys(old))},)


def _total(kept: Given, options: Options) -> Array:
    x = kept["x"]
    return kept["mask"].sum() if "mask" in kept else jnp.asarray(float(x.size // max(x.shape[options.axis], 1)))


_train.defvjp(_train_forward, _train_backward, symbolic_zeros=True)


def train(options: Options, given: dict[str, Array]) -> tuple[Array, ...]:
    """y, statistics (3, C): mean, variance, invstd, and the updated moving statistics, if there are any."""
    if options.way == OWN_OPS:
        y, statistics, moving = reference.train(given, options)
        return y, statistics, *moving
    y, _, *others = _train(options, given)
    return y, *others


# ---- inference -------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _infer(options: Options, given: dict[str, Array]) -> Array:
    return kernels.infer(given, options)


def _infer_forward(options: Options, given: dict[str, Array]) -> Any:
    y = _infer(options, given)
    moving = {name: given[name] for name in ("moving_mean", "moving_variance")}
    return y, ({**_kept(given, y, options), **moving}, (jnp.zeros(0),) * ("residual" in given))


def _infer_backward(options: Options, residuals: Any, dy: Array) -> Any:
    kept, marks = residuals
    found = _gradient(options, {"dy": dy, **kept})
    cotangents = _cotangents(kept, dy, found, bool(marks))
    _, dgamma, dbeta, *_ = found
    variance = kept["moving_variance"]
    dtype = jnp.promote_types(dgamma.dtype, variance.dtype)
    invstd = reference.invstd_of(variance.astype(dtype), options)
    slope = -invstd if "gamma" not in kept else -invstd * kept["gamma"]
    cotangents["moving_mean"] = (slope * dbeta).astype(kept["moving_mean"].dtype)
    cotangents["moving_variance"] = (0.5 * slope * invstd * dgamma).astype(variance.dtype)
    return (cotangents,)


_infer.defvjp(_infer_forward, _infer_backward)


def infer(options: Options, given: dict[str, Array]) -> Array:
    """y with given moving statistics."""
    return reference.infer(given, options) if options.way == OWN_OPS else _infer(options, given)


# ---- the backward pass -----------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(options: Options, given: dict[str, Array]) -> tuple[Array, ...]:
    return kernels.gradient(given, options)


def _gradient_forward(options: Options, given: dict[str, Array]) -> Any:
    return _gradient(options, given), given


def _gradient_backward(options: Options, given: dict[str, Array], cotangents: Any) -> Any:
    constants = ("mask", "saved", "y")
    values = {name: value for name, value in given.items() if name not in constants}
    others = {name: value for name, value in given.items() if name in constants}
    _, pull = jax.vjp(lambda v: reference.gradient({**others, **v}, options), values)
    (found,) = pull(cotangents)
    return ({name: found.get(name) for name in given},)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def gradient(options: Options, given: dict[str, Array]) -> tuple[Array, ...]:
    """dx, dgamma, dbeta and, with an activation and residual or y, dresidual."""
    return reference.gradient(given, options) if options.way == OWN_OPS else _gradient(options, given)


def moments(options: Options, given: dict[str, Array]) -> Array:
    """(2, C): mean and variance. They pass no gradient on."""
    given = jax.lax.stop_gradient(given)
    if options.way == OWN_OPS:
        return reference.mean_variance(given, options)
    return kernels.moments(given, options)
