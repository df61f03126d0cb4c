"""momentum=None: the moving statistics are the plain averages over all batches so far, which `batches` counts.

Batch number n + 1 gets the weight 1/(n + 1), that is, the momentum n/(n + 1), a tensor. An empty batch isn't counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from .batch import dtype_of, has_values
from .core import CoreStep, Finish, State
from .kernels import wide


def count(core: CoreStep) -> tuple[CoreStep, Finish]:
    """Transform: the momentum that belongs to this batch, and the count after it."""
    present = has_values(core.batch.x, core.batch.mask)
    batches = wide(core.state["batches"])

    def finish(y: Any, state: State) -> tuple[Any, State]:
        old = core.state["batches"]
        counted = ops.logical_and(present, old < np.iinfo(dtype_of(old)).max)  # the last one doesn't wrap
        return y, {**state, "batches": old + ops.cast(counted, dtype_of(old))}

    return core._replace(momentum=batches / (batches + 1)), finish
