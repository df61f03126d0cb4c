"""TF 1's `adjustment` as a transform: a scale and an offset of the normalized values, drawn in every training call.

    scale, bias = adjustment(shape)
    y = activation((xhat*scale + bias)*gamma + beta + residual)

Both may differ between samples, so this part runs on TensorFlow's ops, in float32 (float64 for float64 x), after the
core step has computed xhat in the dtype of x: one more pass over memory per operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ..._arguments.features import check_adjustment as check
from ..axes import Axes
from ..batch import Batch, compute_dtype
from ..reference import activate, add_affine
from .core import CoreStep, Finish, State

__all__ = ["Adjustment", "check", "draw", "draw_merged", "transform"]

Adjustment = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def draw(adjustment: Adjustment, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """scale and bias, in the compute dtype of x.

    Raises:
        TypeError: the function doesn't return two tensors.
        ValueError: they don't broadcast to x.
    """
    pair = adjustment(tf.shape(x))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"adjustment must return (scale, bias). Received: {pair!r}")
    scale, bias = (tf.cast(tensor, compute_dtype(x)) for tensor in pair)
    for tensor in (scale, bias):
        extents = [1] * (x.shape.rank - tensor.shape.rank) + list(tensor.shape)
        if len(extents) > x.shape.rank or any(
            m not in (1, None) and n not in (m, None) for m, n in zip(extents, x.shape, strict=True)
        ):
            raise ValueError(
                f"adjustment must return tensors that broadcast to inputs of shape {x.shape}. Received: {tensor.shape}"
            )
    return scale, bias


def draw_merged(adjustment: Adjustment, x: tf.Tensor, axes: Axes) -> list[tf.Tensor]:
    """`draw`, with the channel axes merged as those of x."""
    drawn = draw(adjustment, x)
    if len(axes.axes) == 1:
        return list(drawn)
    return [axes.merge(tf.broadcast_to(tensor, tf.shape(x))) for tensor in drawn]


def transform(core: CoreStep, draw: Callable[[], Any]) -> tuple[CoreStep, Finish]:
    """xhat from the core step; the scale and offset, gamma, beta, residual and activation after it."""
    x, gamma, beta, mask, residual = core.batch
    options = core.options

    def finish(xhat: tf.Tensor, state: State) -> tuple[tf.Tensor, State]:
        scale, bias = draw()
        adjusted = tf.cast(xhat, scale.dtype) * scale + bias
        y = activate(add_affine(adjusted, gamma, beta, residual, options.axis), options)
        return tf.cast(y, xhat.dtype), state

    return core._replace(batch=Batch(x, mask=mask), options=options._replace(activation=None)), finish
