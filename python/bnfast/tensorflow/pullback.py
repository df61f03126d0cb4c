"""`pullback(function, values, upstream)`: the gradients of a function of tensors, given those of its results.

In a graph they come from tf.gradients and not from a tape: while TensorFlow builds the gradient of a loop or of a
tf.cond, it stops all tapes, new ones too, and a tape would find nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf


def pullback(
    function: Callable[..., Sequence[tf.Tensor]], values: Sequence[tf.Tensor], upstream: Sequence[tf.Tensor]
) -> list[tf.Tensor | None]:
    """The gradients of the values; None where no result depends on one.

    Args:
        function: function(*values) returns the results. It may read other tensors.
        upstream: one gradient for each result.
    """
    if tf.executing_eagerly():
        with tf.GradientTape() as tape:
            tape.watch(values)
            results = function(*values)
        gradients: list[tf.Tensor | None] = tape.gradient(results, list(values), output_gradients=list(upstream))
        return gradients
    values = [tf.identity(value) for value in values]
    return list(tf.gradients(list(function(*values)), values, grad_ys=list(upstream)))


def inside(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor as the graph sees it that is being traced.

    A gradient that is built later may only read tensors of the graph of its operation. TensorFlow captures a tensor of
    an outer graph when an operation reads it; what a gradient reads has to be the capture.
    """
    graph, tensor = tf.compat.v1.get_default_graph(), tf.convert_to_tensor(tensor)
    return tensor if tensor.graph is graph or not hasattr(graph, "capture") else graph.capture(tensor)
