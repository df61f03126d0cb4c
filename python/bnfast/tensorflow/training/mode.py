"""Which statistics y is normalized with, and whether the moving ones move: `training` and the layer's switches.

    use_batch_statistics   None: y takes the batch's where the call trains; True: always; False: never
    update_statistics      whether a call that trains moves the moving statistics

`training` may be a tensor whose value only the run will know: both ways are then in the graph, under a tf.cond. Not
so where replicas talk to each other, which they can't do inside of one: `synchronized` chooses by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from .. import inference
from ..reference import Batch, Options
from . import adjustment, synchronized
from .step import Policy, State, step


class Switches(NamedTuple):
    trains: Any  # False, True or a boolean tensor
    use_batch_statistics: bool | None
    update_statistics: bool


def trains(training: Any, trainable: bool) -> Any:
    """Whether a call trains: False, True, or a boolean tensor where only the run will know."""
    if not trainable or not possible(training):
        return False
    if tf.is_tensor(training) and tf.get_static_value(training) is None:
        return tf.cast(training, tf.bool)
    return True


def possible(training: Any) -> bool:
    """Whether this call trains, or may: a tensor whose value the graph will know may."""
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
        return training is None or bool(training)
    return bool(training)


def normalize(
    batch: Batch,
    state: State,
    options: Options,
    policy: Policy,
    switches: Switches,
    drawn: Callable[[], Any] | None = None,
) -> tuple[tf.Tensor, State]:
    """y in x's shape and dtype, and the state after the call. drawn: what `adjustment` gives, where there is one."""

    def run(training: Any) -> tuple[tf.Tensor, State]:
        of_batch = training if switches.use_batch_statistics is None else switches.use_batch_statistics
        moves = training if switches.update_statistics else False
        if policy.synchronized and not (of_batch is False and moves is False):
            return synchronized.step(batch, state, options, policy, of_batch, moves)
        if drawn is not None and training:
            alone = batch._replace(gamma=None, beta=None, residual=None)
            xhat, moved = _run(alone, state, options._replace(activation=None), policy, of_batch, moves)
            return adjustment.apply(xhat, drawn(), batch.gamma, batch.beta, batch.residual, options), moved
        return _run(batch, state, options, policy, of_batch, moves)

    if tf.is_tensor(switches.trains) and not policy.synchronized:
        y, moved = tf.cond(switches.trains, lambda: run(True), lambda: run(False))
        return y, moved
    return run(switches.trains)


def _run(
    batch: Batch, state: State, options: Options, policy: Policy, of_batch: bool, moves: bool
) -> tuple[tf.Tensor, State]:
    moved = state
    if of_batch:
        y, moved = step(batch, state, options, policy)
    else:
        x, gamma, beta, mask, residual = batch
        if moves:
            plain = options._replace(activation=None)
            _, moved = step(Batch(tf.stop_gradient(x), mask=mask), state, plain, policy)
        y = inference.infer(x, gamma, beta, state["moving_mean"], state["moving_variance"], options, residual)
    return y, moved if moves else state
