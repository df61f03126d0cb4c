"""Layer and group normalization as TensorFlow's own ops: in inference, on small tensors, and for second derivatives.

    mean, variance = moments of x over each sample's group (or over `axes`), y = (x - mean)*invstd*gamma + beta
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

Computes in float32, or in float64 for float64 x. Correct to any order: tf.nn.moments, which Keras's layers use, stops
the gradient at the mean inside the variance, so their second derivatives lack a term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from .batch import compute_dtype

PRIMALS = ("x", "gamma", "beta")  # the tensors that get a gradient, in this order


class Norm(NamedTuple):
    """Which norm it is. axes are ascending and >= 0."""

    axes: tuple[int, ...]  # a layer norm normalizes over them; of a group norm only the channel axis
    groups: int | None  # None: layer norm
    epsilon: float


def normalize(x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, norm: Norm) -> tf.Tensor:
    """y in the shape and dtype of x. gamma and beta have the extents of norm.axes, in this order."""
    values = tf.cast(x, compute_dtype(x))
    shape = tf.shape(x)
    extents = [shape[i] if extent is None else extent for i, extent in enumerate(x.shape)]
    if norm.groups is None:
        over = list(norm.axes)
        parameters = [extent if i in norm.axes else 1 for i, extent in enumerate(x.shape)]
    else:
        (axis,) = norm.axes
        split = [norm.groups, x.shape[axis] // norm.groups]
        values = tf.reshape(values, [*extents[:axis], *split, *extents[axis + 1 :]])
        over = [i for i in range(1, x.shape.rank + 1) if i != axis]
        parameters = [*[1] * axis, *split, *[1] * (x.shape.rank - axis - 1)]
    deviation = values - tf.reduce_mean(values, over, keepdims=True)
    shifted = tf.reduce_mean(tf.square(deviation), over, keepdims=True) + norm.epsilon
    scale = tf.where(shifted > 0, tf.math.rsqrt(tf.where(shifted > 0, shifted, 1)), 0)
    if gamma is not None:
        scale *= tf.reshape(tf.cast(gamma, values.dtype), parameters)
    y = deviation * scale
    if beta is not None:
        y += tf.reshape(tf.cast(beta, values.dtype), parameters)
    return tf.cast(tf.reshape(y, extents), x.dtype)


def derivative_of_gradient(
    given: Mapping[str, tf.Tensor], cotangents: Sequence[tf.Tensor], norm: Norm
) -> list[tf.Tensor]:
    """The vector-Jacobian product of the backward pass (dy, x, gamma, beta -> dx, dgamma, dbeta).

    given: dy, x and, where present, gamma and beta. cotangents: one for each output. The derivatives have the order of
    `given`.
    """
    arguments = {name: given[name] for name in PRIMALS if name in given}
    primals = list(arguments.values())
    with tf.GradientTape() as outer:
        outer.watch(list(given.values()))
        with tf.GradientTape() as inner:
            inner.watch(primals)
            y = normalize(**{"gamma": None, "beta": None, **arguments}, norm=norm)
        gradients = inner.gradient(y, primals, output_gradients=given["dy"])
    return list(
        outer.gradient(gradients, list(given.values()), output_gradients=list(cotangents), unconnected_gradients="zero")
    )
