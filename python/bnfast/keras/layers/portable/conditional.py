"""A gamma and a beta for each class of samples, applied to xhat: conditional batch norm.

    y[n] = gamma[label[n]]*xhat[n] + beta[label[n]]

These are Keras's own ops, in float32 (float64 for float64 xhat): one more pass over x each way.
"""

from __future__ import annotations

from typing import Any

from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from .batch import compute_dtype, dtype_of, per_channel
from .mode import static_bool


def check_labels(x: Any, labels: Any, num_classes: int) -> tuple[Any, Any]:
    """x, and the labels with shape (N,).

    A label out of range is found where the labels have values. While JAX traces they have none: a sample with such a
    label then gets NaN from `of_samples`.

    Raises:
        TypeError, ValueError: wrong dtype or shape; a label outside [0, num_classes).
    """
    labels = ops.convert_to_tensor(labels)
    if not dtype_of(labels).startswith(("int", "uint")):
        raise TypeError(f"labels must have an integer dtype. Received: {dtype_of(labels)}")
    shape = tuple(labels.shape)
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)) or shape[0] != x.shape[0]:
        raise ValueError(f"labels must have shape (N,) or (N, 1) with N = {x.shape[0]}. Received: {shape}")
    labels = ops.reshape(labels, (-1,))
    wrong = ops.logical_or(labels < 0, labels >= num_classes)
    if not in_symbolic_scope() and static_bool(ops.any(wrong)):
        raise ValueError(f"labels must be in [0, {num_classes}). Received: {int(labels[ops.argmax(wrong)])}")
    return x, labels


def of_samples(table: Any, labels: Any, num_classes: int, x: Any) -> Any:
    """The row of `table` that belongs to each sample's label: (N, C), in the compute dtype of x."""
    rows = ops.take(
        ops.cast(ops.convert_to_tensor(table), compute_dtype(x)), ops.clip(labels, 0, num_classes - 1), axis=0
    )
    known = ops.logical_and(labels >= 0, labels < num_classes)
    return ops.where(ops.expand_dims(known, 1), rows, float("nan"))


def apply(xhat: Any, gamma: Any, beta: Any, axis: int, dtype: str) -> Any:
    """gamma*xhat + beta in `dtype`. gamma and beta: None, or of shape (N, C) or (C,)."""
    y = ops.cast(xhat, compute_dtype(xhat))
    if gamma is not None:
        y = y * _broadcastable(gamma, y, axis)
    if beta is not None:
        y = y + _broadcastable(beta, y, axis)
    return ops.cast(y, dtype)


def _broadcastable(values: Any, y: Any, axis: int) -> Any:
    values, axis = ops.convert_to_tensor(values), axis % len(y.shape)
    if len(values.shape) == 1:
        return per_channel(values, y, axis)
    shape = [1] * len(y.shape)
    shape[0], shape[axis] = values.shape
    return ops.reshape(ops.cast(values, dtype_of(y)), shape)
