"""Layer and group normalization of one tensor, in training and in inference.

    mean, variance = moments of x over each sample's group (or over `axes`), y = (x - mean)*invstd*gamma + beta
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

A framework whose kernels take the call computes it (`kernels.Framework.group_norm`); elsewhere Keras's own ops do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from . import kernels
from .batch import FLOATS, compute_dtype, dtype_of


class Norm(NamedTuple):
    """Which norm it is. axes are ascending and >= 0."""

    axes: tuple[int, ...]  # a layer norm normalizes over them; of a group norm only the channel axis
    groups: int | None  # None: layer norm
    epsilon: float


def accepts(x: Any) -> bool:
    """Whether `normalize` computes on this dtype. Others (integers) are left to Keras's own code."""
    return dtype_of(x) in FLOATS


def normalize(x: Any, gamma: Any, beta: Any, norm: Norm, training: Any, dtype: str) -> Any:
    """y in the shape of x and in `dtype`. gamma and beta: None, or float tensors with the extents of norm.axes."""
    x = ops.convert_to_tensor(x)
    extents = tuple(x.shape[axis] for axis in norm.axes)
    gamma, beta = (
        None if v is None else ops.reshape(ops.cast(ops.convert_to_tensor(v), compute_dtype(x)), extents)
        for v in (gamma, beta)
    )
    y = kernels.group_norm(x, gamma, beta, norm)
    return ops.cast(_by_ops(x, gamma, beta, norm) if y is None else y, dtype)


def _by_ops(x: Any, gamma: Any, beta: Any, norm: Norm) -> Any:
    """y in the shape and dtype of x. gamma and beta have the extents of norm.axes, in this order."""
    values, shape = ops.cast(x, compute_dtype(x)), tuple(x.shape)
    if norm.groups is None:
        over = list(norm.axes)
        parameters = [extent if i in norm.axes else 1 for i, extent in enumerate(shape)]
    else:
        (axis,) = norm.axes
        split = [norm.groups, shape[axis] // norm.groups]
        values = ops.reshape(values, (*shape[:axis], *split, *shape[axis + 1 :]))
        over = [i for i in range(1, len(shape) + 1) if i != axis]
        parameters = [*[1] * axis, *split, *[1] * (len(shape) - axis - 1)]
    deviation = values - ops.mean(values, over, keepdims=True)
    shifted = ops.mean(ops.square(deviation), over, keepdims=True) + norm.epsilon
    positive = shifted > 0
    scale = ops.where(positive, ops.rsqrt(ops.where(positive, shifted, 1)), 0)
    if gamma is not None:
        scale = scale * ops.reshape(gamma, parameters)
    y = deviation * scale
    if beta is not None:
        y = y + ops.reshape(beta, parameters)
    return ops.cast(ops.reshape(y, shape), dtype_of(x))
