"""One call of a layer: the batch's y, and the layer's statistics after it.

    step    batch, state -> y, state

The mode of the call selects the statistics that normalize. In training, each feature that a layer adds to plain batch
norm (averages, renorm, ghost batches, adjustment) is a transform around one core step, kernels.train_step.
Passes over x beyond those of plain training: renorm reads x once more for its moments; adjustment is described in its
file. Normalizing with the moving statistics while updating them takes a second pass, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from . import adjustment, average, ghosts, kernels, reference, renorm
from .batch import Batch, Options, constant, mask_varies_by_channel
from .core import CoreStep, Finish, State, Transform
from .mode import Mode

__all__ = ["Policy", "replicas", "step"]


class Policy(NamedTuple):
    """What a layer does in training beyond normalizing."""

    momentum: Any  # None: the average over all batches
    correction: int = 0
    nan_policy: str = "propagate"
    renorm: renorm.Renorm | None = None
    ghosts: ghosts.Ghosts | None = None  # not together with renorm
    bridge: str = "auto"  # of TensorFlow alone, as are the others
    synchronized: bool = False
    trace: Any = None


def replicas() -> int:
    """Raises, because only TensorFlow's strategies have replicas: a layer that is `synchronized` asks for them. (Keras
    3.9 and later refuse that argument elsewhere by themselves.)"""
    raise NotImplementedError(
        "synchronized=True needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow), whose tf.distribute "
        "strategies it normalizes over"
    )


def step(
    batch: Batch,
    state: State,
    options: Options,
    policy: Policy,
    mode: Mode,
    draw: Callable[[], Any] | None = None,
) -> tuple[Any, State]:
    """(y, state after the call). y has the shape and dtype of x.

    Args:
        batch: its mask has the rank of x and may be any tensor that broadcasts to x.
        state: the moving statistics and what else the layer's weights hold, by name.
        draw: returns the scale and bias of an `adjustment`, which broadcast to x; None without one.
    """
    if in_symbolic_scope():  # only the shape and dtype of y are wanted; the size of the batch stands for any
        moving = state["moving_mean"], state["moving_variance"]
        return reference.infer(batch, moving, options._replace(activation=None)), state
    if ops.is_tensor(mode.is_training):
        branches = (mode._replace(is_training=value) for value in (True, False))
        y, new = ops.cond(mode.is_training, *(partial(step, batch, state, options, policy, m, draw) for m in branches))
        return y, new
    core = CoreStep(batch, state, policy.momentum, options, policy.correction, policy.nan_policy)
    finishes: list[Finish] = []
    for transform in _transforms(policy, mode, draw):
        core, finish = transform(core)
        finishes.append(finish)
    moving = core.state["moving_mean"], core.state["moving_variance"]
    if mode.use_batch:
        on_reference = core.on_reference or mask_varies_by_channel(core.batch.mask, core.options)
        y, mean, variance = _train(reference if on_reference else kernels, core, core.options, core.batch.residual)
        if policy.trace is not None and not finishes and not on_reference:
            kernels.mark(y, core.batch, partial(_train, kernels, core), core.options, policy.trace)
        new = {**core.state, "moving_mean": mean, "moving_variance": variance}
    else:
        y = kernels.infer(core.batch, moving, core.options)
        new = _updated(core, policy) if mode.update else state
    for finish in reversed(finishes):
        y, new = finish(y, new)
    return y, new if mode.update else state


def _train(by: Any, core: CoreStep, options: Options, residual: Any) -> tuple[Any, Any, Any]:
    """`train_step` of a module, with these options and this residual."""
    moving = core.state["moving_mean"], core.state["moving_variance"]
    batch = core.batch._replace(residual=residual)
    return by.train_step(  # type: ignore[no-any-return]
        batch, moving, core.momentum, options, correction=core.correction, nan_policy=core.nan_policy
    )


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
    batch = Batch(constant(core.batch.x), mask=core.batch.mask)
    _, new = step(batch, core.state, core.options._replace(activation=None), policy, Mode(True))
    return new
