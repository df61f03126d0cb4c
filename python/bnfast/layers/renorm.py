"""Batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275) in the NumPy layer.

    stddev = sqrt(variance + epsilon), s = max(renorm_stddev, sqrt(epsilon))
    r = clip(stddev/s, rmin, rmax), d = clip((mean - renorm_mean)/s, -dmax, dmax), both constants in the gradient
    y = gamma*(xhat*r + d) + beta, which is batch norm with scale = gamma*r and shift = beta + gamma*d
    dgamma = r*dscale + d*dshift, dbeta = dshift

A training pass first computes the moments, which give r and d, and then runs the usual step: x is read once more.
State, semantics and order of updates are Keras 3.15's: r and d use the renorm statistics from before this batch, and
moving_variance is moving_stddev**2 - epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._arguments import checks
from .._arguments.arrays import Array
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_train, moments
from ..functional.moments import Moments
from ..functional.renorm import renorm_correction
from .batch import Batch, ForwardPass, Policy, Renorm, State

__all__ = ["RENORM_STATE", "check_clipping", "check_renorm", "train"]

RENORM_STATE = ("moving_stddev", "renorm_mean", "renorm_stddev")  # in addition to moving_mean and moving_variance
BOUNDS = ("rmin", "rmax", "dmax")


def check_renorm(renorm: Any, clipping: Any, momentum: Any, virtual_batch_size: Any, correction: int) -> bool:
    """Whether renorm is on. Raises the errors of its arguments."""
    check_clipping(clipping)
    checks.real("renorm_momentum", momentum, 1.0)
    if not checks.boolean("renorm", renorm):
        return False
    if virtual_batch_size is not None:
        raise ValueError(f"virtual_batch_size must be None with renorm=True. Received: {virtual_batch_size}")
    if correction:
        raise ValueError(f"correction must be 0 with renorm=True. Received: {correction}")
    return True


def check_clipping(clipping: Any) -> dict[str, float | None]:
    """The bounds as a dict of floats and None."""
    if clipping is not None and not isinstance(clipping, Mapping):
        raise TypeError(f"renorm_clipping must be None or a dict of rmin, rmax, dmax. Received: {clipping!r}")
    given = dict(clipping or {})
    if unknown := [name for name in given if name not in BOUNDS]:
        raise ValueError(f"renorm_clipping must have no keys but rmin, rmax and dmax. Received: {unknown}")
    for name, bound in given.items():
        given[name] = None if bound is None else checks.real(f"renorm_clipping[{name!r}]", bound)
    low, high = given.get("rmin"), given.get("rmax")
    if low is not None and high is not None and low > high:
        raise ValueError(f"renorm_clipping must have rmin <= rmax. Received: {clipping}")
    return given


def train(batch: Batch, state: State, policy: Policy, renorm: Renorm, update: bool) -> ForwardPass:
    """One training pass. With `update`, the state is updated."""
    x, mask = batch.x, batch.mask
    bounds, epsilon = check_clipping(renorm.clipping), policy.epsilon
    batch_moments = moments(x, axis=batch.axis, mask=mask)
    renorm_stddev = np.maximum(state["renorm_stddev"], 0)  # renorm_correction rejects negative values; s is the same
    r, d = renorm_correction(
        batch_moments.mean, batch_moments.variance, state["renorm_mean"], renorm_stddev, epsilon=epsilon, **bounds
    )
    scale, shift = _scale_and_shift(r, d, batch.gamma, batch.beta)
    y, mean, _, invstd = batch_norm_train(
        x, scale, shift, epsilon=epsilon, mask=mask, nan_policy=policy.nan_policy, **batch.fused
    )
    has_values = bool(batch_moments.count > 0 and x.size)
    if update and has_values:
        _update(state, batch_moments, policy, renorm.momentum)
    dtype = state["renorm_mean"].dtype

    def backward(dy: Any, x: Array = x) -> GradResult:
        dx, dscale, dshift, dresidual = batch_norm_grad(dy, x, mean, invstd, scale, shift, mask=mask, **batch.fused)
        with np.errstate(over="ignore", invalid="ignore"):
            dgamma = (r * dscale + d * dshift).astype(dtype)
            return GradResult(dx, dgamma, dshift.astype(dtype), dresidual)

    return ForwardPass(y, backward, has_values)


def _scale_and_shift(r: Array, d: Array, gamma: Array | None, beta: Array | None) -> tuple[Array, Array]:
    """gamma*r and beta + gamma*d in float64, so that the kernels round them only once."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
        return scale, shift if beta is None else beta + shift


def _update(state: State, batch_moments: Moments, policy: Policy, renorm_momentum: float) -> None:
    mean, variance = batch_moments.mean, batch_moments.variance
    where = np.isfinite(mean) & np.isfinite(variance) if policy.nan_policy == "skip_update" else True

    def averaged(name: str, batch: Array, momentum: float) -> Array:
        new: Array = state[name].astype(np.float64) * momentum + batch * (1 - momentum)
        return new

    with np.errstate(over="ignore", invalid="ignore"):
        stddev = np.sqrt(variance + policy.epsilon)
        moving_stddev = averaged("moving_stddev", stddev, policy.momentum)
        new = {
            "moving_mean": averaged("moving_mean", mean, policy.momentum),
            "moving_variance": np.maximum(moving_stddev**2 - policy.epsilon, 0),
            "moving_stddev": moving_stddev,
            "renorm_mean": averaged("renorm_mean", mean, renorm_momentum),
            "renorm_stddev": averaged("renorm_stddev", stddev, renorm_momentum),
        }
        for name, values in new.items():
            np.copyto(state[name], values, casting="same_kind", where=where)
