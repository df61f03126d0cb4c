"""One call of a layer: the batch's y, and the layer's statistics after it.

    step    batch, state -> y, state

The mode of the call selects the statistics that normalize. In training, each feature that a layer adds to plain batch
norm (averages, renorm, ghost batches, adjustment) is a transform around one core step, ops.train_step.
Passes over x beyond those of plain training (one or two reads and one write): renorm reads x once more for its moments
and, through bnfast's TensorFlow op, which has none for moments alone, writes once more; adjustment is described in its
file. Normalizing with the moving statistics while updating them takes a second pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from .. import fusion, ops, reference
from ..batch import Batch, Options, mask_varies_by_channel
from ..mode import Mode
from ..scalars import Scalar
from . import adjustment, average, ghosts, record, renorm, synchronized
from .core import CoreStep, Finish, State, Transform

__all__ = ["Policy", "step"]


class Policy(NamedTuple):
    """What a layer does in training beyond normalizing."""

    momentum: Scalar | None  # None: the average over all batches
    correction: int = 0
    nan_policy: str = "propagate"
    renorm: renorm.Renorm | None = None
    ghosts: ghosts.Ghosts | None = None  # not together with renorm
    bridge: str = "auto"
    synchronized: bool = False  # more than one replica: `synchronized.step` replaces this one
    trace: fusion.Trace | None = None  # what follows may be fused in a graph, and is noted here


def step(
    batch: Batch,
    state: State,
    options: Options,
    policy: Policy,
    mode: Mode,
    draw: Callable[[], Any] | None = None,
) -> tuple[tf.Tensor, State]:
    """(y, state after the call). y has the shape and dtype of x.

    Args:
        batch: its mask has the rank of x and may be any tensor that broadcasts to x.
        state: the moving statistics and what else the layer's weights hold, by name.
        draw: returns the scale and bias of an `adjustment`, which broadcast to x; None without one.
    """
    if tf.is_tensor(mode.is_training) and not policy.synchronized:
        branches = (mode._replace(is_training=value) for value in (True, False))
        y, new = tf.cond(mode.is_training, *(partial(step, batch, state, options, policy, m, draw) for m in branches))
        return y, new
    core = CoreStep(batch, state, policy.momentum, options, policy.correction, policy.nan_policy, policy.bridge)
    if policy.synchronized and not (mode.use_batch is False and mode.update is False):
        return synchronized.step(core, mode)
    finishes: list[Finish] = []
    for transform in _transforms(policy, mode, draw):
        core, finish = transform(core)
        finishes.append(finish)
    moving = core.state["moving_mean"], core.state["moving_variance"]
    if mode.use_batch:
        on_reference = core.on_reference or mask_varies_by_channel(core.batch.mask, core.options)
        train_step: Any = partial(ops.train_step, bridge=core.bridge)
        if on_reference:
            train_step = reference.train_step
        elif policy.trace is not None and mode.is_training and tf.inside_function():
            kernels = ops.choose_kernels(core.bridge)
            if kernels is not None:
                train_step = partial(record.train_step, bridge=kernels, trace=policy.trace)
        y, mean, variance = train_step(
            core.batch,
            moving,
            core.momentum,
            core.options,
            correction=core.correction,
            nan_policy=core.nan_policy,
        )
        new = {**core.state, "moving_mean": mean, "moving_variance": variance}
    else:
        y = ops.infer(core.batch, moving, core.options, core.bridge, policy.trace)
        new = _updated(core, policy) if mode.update else state
    for finish in reversed(finishes):
        y, new = finish(y, new)
    return y, new if mode.update else state


def _transforms(policy: Policy, mode: Mode, draw: Callable[[], Any] | None) -> Iterator[Transform]:
    """The transforms of one call, the outermost first."""
    if draw is not None and mode.is_training:
        yield partial(adjustment.transform, draw=draw)
    if not mode.use_batch:
        return
    if policy.momentum is None:
        yield average.count
    if policy.renorm is not None:
        yield partial(renorm.transform, renorm=policy.renorm)
    elif policy.ghosts is not None:
        yield partial(ghosts.transform, ghosts=policy.ghosts)


def _updated(core: CoreStep, policy: Policy) -> State:
    """The state after a training step whose y is unused."""
    batch = Batch(tf.stop_gradient(core.batch.x), mask=core.batch.mask)
    _, new = step(batch, core.state, core.options._replace(activation=None), policy, Mode(True))
    return new
