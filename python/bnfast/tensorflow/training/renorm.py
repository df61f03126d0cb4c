"""Batch renormalization (Ioffe 2017, arXiv:1702.03275) between the steps: what becomes of statistics and parameters.

    stddev = sqrt(variance + epsilon), s = max(renorm_stddev, sqrt(epsilon))
    r = clip(stddev/s, rmin, rmax), d = clip((mean - renorm_mean)/s, -dmax, dmax), both constants to the gradient
    y = gamma*(xhat*r + d) + beta, which is batch norm with gamma*r and beta + gamma*d in place of gamma and beta

Vectors are (C,) and float64. State, semantics and order of updates are those of Keras 3.15: r and d come from the
renorm statistics as they were before this batch, and moving_variance is moving_stddev squared, less epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

NAMES = ("moving_stddev", "renorm_mean", "renorm_stddev")  # its weights beyond moving_mean and moving_variance
_BOUNDS = ("rmin", "rmax", "dmax")


class Renorm(NamedTuple):
    """clipping: a mapping of rmin, rmax and dmax, or some of them, to numbers or scalar tf.Variables."""

    clipping: Mapping[str, Any]
    momentum: float


def check(clipping: Any, momentum: Any) -> None:
    """The errors that Keras doesn't raise, or not by name."""
    if clipping is not None and not isinstance(clipping, Mapping):
        raise TypeError(f"renorm_clipping must be a dict of rmin, rmax, dmax. Received: {clipping!r}")
    for name in _BOUNDS:
        bound = (clipping or {}).get(name)
        if bound is None or (isinstance(bound, tf.Variable) and bound.shape.rank == 0 and bound.dtype.is_floating):
            continue
        if isinstance(bound, bool) or not hasattr(bound, "__float__") or isinstance(bound, tf.Variable):
            raise TypeError(f"renorm_clipping[{name!r}] must be a number or a scalar tf.Variable. Received: {bound!r}")
        if not float(bound) >= 0:
            raise ValueError(f"dmax should be non-negative, and rmin and rmax too. Received: {name}={bound}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum <= 1:
        raise ValueError(f"renorm_momentum must be in [0, 1]. Received: {momentum!r}")


def plain_clipping(clipping: Any) -> Any:
    """The clipping as a config holds it: variables as the numbers they are now."""
    if not clipping:
        return clipping
    return {name: float(bound.numpy()) if isinstance(bound, tf.Variable) else bound for name, bound in clipping.items()}


def compose(
    mean: tf.Tensor,
    variance: tf.Tensor,
    state: Mapping[str, tf.Tensor],
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    epsilon: float,
    renorm: Renorm,
) -> tuple[tf.Tensor, tf.Tensor]:
    """What stands for gamma and beta, in their dtype (that of the state); differentiable in the two, not in x."""
    floor = tf.maximum(tf.cast(state["renorm_stddev"], tf.float64), math.sqrt(epsilon))
    r = tf.sqrt(variance + epsilon) / floor
    d = (mean - tf.cast(state["renorm_mean"], tf.float64)) / floor
    rmin, rmax, dmax = map(_wide, map(renorm.clipping.get, _BOUNDS))
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
    """tf.cast would take a Python float through float32."""
    if bound is None or tf.is_tensor(bound):  # a variable is one too
        return None if bound is None else tf.cast(bound, tf.float64)
    return tf.constant(float(bound), tf.float64)


def update(
    mean: tf.Tensor,
    variance: tf.Tensor,
    present: tf.Tensor,
    state: Mapping[str, tf.Tensor],
    momentum: float,
    epsilon: float,
    renorm: Renorm,
) -> dict[str, tf.Tensor]:
    """The state after this batch. present: whether the batch held anything, a scalar or one a channel."""
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
