"""The gradient of a bias that a layer adds before a batch norm: 0, without TensorFlow's pass over memory.

The batch's mean takes a bias away again, so dx, the gradient at the biased tensor, sums to 0 over each channel. For the
gradient of the bias TensorFlow computes that sum. `pass_over` gives the bias the gradient 0 instead, if the gradient
that arrives is exactly such a dx. In all other cases (other readers of the tensor, frozen statistics, a mask, several
replicas) it sums.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..custom_gradient import custom_gradient

_AXIS = "_bnfast_sums_to_zero"  # the attribute of such a dx: its channel axis


def mark(dx: tf.Tensor, axis: int) -> None:
    """Marks dx of a training step without mask in a graph, whose mean and variance pass no gradient on."""
    setattr(dx, _AXIS, axis % dx.shape.rank)


def pass_over(biased: tf.Tensor) -> tf.Tensor:
    """The same sum of values and a bias, whose gradient for the bias is 0 where that is known.

    Returns the tensor itself if it isn't the output of a BiasAdd in a graph.
    """
    made_by = getattr(biased, "op", None) if not tf.executing_eagerly() else None
    if made_by is None or made_by.type != "BiasAdd":
        return biased
    data_format = made_by.get_attr("data_format")
    axis = 1 if data_format == b"NCHW" else biased.shape.rank - 1

    def forward(values: tf.Tensor, bias: tf.Tensor) -> Any:
        def backward(dy: tf.Tensor) -> Any:
            if getattr(dy, _AXIS, None) == axis:
                return dy, tf.zeros_like(bias)
            return dy, tf.raw_ops.BiasAddGrad(out_backprop=dy, data_format=data_format)

        return tf.raw_ops.BiasAdd(value=values, bias=bias, data_format=data_format), backward

    same = custom_gradient(forward, *made_by.inputs)
    same.set_shape(biased.shape)
    return same
