"""One training step of the Keras layer: the batch's y, and the layer's statistics after it.

    step    batch, state -> y, state

What a layer adds to batch norm is put between reduce, fold and apply here, with TensorFlow ops on (C,) vectors; every
pass over x is one of `bridge`'s. Passes beyond those of plain training (one or two reads and a write): renorm reads x
once more for its moments; through bnfast's own TensorFlow ops, which have none for moments alone, it writes once too.
The state is a dict of the weights that aren't trained, by name: (C,) vectors, and the number of batches if counted.
Nothing of it passes a gradient on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from .. import ops as bridge
from .. import reference as formula
from ..reference import Batch, Options
from . import bias as biases
from . import renorm as renorms
from .ghosts import Ghosts

State = dict[str, tf.Tensor]
NAN_POLICIES = ("propagate", "skip_update")


class Policy(NamedTuple):
    """What a layer does in training beside normalizing. momentum None: the average of all batches, by count."""

    momentum: float | None
    correction: int = 0
    nan_policy: str = "propagate"
    renorm: renorms.Renorm | None = None
    ghosts: Ghosts | None = None  # not together with renorm
    bridge: str = "auto"
    synchronized: bool = False  # more than one replica: `synchronized.step` stands for `step`
    absorbs_bias: bool = False  # nothing else reads x: a bias added to it last may be left out, as `bias` does


def step(batch: Batch, state: Mapping[str, tf.Tensor], options: Options, policy: Policy) -> tuple[tf.Tensor, State]:
    """y in x's shape and dtype, and the new state. batch.mask: of x's rank, any that broadcasts to x."""
    x, mask = batch.x, batch.mask
    momentum, moved = policy.momentum, dict(state)
    if momentum is None:
        present = _present(x, mask)
        count = tf.cast(state["batches"], tf.float64)
        momentum = count / (count + 1)
        moved["batches"] += tf.cast(present, moved["batches"].dtype)
    if policy.renorm is not None:
        mean, variance, valid = _moments(x, mask, options, policy)
        affine = renorms.compose(mean, variance, state, batch.gamma, batch.beta, options.epsilon, policy.renorm)
        batch = batch._replace(gamma=affine[0], beta=affine[1])
        moved |= renorms.update(mean, variance, valid, state, momentum, options.epsilon, policy.renorm)
    if policy.ghosts is not None:
        y, means, variances, valid = _ghosts(batch, options, policy, policy.ghosts)
        for name, statistic in (("moving_mean", means), ("moving_variance", variances)):
            wide = tf.cast(state[name], tf.float64) * momentum + statistic * (1 - momentum)
            moved[name] = tf.where(valid, tf.cast(wide, state[name].dtype), state[name])
        return y, moved
    # bnfast's TensorFlow op has its momentum as an attribute: a tensor can't be one
    fixed = 0.0 if policy.momentum is None else policy.momentum
    bias = biases.of(batch, options.axis) if policy.absorbs_bias and policy.renorm is None else None
    moving_mean = state["moving_mean"]
    if bias is not None:
        batch, moving_mean = biases.without(batch, bias), biases.less(moving_mean, bias)
    given = (batch, (moving_mean, state["moving_variance"]), fixed, options)
    words: dict[str, Any] = {"correction": policy.correction, "nan_policy": policy.nan_policy}
    if _by_channel(mask, options):
        y, *moving = formula.train_step(*given, **words)
    else:
        y, *moving = bridge.train_step(*given, policy.bridge, **words)
    if bias is not None:
        moving[0] = biases.more(moving[0], state["moving_mean"], bias)
    if policy.renorm is None:
        for name, new in zip(("moving_mean", "moving_variance"), moving, strict=True):
            moved[name] = new if policy.momentum is not None else _between(new, state[name], momentum)
    return y, moved


def _ghosts(
    batch: Batch, options: Options, policy: Policy, ghosts: Ghosts
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """y, the ghosts' mean statistics (those of tf.keras 2: no ghost counts more than another), whether they are valid.

    A mask differs between ghosts, so it makes weights of their own for each channel, which run on TensorFlow's ops.
    """
    x, axis = batch.x, options.axis % batch.x.shape.rank
    count, channels = ghosts.count(x), x.shape[axis]
    gamma, beta = (None if v is None else tf.tile(tf.cast(v, tf.float64), [count]) for v in (batch.gamma, batch.beta))
    mask = None if batch.mask is None else tf.broadcast_to(batch.mask, tf.shape(x))
    tensors = (None if tensor is None else ghosts.merge(tensor, axis, count) for tensor in (x, mask, batch.residual))
    x_of_ghosts, mask, residual = tensors
    zeros = tf.zeros([count * channels], tf.float64)
    given = (Batch(x_of_ghosts, gamma, beta, mask, residual), (zeros, zeros), 0.0, options._replace(axis=axis))
    words: dict[str, Any] = {"correction": policy.correction}
    if mask is None:
        y, *statistics = bridge.train_step(*given, policy.bridge, **words)
        weights = tf.ones([count, 1], tf.float64)
    else:
        y, *statistics = formula.train_step(*given, **words)
        present = tf.reduce_any(mask, [i for i in range(x.shape.rank) if i != axis])
        weights = tf.cast(tf.reshape(present, [count, channels]), tf.float64)
    total = tf.reduce_sum(weights, 0)
    sums = (tf.reduce_sum(weights * tf.reshape(statistic, [count, channels]), 0) for statistic in statistics)
    mean, variance = (tf.math.divide_no_nan(s, total) for s in sums)
    valid = (total > 0) & (tf.size(x) > 0)
    if policy.nan_policy == "skip_update":
        valid &= tf.math.is_finite(mean) & tf.math.is_finite(variance)
    return ghosts.split(y, x, axis, count), tf.stop_gradient(mean), tf.stop_gradient(variance), valid


def _between(batch: tf.Tensor, old: tf.Tensor, momentum: tf.Tensor) -> tf.Tensor:
    """old*momentum + batch*(1 - momentum), and exactly old where they are equal, as in channels that were skipped."""
    wide = tf.cast(old, tf.float64)
    return tf.cast(tf.cast(batch, tf.float64) + (wide - tf.cast(batch, tf.float64)) * momentum, old.dtype)


def _by_channel(mask: tf.Tensor | None, options: Options) -> bool:
    """Whether each channel has weights of its own: the kernels don't take these."""
    return mask is not None and mask.shape[options.axis] != 1


def _present(x: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Whether there is anything in the batch."""
    there = tf.size(x) > 0
    return there if mask is None else there & tf.reduce_any(tf.cast(mask, tf.bool))


def _moments(
    x: tf.Tensor, mask: tf.Tensor | None, options: Options, policy: Policy
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The batch's mean and variance in float64, as constants, and whether they are to move statistics."""
    x = tf.stop_gradient(x)
    if _by_channel(mask, options):
        _, mean, variance, total = formula.train(x, None, None, mask, options)
        valid = total > 0
    else:
        mean, variance = bridge.moments(x, mask=mask, options=options, bridge=policy.bridge)
        valid = _present(x, mask)
    if policy.nan_policy == "skip_update":
        valid &= tf.math.is_finite(mean) & tf.math.is_finite(variance)
    return mean, variance, valid


def parameter(variable: Any) -> tf.Tensor:
    """A weight as the kernels take it, (C,) and float32 or float64; a count as it is."""
    value = tf.convert_to_tensor(variable)
    value = tf.reshape(value, [-1]) if value.shape.rank > 1 else value
    return tf.cast(value, tf.float32) if value.dtype in (tf.float16, tf.bfloat16) else value
