"""Batch renormalization (Ioffe 2017, arXiv:1702.03275) as a transform: new parameters before the step, new state after.

    stddev = sqrt(variance + epsilon), s = max(renorm_stddev, sqrt(epsilon))
    r = clip(stddev/s, rmin, rmax), d = clip((mean - renorm_mean)/s, -dmax, dmax), both constants to the gradient
    y = gamma*(xhat*r + d) + beta, which is batch norm with gamma*r and beta + gamma*d in place of gamma and beta

Vectors have shape (C,) and are float64. State, semantics and order of updates are those of Keras 3.15: r and d are
computed from the renorm statistics before this batch, and moving_variance is moving_stddev squared, minus epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from keras import ops

from ...._arguments.features import RENORM_BOUNDS, RENORM_NAMES, check_renorm
from .batch import constant, dtype_of, mask_varies_by_channel
from .core import CoreStep, Finish, State
from .kernels import moments, wide

NAMES = RENORM_NAMES


class Renorm(NamedTuple):
    """clipping: maps rmin, rmax and dmax, or some of them, to numbers or scalar tensors."""

    clipping: Mapping[str, Any]
    momentum: float


def check(clipping: Any, momentum: Any) -> None:
    """Raises the errors that Keras doesn't raise, or raises without the name of the argument."""
    check_renorm(clipping, momentum, "a number or a scalar tensor", lambda bound: False)


def plain_clipping(clipping: Any) -> Any:
    """The clipping as a config holds it: each tensor is replaced by its value."""
    if not clipping:
        return clipping
    return {name: float(bound) if ops.is_tensor(bound) else bound for name, bound in clipping.items()}


def transform(core: CoreStep, renorm: Renorm) -> tuple[CoreStep, Finish]:
    """Composed parameters before the core step; after it, the state by the rules of renorm."""
    (x, gamma, beta, mask, _), epsilon = core.batch, core.options.epsilon
    mean, variance, valid = moments(constant(x), mask, core.options)
    if core.nan_policy == "skip_update":
        valid = ops.logical_and(valid, ops.isfinite(mean) & ops.isfinite(variance))
    scale, shift = compose(mean, variance, core.state, gamma, beta, epsilon, renorm)

    def finish(y: Any, _: State) -> tuple[Any, State]:
        return y, {**core.state, **update(mean, variance, valid, core.state, core.momentum, epsilon, renorm)}

    inner = core._replace(batch=core.batch._replace(gamma=scale, beta=shift), momentum=0.0)
    return inner._replace(on_reference=mask_varies_by_channel(mask, core.options)), finish


def compose(
    mean: Any,
    variance: Any,
    state: Mapping[str, Any],
    gamma: Any,
    beta: Any,
    epsilon: Any,
    renorm: Renorm,
) -> tuple[Any, Any]:
    """gamma*r and beta + gamma*d in the dtype of the state; differentiable with respect to gamma and beta, not x."""
    floor = ops.maximum(wide(state["renorm_stddev"]), ops.sqrt(wide(epsilon)))
    r = ops.sqrt(variance + epsilon) / floor
    d = (mean - wide(state["renorm_mean"])) / floor
    rmin, rmax, dmax = (_bound(renorm.clipping.get(name)) for name in RENORM_BOUNDS)
    r = r if rmin is None else ops.maximum(r, rmin)
    r = r if rmax is None else ops.minimum(r, rmax)
    d = d if dmax is None else ops.maximum(ops.minimum(d, dmax), -dmax)
    scale, shift = constant(r), constant(d)
    if gamma is not None:
        scale, shift = (wide(gamma) * vector for vector in (scale, shift))
    if beta is not None:
        shift = shift + wide(beta)
    name = dtype_of(state["renorm_mean"])
    return ops.cast(scale, name), ops.cast(shift, name)


def _bound(value: Any) -> Any:
    return None if value is None else wide(value)


def update(
    mean: Any,
    variance: Any,
    present: Any,
    state: Mapping[str, Any],
    momentum: Any,
    epsilon: Any,
    renorm: Renorm,
) -> dict[str, Any]:
    """The state after this batch. present: whether to update, a scalar or one value per channel."""
    stddev = ops.sqrt(variance + epsilon)

    def moved(name: str, batch: Any, weight: Any) -> Any:
        return wide(state[name]) * weight + batch * (1 - weight)

    moving_stddev = moved("moving_stddev", stddev, momentum)
    new = {
        "moving_mean": moved("moving_mean", mean, momentum),
        "moving_variance": ops.relu(ops.square(moving_stddev) - epsilon),
        "moving_stddev": moving_stddev,
        "renorm_mean": moved("renorm_mean", mean, renorm.momentum),
        "renorm_stddev": moved("renorm_stddev", stddev, renorm.momentum),
    }
    return {
        name: ops.where(present, ops.cast(value, dtype_of(state[name])), state[name]) for name, value in new.items()
    }
