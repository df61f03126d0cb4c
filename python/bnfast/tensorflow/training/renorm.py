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

import tensorflow as tf

from ..._arguments.features import RENORM_BOUNDS, RENORM_NAMES, check_renorm
from .. import ops, reference
from ..batch import has_values, mask_varies_by_channel
from ..scalars import Scalar
from .core import CoreStep, Finish, State

NAMES = RENORM_NAMES


class Renorm(NamedTuple):
    """clipping: maps rmin, rmax and dmax, or some of them, to numbers or scalar tf.Variables."""

    clipping: Mapping[str, Any]
    momentum: float


def check(clipping: Any, momentum: Any) -> None:
    """Raises the errors that Keras doesn't raise, or raises without the name of the argument."""
    check_renorm(clipping, momentum, "a number or a scalar tf.Variable", _is_scalar_variable)


def _is_scalar_variable(bound: Any) -> bool | None:
    if not isinstance(bound, tf.Variable):
        return False
    return (bound.shape.rank == 0 and bound.dtype.is_floating) or None


def plain_clipping(clipping: Any) -> Any:
    """The clipping as a config holds it: each variable is replaced by its current value."""
    if not clipping:
        return clipping
    return {name: float(bound.numpy()) if isinstance(bound, tf.Variable) else bound for name, bound in clipping.items()}


def transform(core: CoreStep, renorm: Renorm) -> tuple[CoreStep, Finish]:
    """Composed parameters before the core step; after it, the state by the rules of renorm."""
    (x, gamma, beta, mask, _), epsilon = core.batch, core.options.epsilon
    mean, variance, valid = _moments(tf.stop_gradient(x), mask, core)
    scale, shift = compose(mean, variance, core.state, gamma, beta, epsilon, renorm)

    def finish(y: tf.Tensor, _: State) -> tuple[tf.Tensor, State]:
        return y, {**core.state, **update(mean, variance, valid, core.state, core.momentum, epsilon, renorm)}

    return core._replace(batch=core.batch._replace(gamma=scale, beta=shift), momentum=0.0), finish


def _moments(x: tf.Tensor, mask: tf.Tensor | None, core: CoreStep) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The batch's mean and variance in float64, and whether they may update the state."""
    if mask_varies_by_channel(mask, core.options):
        _, mean, variance, total = reference.train(x, None, None, mask, core.options)
        valid = total > 0
    else:
        mean, variance = ops.moments(x, mask=mask, options=core.options, bridge=core.bridge)
        valid = has_values(x, mask)
    if core.nan_policy == "skip_update":
        valid &= tf.math.is_finite(mean) & tf.math.is_finite(variance)
    return mean, variance, valid


def compose(
    mean: tf.Tensor,
    variance: tf.Tensor,
    state: Mapping[str, tf.Tensor],
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: Scalar,
    renorm: Renorm,
) -> tuple[tf.Tensor, tf.Tensor]:
    """gamma*r and beta + gamma*d in the dtype of the state; differentiable with respect to gamma and beta, not x."""
    floor = tf.maximum(tf.cast(state["renorm_stddev"], tf.float64), tf.sqrt(tf.convert_to_tensor(epsilon, tf.float64)))
    r = tf.sqrt(variance + epsilon) / floor
    d = (mean - tf.cast(state["renorm_mean"], tf.float64)) / floor
    rmin, rmax, dmax = map(_wide, map(renorm.clipping.get, RENORM_BOUNDS))
    r = r if rmin is None else tf.maximum(r, rmin)
    r = r if rmax is None else tf.minimum(r, rmax)
    d = d if dmax is None else tf.maximum(tf.minimum(d, dmax), -dmax)
    scale, shift = tf.stop_gradient(r), tf.stop_gradient(d)
    if gamma is not None:
        scale, shift = (tf.cast(gamma, tf.float64) * vector for vector in (scale, shift))
    if beta is not None:
        shift += tf.cast(beta, tf.float64)
    dtype = state["renorm_mean"].dtype
    return tf.cast(scale, dtype), tf.cast(shift, dtype)


def _wide(bound: Any) -> tf.Tensor | None:
    """The bound as a float64 tensor; tf.cast would round a Python float to float32 first."""
    if bound is None or tf.is_tensor(bound):  # a variable counts as a tensor here
        return None if bound is None else tf.cast(bound, tf.float64)
    return tf.constant(float(bound), tf.float64)


def update(
    mean: tf.Tensor,
    variance: tf.Tensor,
    present: tf.Tensor,
    state: Mapping[str, tf.Tensor],
    momentum: Scalar,
    epsilon: Scalar,
    renorm: Renorm,
) -> dict[str, tf.Tensor]:
    """The state after this batch. present: whether to update, a scalar or one value per channel."""
    stddev = tf.sqrt(variance + epsilon)

    def moved(name: str, batch: tf.Tensor, weight: float) -> tf.Tensor:
        return tf.cast(state[name], tf.float64) * weight + batch * (1 - weight)

    moving_stddev = moved("moving_stddev", stddev, momentum)
    new = {
        "moving_mean": moved("moving_mean", mean, momentum),
        "moving_variance": tf.nn.relu(moving_stddev**2 - epsilon),
        "moving_stddev": moving_stddev,
        "renorm_mean": moved("renorm_mean", mean, renorm.momentum),
        "renorm_stddev": moved("renorm_stddev", stddev, renorm.momentum),
    }
    return {name: tf.where(present, tf.cast(value, state[name].dtype), state[name]) for name, value in new.items()}
