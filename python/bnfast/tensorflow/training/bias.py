"""The bias that the layer before has added last: batch statistics take it away again.

    x = values + bias:  x - mean(x) = values - mean(values),  so y is the same and the bias's gradient is 0

TensorFlow finds that 0 by summing dx over all axes but one: a pass over memory. Here the batch norm reads values, the
moving mean is that of x all the same, and the bias gets its 0 along with gamma or beta.

    of             the bias in x, where it may be left out
    without        the batch with values for x
    less, more     the moving mean that goes into a step on values, and what comes out of it

Only where nothing else reads x: a gradient that someone asks for at x would not pass here.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..reference import Batch


def of(batch: Batch, axis: int) -> tf.Tensor | None:
    """None where x is no such sum (an eager tensor doesn't tell), or the bias counts.

    With a mask it may: the mean of a channel without weight is 0. Without gamma and beta nothing brings its gradient.
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
    """The vector as it is; its gradient brings the bias one of 0, or optimizers would warn that it has none."""

    def both(vector: tf.Tensor, bias: tf.Tensor) -> Any:
        return tf.identity(vector), lambda dvector: (dvector, tf.zeros_like(bias))

    return tf.custom_gradient(both)(vector, bias)


def less(moving_mean: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    return moving_mean - tf.stop_gradient(tf.cast(bias, moving_mean.dtype))


def more(moved: tf.Tensor, moving_mean: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """moved is what became of less(moving_mean, bias); to the bit moving_mean where that stayed (an empty batch)."""
    stayed = tf.equal(moved, less(moving_mean, bias))
    return tf.where(stayed, moving_mean, moved + tf.stop_gradient(tf.cast(bias, moving_mean.dtype)))
