"""Every user-facing error of the functional API, and plain arguments for _core where there is none.

The four functions train, infer, grad and moments take what the public function of that name took and return the
argument list of the _core function, in its order: C-contiguous ndarrays, Python scalars, checked strings.
Several axes are one in that list (_axes.py), and what _core returns is restored by functional.py.
Nothing is written here, so whatever raises has changed nothing. Messages say what was wanted and what was received:
ValueError for values and shapes, TypeError for types and dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .axes import Axes
from .checks import (
    ACTIVATIONS,
    NAN_POLICIES,
    apart,
    array_or_none,
    bessel,
    boolean,
    choice,
    like,
    real,
    state,
    target,
    tensor,
    vector,
    weights,
)

__all__ = ["grad", "infer", "moments", "train"]


def train(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    axis: Any,
    momentum: Any,
    epsilon: Any,
    mask: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    correction: Any,
    nan_policy: Any,
    out: Any,
) -> tuple[Any, ...]:
    """Plain arguments for _core.train."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    gamma = vector("gamma", gamma, axes)
    beta = vector("beta", beta, axes)
    if (moving_mean is None) != (moving_variance is None):
        given = "moving_mean" if moving_variance is None else "moving_variance"
        raise ValueError(f"moving_mean and moving_variance must be given together. Received: {given} alone")
    moving_mean = state("moving_mean", moving_mean, axes)
    moving_variance = state("moving_variance", moving_variance, axes)
    momentum = real("momentum", momentum, 1.0)
    epsilon = real("epsilon", epsilon)
    flat = weights(mask, x, axes)
    activation = choice("activation", activation, ACTIVATIONS)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    correction = bessel(correction)
    nan_policy = choice("nan_policy", nan_policy, NAN_POLICIES)
    inputs = {"gamma": gamma, "beta": beta, "mask": array_or_none(mask), "residual": residual}
    moving = {"moving_mean": moving_mean, "moving_variance": moving_variance}
    out = target(out, {"x": x}, inputs | moving)
    if moving_mean is not None:
        apart("moving_mean", moving_mean, {"moving_variance": moving_variance, "x": x} | inputs)
        apart("moving_variance", moving_variance, {"x": x} | inputs)
    vectors = (axes.flat(a) for a in (gamma, beta, moving_mean, moving_variance))
    return (
        *(axes.merge(x), *vectors, axes.place, momentum, epsilon, flat),
        *(activation, negative_slope, axes.merge(residual), correction, nan_policy, axes.merge_out(out)),
    )


def infer(
    x: Any,
    moving_mean: Any,
    moving_variance: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    epsilon: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
) -> tuple[Any, ...]:
    """Plain arguments for _core.infer."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    moving_mean = vector("moving_mean", moving_mean, axes, required=True)
    moving_variance = vector("moving_variance", moving_variance, axes, required=True)
    gamma = vector("gamma", gamma, axes)
    beta = vector("beta", beta, axes)
    epsilon = real("epsilon", epsilon)
    activation = choice("activation", activation, ACTIVATIONS)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    inputs = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_variance": moving_variance}
    out = target(out, {"x": x}, inputs | {"residual": residual})
    vectors = (axes.flat(a) for a in (moving_mean, moving_variance, gamma, beta))
    return (
        *(axes.merge(x), *vectors, axes.place, epsilon, activation, negative_slope),
        *(axes.merge(residual), axes.merge_out(out)),
    )


def grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    mask: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    y: Any,
    training: Any,
    dmean: Any,
    dvariance: Any,
    out: Any,
    out_dresidual: Any,
) -> tuple[Any, ...]:
    """Plain arguments for _core.grad."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    dy = like("dy", tensor("dy", dy), "x", x)
    vectors = {
        "mean": vector("mean", mean, axes, required=True),
        "invstd": vector("invstd", invstd, axes, required=True),
        "gamma": vector("gamma", gamma, axes),
        "beta": vector("beta", beta, axes),
        "dmean": vector("dmean", dmean, axes),
        "dvariance": vector("dvariance", dvariance, axes),
    }
    flat = weights(mask, x, axes)
    activation = choice("activation", activation, ACTIVATIONS)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    y = like("y", y, "x", x)
    if residual is not None and y is not None:
        raise ValueError("y stands in place of residual. Received: both")
    training = boolean("training", training)
    others = vectors | {"mask": array_or_none(mask), "residual": residual, "y": y}
    out = target(out, {"dy": dy, "x": x}, others)
    out_dresidual = target(out_dresidual, {"x": x}, others | {"dy": dy, "out": out}, "out_dresidual")
    if out_dresidual is not None and (activation is None or (residual is None and y is None)):
        raise ValueError(
            "out_dresidual must come with an activation and with residual or y: dresidual is dy, or None, without. "
            f"Received: {'neither residual nor y' if activation else 'activation=None'}"
        )
    gamma, beta = axes.flat(vectors["gamma"]), axes.flat(vectors["beta"])
    mean, invstd, dmean, dvariance = (
        axes.flat(vectors[name], np.float64) for name in ("mean", "invstd", "dmean", "dvariance")
    )
    return (
        *(axes.merge(dy), axes.merge(x), mean, invstd, gamma, beta, axes.place, flat, activation, negative_slope),
        *(axes.merge(residual), axes.merge(y), training, dmean, dvariance),
        *(axes.merge_out(out), axes.merge_out(out_dresidual)),
    )


def moments(x: Any, axis: Any, mask: Any) -> tuple[Any, ...]:
    """Plain arguments for _core.moments."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    return axes.merge(x), axes.place, weights(mask, x, axes)
