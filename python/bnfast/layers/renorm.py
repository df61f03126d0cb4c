"""Batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275) in the NumPy layer: two calls of the kernels.

    stddev = sqrt(variance + epsilon), s = max(renorm_stddev, sqrt(epsilon))
    r = clip(stddev/s, rmin, rmax), d = clip((mean - renorm_mean)/s, -dmax, dmax), both constants to the gradient
    y = gamma*(xhat*r + d) + beta, which is batch norm with scale = gamma*r and shift = beta + gamma*d
    dgamma = r*dscale + d*dshift, dbeta = dshift

First the moments, which make r and d, then the usual step: x is read once more. State, semantics and order are Keras
3.15's: r and d come of the renorm statistics as they were before this batch, and moving_variance is moving_stddev
squared, less epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_train, moments
from ..functional.moments import Moments
from ..functional.renorm import renorm_correction
from .batch import Batch, Passed, Policy, Renorm, State

__all__ = ["NAMES", "check", "check_clipping", "train"]

NAMES = ("moving_stddev", "renorm_mean", "renorm_stddev")  # its vectors beyond moving_mean and moving_variance
BOUNDS = ("rmin", "rmax", "dmax")


def check(renorm: Any, clipping: Any, momentum: Any, virtual_batch_size: Any, correction: int) -> bool:
    """Whether there is renorm, and the errors of its arguments."""
    check_clipping(clipping)
    _checks.real("renorm_momentum", momentum, 1.0)
    if not _checks.boolean("renorm", renorm):
        return False
    if virtual_batch_size is not None:
        raise ValueError(f"virtual_batch_size must be None where renorm=True. Received: {virtual_batch_size}")
    if correction:
        raise ValueError(f"correction must be 0 where renorm=True. Received: {correction}")
    return True


def check_clipping(clipping: Any) -> dict[str, float | None]:
    """The bounds by name, plain."""
    if clipping is not None and not isinstance(clipping, Mapping):
        raise TypeError(f"renorm_clipping must be None or a dict of rmin, rmax, dmax. Received: {clipping!r}")
    given = dict(clipping or {})
    if unknown := [name for name in given if name not in BOUNDS]:
        raise ValueError(f"renorm_clipping must have no keys but rmin, rmax and dmax. Received: {unknown}")
    for name, bound in given.items():
        given[name] = None if bound is None else _checks.real(f"renorm_clipping[{name!r}]", bound)
    low, high = given.get("rmin"), given.get("rmax")
    if low is not None and high is not None and low > high:
        raise ValueError(f"renorm_clipping must have rmin of at most rmax. Received: {clipping}")
    return given


def train(batch: Batch, state: State, policy: Policy, renorm: Renorm, moves: bool) -> Passed:
    """One training pass; where `moves`, the state moves."""
    x, axis, _, gamma, beta, mask, *_ = batch
    bounds, epsilon = check_clipping(renorm.clipping), policy.epsilon
    of_batch = moments(x, axis=axis, mask=mask)
    spread = np.maximum(state["renorm_stddev"], 0)  # s has a floor of sqrt(epsilon) in any case
    r, d = renorm_correction(*of_batch[1:], state["renorm_mean"], spread, epsilon=epsilon, **bounds)
    scale, shift = _composed(r, d, gamma, beta)
    y, mean, _, invstd = batch_norm_train(
        *(x, scale, shift), epsilon=epsilon, mask=mask, nan_policy=policy.nan_policy, **batch.fused
    )
    present = bool(of_batch.count > 0 and x.size)
    if moves and present:
        _update(state, of_batch, policy, renorm.momentum)
    dtype = state["renorm_mean"].dtype

    def backward(dy: Any, x: Array = x) -> GradResult:
        dx, dscale, dshift, dresidual = batch_norm_grad(*(dy, x, mean, invstd, scale, shift), mask=mask, **batch.fused)
        with np.errstate(over="ignore", invalid="ignore"):
            dgamma = (r * dscale + d * dshift).astype(dtype)
            return GradResult(dx, dgamma, dshift.astype(dtype), dresidual)

    return Passed(y, backward, present)


def _composed(r: Array, d: Array, gamma: Array | None, beta: Array | None) -> tuple[Array, Array]:
    """scale and shift, which stay float64: the kernels round what becomes of them, once."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
        return scale, shift if beta is None else beta + shift


def _update(state: State, of_batch: Moments, policy: Policy, renorm_momentum: float) -> None:
    mean, variance = of_batch.mean, of_batch.variance
    where = np.isfinite(mean) & np.isfinite(variance) if policy.nan_policy == "skip_update" else True

    def moved(name: str, batch: Array, momentum: float) -> Array:
        new: Array = state[name].astype(np.float64) * momentum + batch * (1 - momentum)
        return new

    with np.errstate(over="ignore", invalid="ignore"):
        stddev = np.sqrt(variance + policy.epsilon)
        moving_stddev = moved("moving_stddev", stddev, policy.momentum)
        new = {
            "moving_mean": moved("moving_mean", mean, policy.momentum),
            "moving_variance": np.maximum(moving_stddev**2 - policy.epsilon, 0),
            "moving_stddev": moving_stddev,
            "renorm_mean": moved("renorm_mean", mean, renorm_momentum),
            "renorm_stddev": moved("renorm_stddev", stddev, renorm_momentum),
        }
        for name, values in new.items():
            np.copyto(state[name], values, casting="same_kind", where=where)
