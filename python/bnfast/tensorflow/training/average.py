"""momentum=None: the moving statistics are the plain averages over all batches so far, which `batches` counts.

Batch number n + 1 gets the weight 1/(n + 1), that is, the momentum n/(n + 1), a tensor. An empty batch isn't counted.
"""

from __future__ import annotations

import tensorflow as tf

from ..batch import has_values
from .core import CoreStep, Finish, State


def count(core: CoreStep) -> tuple[CoreStep, Finish]:
    """Transform: the momentum that belongs to this batch, and the count after it."""
    present = has_values(core.batch.x, core.batch.mask)
    batches = tf.cast(core.state["batches"], tf.float64)

    def finish(y: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
        old = core.state["batches"]
        return y, {**state, "batches": old + tf.cast(present, old.dtype)}

    return core._replace(momentum=batches / (batches + 1)), finish


def blend(core: CoreStep) -> tuple[CoreStep, Finish]:
    """Transform: a momentum that is a tensor, which the kernels don't accept; with momentum 0 they return the batch's
    statistics, or the old ones in channels that the update skips."""

    def finish(y: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
        blended = {name: _between(state[name], core.state[name], core.momentum) for name in _MOVING}
        return y, {**state, **blended}

    return core._replace(momentum=0.0), finish


_MOVING = ("moving_mean", "moving_variance")


def _between(batch: tf.Tensor, old: tf.Tensor, momentum: tf.Tensor) -> tf.Tensor:
    """old*momentum + batch*(1 - momentum), and exactly old where the two are equal, as in skipped channels."""
    wide = tf.cast(old, tf.float64)
    return tf.cast(tf.cast(batch, tf.float64) + (wide - tf.cast(batch, tf.float64)) * momentum, old.dtype)
