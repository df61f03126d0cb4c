"""TF 1's `adjustment`: a scale and an offset of the normalized values, drawn anew in every training call.

    scale, bias = adjustment(shape)
    y = activation((xhat*scale + bias)*gamma + beta + residual)

They may differ between samples, so this part runs on TensorFlow's ops, in float32 (float64 for float64 x), after the
kernels made xhat in x's dtype: one more pass for each of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from .. import reference as formula
from ..reference import Options

Adjustment = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def check(adjustment: Any, virtual_batch_size: Any) -> None:
    """The errors of the arguments."""
    if adjustment is not None and not callable(adjustment):
        raise TypeError(f"adjustment must be None or a function of the shape. Received: {adjustment!r}")
    if adjustment is not None and virtual_batch_size is not None:
        raise ValueError(f"adjustment must be None with virtual_batch_size. Received: {virtual_batch_size=}")


def draw(adjustment: Adjustment, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """scale and bias, in x's dtype of computation.

    Raises TypeError where they aren't two, ValueError where they don't broadcast to x.
    """
    pair = adjustment(tf.shape(x))
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"adjustment must return (scale, bias). Received: {pair!r}")
    scale, bias = (tf.cast(tensor, formula.compute_dtype(x)) for tensor in pair)
    for tensor in (scale, bias):
        extents = [1] * (x.shape.rank - tensor.shape.rank) + list(tensor.shape)
        if len(extents) > x.shape.rank or any(
            m not in (1, None) and n not in (m, None) for m, n in zip(extents, x.shape, strict=True)
        ):
            raise ValueError(
                f"adjustment must return tensors that broadcast to inputs of shape {x.shape}. Received: {tensor.shape}"
            )
    return scale, bias


def apply(
    xhat: tf.Tensor,
    drawn: tuple[tf.Tensor, tf.Tensor],
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    residual: tf.Tensor | None,
    options: Options,
) -> tf.Tensor:
    """y in xhat's shape and dtype."""
    scale, bias = drawn
    y = tf.cast(xhat, scale.dtype) * scale + bias
    if gamma is not None:
        y *= formula.per_channel(gamma, xhat, options.axis)
    if beta is not None:
        y += formula.per_channel(beta, xhat, options.axis)
    if residual is not None:
        y += tf.cast(residual, y.dtype)
    return tf.cast(formula.activate(y, options), xhat.dtype)
