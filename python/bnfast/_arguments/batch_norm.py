"""Argument lists for _core's batch norm functions, and every user-facing error of the public functions.

train, infer, grad and moments take the arguments of the public function of that name. Each returns the arguments of
the _core function in its order: C-contiguous ndarrays, Python scalars, checked strings. Several channel axes are
merged into one (axes.py); functional/batch_norm.py restores the shapes of the results.
Nothing is written here, so a call that raises has changed nothing. Messages say what was wanted and what was received:
ValueError for values and shapes, TypeError for types and dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import checks
from .array_checks import (
    check_disjoint,
    grad_vectors,
    like,
    mask_weights,
    moving_vector,
    optional_mask,
    output,
    tensor,
    vector,
)
from .axes import Axes
from .checks import NAN_POLICIES, boolean, check_correction, choice, real

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
    """The arguments of _core.train."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    gamma = vector("gamma", gamma, axes)
    beta = vector("beta", beta, axes)
    if (moving_mean is None) != (moving_variance is None):
        given = "moving_mean" if moving_variance is None else "moving_variance"
        raise ValueError(f"moving_mean and moving_variance must be given together. Received: {given} alone")
    moving_mean = moving_vector("moving_mean", moving_mean, axes)
    moving_variance = moving_vector("moving_variance", moving_variance, axes)
    momentum = real("momentum", momentum, 1.0)
    epsilon = real("epsilon", epsilon)
    weights = mask_weights(mask, x, axes)
    activation = checks.activation(activation)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    correction = check_correction(correction)
    nan_policy = choice("nan_policy", nan_policy, NAN_POLICIES)
    inputs = {"gamma": gamma, "beta": beta, "mask": optional_mask(mask), "residual": residual}
    moving = {"moving_mean": moving_mean, "moving_variance": moving_variance}
    out = output(out, {"x": x}, inputs | moving)
    if moving_mean is not None:
        check_disjoint("moving_mean", moving_mean, {"moving_variance": moving_variance, "x": x} | inputs)
        check_disjoint("moving_variance", moving_variance, {"x": x} | inputs)
    vectors = (axes.flatten(a) for a in (gamma, beta, moving_mean, moving_variance))
    return (
        axes.merge(x),
        *vectors,
        axes.merged_axis,
        momentum,
        epsilon,
        weights,
        activation,
        negative_slope,
        axes.merge(residual),
        correction,
        nan_policy,
        axes.merge_out(out),
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
    """The arguments of _core.infer."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    moving_mean = vector("moving_mean", moving_mean, axes, required=True)
    moving_variance = vector("moving_variance", moving_variance, axes, required=True)
    gamma = vector("gamma", gamma, axes)
    beta = vector("beta", beta, axes)
    epsilon = real("epsilon", epsilon)
    activation = checks.activation(activation)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    inputs = {"gamma": gamma, "beta": beta, "moving_mean": moving_mean, "moving_variance": moving_variance}
    out = output(out, {"x": x}, inputs | {"residual": residual})
    vectors = (axes.flatten(a) for a in (moving_mean, moving_variance, gamma, beta))
    return (
        axes.merge(x),
        *vectors,
        axes.merged_axis,
        epsilon,
        activation,
        negative_slope,
        axes.merge(residual),
        axes.merge_out(out),
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
    """The arguments of _core.grad."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    dy = like("dy", tensor("dy", dy), "x", x)
    vectors = grad_vectors(axes, mean, invstd, gamma=gamma, beta=beta, dmean=dmean, dvariance=dvariance)
    weights = mask_weights(mask, x, axes)
    activation = checks.activation(activation)
    negative_slope = real("negative_slope", negative_slope)
    residual = like("residual", residual, "x", x)
    y = like("y", y, "x", x)
    if residual is not None and y is not None:
        raise ValueError("y must be None if residual is given, as y replaces it. Received: both")
    if y is not None and activation not in checks.PIECEWISE_LINEAR:
        raise ValueError(
            f"y must be None with activation={activation!r}, whose gradient needs the residual in its place. "
            f"Received: an array"
        )
    training = boolean("training", training)
    others = vectors | {"mask": optional_mask(mask), "residual": residual, "y": y}
    out = output(out, {"dy": dy, "x": x}, others)
    out_dresidual = output(out_dresidual, {"x": x}, others | {"dy": dy, "out": out}, "out_dresidual")
    if out_dresidual is not None and (activation is None or (residual is None and y is None)):
        raise ValueError(
            "out_dresidual must be None without an activation and residual or y, as dresidual is then dy or None. "
            f"Received: {'neither residual nor y' if activation else 'activation=None'}"
        )
    gamma, beta = axes.flatten(vectors["gamma"]), axes.flatten(vectors["beta"])
    mean, invstd, dmean, dvariance = (
        axes.flatten(vectors[name], np.float64) for name in ("mean", "invstd", "dmean", "dvariance")
    )
    return (
        axes.merge(dy),
        axes.merge(x),
        mean,
        invstd,
        gamma,
        beta,
        axes.merged_axis,
        weights,
        activation,
        negative_slope,
        axes.merge(residual),
        axes.merge(y),
        training,
        dmean,
        dvariance,
        axes.merge_out(out),
        axes.merge_out(out_dresidual),
    )


def moments(x: Any, axis: Any, mask: Any) -> tuple[Any, ...]:
    """The arguments of _core.moments."""
    x = tensor("x", x)
    axes = Axes.of(axis, x)
    return axes.merge(x), axes.merged_axis, mask_weights(mask, x, axes)
