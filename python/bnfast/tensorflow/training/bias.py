"""A bias that the layer before added last, left out of the training step: the batch's mean takes it away again.

    x = values + bias:  x - mean(x) = values - mean(values),  so y is the same and the gradient of the bias is 0

TensorFlow finds that 0 by summing dx over all axes but one, which costs a pass over memory. With this transform the
core step reads `values`; the moving mean is still that of x, and the bias gets its gradient 0 along with beta or gamma.

    of             the bias in x, if it may be left out
    without        the batch with `values` in place of x
    less, more     the moving mean before and after a step on `values`

It applies only where nothing else reads x: a gradient that someone asks for at x would not pass here.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..batch import Batch
from .core import CoreStep, Finish, State


def transform(core: CoreStep) -> tuple[CoreStep, Finish]:
    bias = of(core.batch, core.options.axis)
    if bias is None:
        return core, lambda y, state: (y, state)
    moving_mean = core.state["moving_mean"]

    def finish(y: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
        return y, {**state, "moving_mean": more(state["moving_mean"], moving_mean, bias)}

    state = {**core.state, "moving_mean": less(moving_mean, bias)}
    return core._replace(batch=without(core.batch, bias), state=state), finish


def of(batch: Batch, axis: int) -> tf.Tensor | None:
    """The bias, or None if x is no such sum (an eager tensor doesn't tell) or the bias has an effect.

    With a mask it may have one: the mean of a channel without weight is 0. Without gamma and beta there is no tensor
    that could carry its gradient.
    """
    op, rank = getattr(batch.x, "op", None), batch.x.shape.rank
    if op is None or op.type != "BiasAdd" or batch.mask is not None or (batch.gamma is None and batch.beta is None):
        return None
    place = 1 if op.get_attr("data_format") == b"NCHW" else rank - 1
    return op.inputs[1] if place == axis % rank else None


def without(batch: Batch, bias: tf.Tensor) -> Batch:
    values = batch.x.op.inputs[0]
    values.set_shape(batch.x.shape)
    if batch.beta is not None:
        return batch._replace(x=values, beta=_with_gradient_of(bias, batch.beta))
    return batch._replace(x=values, gamma=_with_gradient_of(bias, batch.gamma))


def _with_gradient_of(bias: tf.Tensor, vector: tf.Tensor) -> tf.Tensor:
    """The vector, unchanged; its gradient gives the bias one of 0. Without one optimizers would warn."""

    def both(vector: tf.Tensor, bias: tf.Tensor) -> Any:
        return tf.identity(vector), lambda dvector: (dvector, tf.zeros_like(bias))

    return tf.custom_gradient(both)(vector, bias)


def less(moving_mean: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    return moving_mean - tf.stop_gradient(tf.cast(bias, moving_mean.dtype))


def more(moved: tf.Tensor, moving_mean: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """The inverse of `less` after the step; exactly moving_mean where the step left it unchanged (an empty batch)."""
    unchanged = tf.equal(moved, less(moving_mean, bias))
    return tf.where(unchanged, moving_mean, moved + tf.stop_gradient(tf.cast(bias, moving_mean.dtype)))
