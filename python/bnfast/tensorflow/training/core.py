"""The core step of a training call, and what the features of a layer put around it.

    core step   ops.train_step: y and the updated moving statistics of one batch
    transform   core step -> core step, finish; changes the arguments before the core step
    finish      y, state -> y, state; completes the results after it

`step` applies the transforms from the outermost to the innermost, runs the core step, and calls the `finish` functions
in reverse. Everything a transform adds is TensorFlow ops on vectors of shape (C,), unless its file says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import tensorflow as tf

from ..batch import Batch, Options
from ..scalars import Scalar

# The weights that aren't trained, by name: (C,) vectors and, if counted, the number of batches. No gradient passes.
State: TypeAlias = dict[str, tf.Tensor]
Finish: TypeAlias = Callable[[tf.Tensor, State], tuple[tf.Tensor, State]]

NAN_POLICIES = ("propagate", "skip_update")


class CoreStep(NamedTuple):
    """The arguments of the core step."""

    batch: Batch
    state: State
    momentum: Scalar  # or None (the average over batches) until a transform replaces it
    options: Options
    correction: int
    nan_policy: str
    bridge: str
    on_reference: bool = False  # run on TensorFlow's own ops


Transform: TypeAlias = Callable[[CoreStep], tuple[CoreStep, Finish]]


def update_valid(state: State, statistics: State, momentum: Scalar, valid: tf.Tensor) -> State:
    """state*momentum + statistics*(1 - momentum) for the names in `statistics`, where valid; computed in float64."""
    moved = {}
    for name, statistic in statistics.items():
        wide = tf.cast(state[name], tf.float64) * momentum + statistic * (1 - momentum)
        moved[name] = tf.where(valid, tf.cast(wide, state[name].dtype), state[name])
    return {**state, **moved}
