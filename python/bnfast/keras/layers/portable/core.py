"""The core step of a training call, and what the features of a layer put around it.

    core step   kernels.train_step: y and the updated moving statistics of one batch
    transform   core step -> core step, finish; changes the arguments before the core step
    finish      y, state -> y, state; completes the results after it

`step` applies the transforms from the outermost to the innermost, runs the core step, and calls the `finish` functions
in reverse. Everything a transform adds is Keras's ops on vectors of shape (C,), unless its file says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from keras import ops

from .batch import Batch, Options, dtype_of
from .kernels import wide

# The weights that aren't trained, by name: (C,) vectors and, if counted, the number of batches. No gradient passes.
State: TypeAlias = dict[str, Any]
Finish: TypeAlias = Callable[[Any, State], tuple[Any, State]]

NAN_POLICIES = ("propagate", "skip_update")


class CoreStep(NamedTuple):
    """The arguments of the core step."""

    batch: Batch
    state: State
    momentum: Any  # or None (the average over batches) until a transform replaces it
    options: Options
    correction: int
    nan_policy: str
    on_reference: bool = False  # run on Keras's own ops


Transform: TypeAlias = Callable[[CoreStep], tuple[CoreStep, Finish]]


def update_valid(state: State, statistics: State, momentum: Any, valid: Any) -> State:
    """state*momentum + statistics*(1 - momentum) for the names in `statistics`, where valid; computed in float64."""
    moved = {}
    for name, statistic in statistics.items():
        new = wide(state[name]) * momentum + statistic * (1 - momentum)
        moved[name] = ops.where(valid, ops.cast(new, dtype_of(state[name])), state[name])
    return {**state, **moved}
