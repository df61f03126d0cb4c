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
        counted = tf.logical_and(present, old < old.dtype.max)  # the last one doesn't wrap
        return y, {**state, "batches": old + tf.cast(counted, old.dtype)}

    return core._replace(momentum=batches / (batches + 1)), finish
