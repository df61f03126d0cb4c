"""A gamma and a beta for each class of samples, applied to xhat: conditional batch norm.

    y[n] = gamma[label[n]]*xhat[n] + beta[label[n]]

These are TensorFlow's own ops, in float32 (float64 for float64 xhat): one more pass over x each way.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from .batch import compute_dtype, per_channel
from .custom_gradient import custom_gradient


def check_labels(x: tf.Tensor, labels: Any, num_classes: int) -> tuple[tf.Tensor, tf.Tensor]:
    """x, which in a graph now waits until the labels are checked, and the labels with shape (N,).

    Raises:
        TypeError, ValueError: wrong dtype or shape; in eager mode also a label outside [0, num_classes), which a graph
            reports as tf.errors.InvalidArgumentError when it runs.
    """
    labels = tf.convert_to_tensor(labels)
    if not labels.dtype.is_integer:
        raise TypeError(f"labels must have an integer dtype. Received: {labels.dtype.name}")
    extents = labels.shape
    fits = extents.rank in (1, 2) and extents[1:] in ([], [1], [None])
    if not fits or (None not in (extents[0], x.shape[0]) and extents[0] != x.shape[0]):
        raise ValueError(f"labels must have shape (N,) or (N, 1) with N = {x.shape[0]}. Received: {extents}")
    labels = tf.reshape(labels, [-1])
    wanted = f"labels must be in [0, {num_classes})"
    if tf.executing_eagerly():
        wrong = tf.boolean_mask(labels, (labels < 0) | (labels >= num_classes)).numpy()
        if wrong.size:
            raise ValueError(f"{wanted}. Received: {wrong[0]}")
        return x, labels
    wide = tf.cast(labels, tf.int64)
    checks = [
        tf.debugging.assert_non_negative(wide, message=wanted),
        tf.debugging.assert_less(wide, tf.constant(num_classes, tf.int64), message=wanted),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(x), tf.identity(labels)


def of_samples(table: Any, labels: tf.Tensor, num_classes: int, x: tf.Tensor) -> tf.Tensor:
    """The row of `table` that belongs to each sample's label: (N, C), in the compute dtype of x.

    The gradient is dense: optimizers and gradient clipping often treat tf.gather's sparse one differently.
    """

    def look_up(rows: tf.Tensor) -> Any:
        return tf.gather(rows, labels), lambda upstream: tf.math.unsorted_segment_sum(upstream, labels, num_classes)

    return custom_gradient(look_up, tf.cast(tf.convert_to_tensor(table), compute_dtype(x)))


def apply(xhat: tf.Tensor, gamma: Any, beta: Any, axis: int, dtype: str) -> tf.Tensor:
    """gamma*xhat + beta in `dtype`. gamma and beta: None, or of shape (N, C) or (C,)."""
    y = tf.cast(xhat, compute_dtype(xhat))
    if gamma is not None:
        y *= _broadcastable(gamma, y, axis)
    if beta is not None:
        y += _broadcastable(beta, y, axis)
    return tf.cast(y, dtype)


def _broadcastable(values: Any, y: tf.Tensor, axis: int) -> tf.Tensor:
    values, axis = tf.convert_to_tensor(values), axis % y.shape.rank
    if values.shape.rank == 1:
        return per_channel(values, y, axis)
    places = (slice(None), *[None] * (axis - 1), slice(None), *[None] * (y.shape.rank - axis - 1))
    return tf.cast(values, y.dtype)[places]
