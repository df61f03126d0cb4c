"""The custom calls: JAX arrays in, JAX arrays out, and no derivative rules (calls.py has those).

Operands are named in a dict; the handlers (csrc/jax/handlers.h) read the names from the attribute `inputs`. Under vmap
a handler runs once per item, so that an item's bits are those of a call of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._arguments.checks import ACTIVATIONS, NAN_POLICIES
from . import reference
from .mesh import result_like
from .options import Options
from .reference import Array, Given
from .support import BY_PLATFORM

__all__ = ["gradient", "infer", "moments", "train"]


def train(given: Given, options: Options) -> tuple[Array, ...]:
    """y, saved, statistics (3, C), and the updated moving statistics, if there are any."""
    x = given["x"]
    C = x.shape[options.axis]
    moving = [(given[name].shape, given[name].dtype) for name in ("moving_mean", "moving_variance") if name in given]

    def otherwise(given: Given) -> tuple[Array, ...]:
        y, statistics, new = reference.train(given, options)
        return y, jnp.zeros(4 * C, jnp.uint32), statistics, *new  # its gradient recomputes what it needs

    results = [(x.shape, x.dtype), ((4 * C,), np.uint32), ((3, C), reference.statistics_dtype()), *moving]
    attributes = {
        "momentum": np.float64(options.momentum),
        "epsilon": np.float64(options.epsilon),
        "correction": np.int64(options.correction),
        "nan_policy": np.int64(NAN_POLICIES.index(options.nan_policy)),
    }
    return _call("bnfast_train", results, given, options, attributes, otherwise)


def infer(given: Given, options: Options) -> Array:
    """y with given moving statistics."""
    x = given["x"]
    attributes = {"epsilon": np.float64(options.epsilon)}
    results = [(x.shape, x.dtype)]
    return _call("bnfast_infer", results, given, options, attributes, lambda g: (reference.infer(g, options),))[0]


def gradient(given: Given, options: Options) -> tuple[Array, ...]:
    """dx, dgamma, dbeta and, with an activation and residual or y, dresidual."""
    x = given["x"]
    shape = (x.shape[options.axis],)
    vectors = [
        (shape, given[name].dtype if name in given else reference.compute_dtype(x)) for name in ("gamma", "beta")
    ]
    gated = options.activation is not None and ("residual" in given or "y" in given)
    results = [(x.shape, x.dtype), *vectors, *([(x.shape, x.dtype)] if gated else [])]
    attributes = {"training": np.int64(options.training), "epsilon": np.float64(options.epsilon)}
    return _call("bnfast_grad", results, given, options, attributes, lambda g: reference.gradient(g, options))


def moments(given: Given, options: Options) -> Array:
    """(2, C): mean and variance."""
    results = [((2, given["x"].shape[options.axis]), reference.statistics_dtype())]
    return _call("bnfast_moments", results, given, options, {}, lambda g: (reference.mean_variance(g, options),))[0]


def _call(
    target: str, results: list[Any], given: Given, options: Options, attributes: dict[str, Any], otherwise: Any
) -> tuple[Array, ...]:
    attributes |= {
        "rank": np.int64(given["x"].ndim),
        "axis": np.int64(options.axis),
        "activation": np.int64(ACTIVATIONS.index(options.activation)),
        "negative_slope": np.float64(options.negative_slope),
    }

    def run(given: Given) -> tuple[Array, ...]:
        outputs = [result_like(given["x"], shape, dtype) for shape, dtype in results]
        call = jax.ffi.ffi_call(target, outputs, vmap_method="expand_dims")
        return tuple(call(*given.values(), inputs=" ".join(given), **attributes))

    if options.way == BY_PLATFORM:
        found: tuple[Array, ...] = jax.lax.platform_dependent(given, cpu=run, default=otherwise)
        return found
    return run(given)
