"""`custom_gradient(function, *tensors)`: tf.custom_gradient whose graphs can be freed.

In a graph, tf.custom_gradient registers the gradient under a new name, forever, and with it every tensor that the
gradient reads: no graph, and none of its weights, is freed any more. Here the graph holds the gradient, and the
registry only a weak reference. Eager tensors need no name and go through tf.custom_gradient.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from .pullback import inside

_GRADIENTS = "_bnfast_gradients"  # the attribute of a graph that holds its gradients
_numbers = itertools.count()


class _Gradient:
    """The gradient of an IdentityN whose inputs are the results, then the tensors."""

    def __init__(self, backward: Callable[..., Any], results: int) -> None:
        self._backward, self._results = backward, results

    def __call__(self, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
        gradients = self._backward(*upstream[: self._results])
        return [None] * self._results + list(gradients if isinstance(gradients, Sequence) else [gradients])


def custom_gradient(function: Callable[..., Any], *tensors: tf.Tensor) -> Any:
    """function(*tensors)[0], one tensor or a tuple of tensors, with the gradient function(*tensors)[1].

    Args:
        function: returns its result, and a function from the gradients of the results to those of the tensors: a
            sequence, or one gradient. It may read other tensors, which get no gradient, but no variable.
    """
    if tf.executing_eagerly():
        return tf.custom_gradient(function)(*tensors)
    tensors = tuple(map(inside, tensors))
    result, backward = function(*tensors)
    results = list(result) if isinstance(result, Sequence) else [result]
    outputs = _identity([*results, *tensors], _Gradient(backward, len(results)))[: len(results)]
    return tuple(outputs) if isinstance(result, Sequence) else outputs[0]


def _identity(inputs: list[tf.Tensor], gradient: _Gradient) -> list[tf.Tensor]:
    graph, name, weak = tf.compat.v1.get_default_graph(), f"BnfastGradient{next(_numbers)}", weakref.ref(gradient)
    if not hasattr(graph, _GRADIENTS):
        setattr(graph, _GRADIENTS, [])
    getattr(graph, _GRADIENTS).append(gradient)

    def registered(_: Any, *upstream: tf.Tensor) -> list[tf.Tensor | None]:
        alive = weak()
        if alive is None:
            raise LookupError("the graph that this operation was traced in is gone, and its gradient with it")
        return alive(*upstream)

    tf.RegisterGradient(name)(registered)  # for tf.gradients and for tapes around the traced function
    with graph.gradient_override_map({"IdentityN": name}), record.stop_recording():
        outputs = tf.raw_ops.IdentityN(input=inputs)
    record.record_operation(name, outputs, inputs, gradient)  # for tapes inside of it
    return list(outputs)
