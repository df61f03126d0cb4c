"""Where Keras's operations see that a batch norm of bnfast's made their input, and become part of its op.

All of Keras's layers, keras.ops and keras.activations reach TensorFlow through the functions of its backend. `install`
puts a function of the same signature in the place of four of these: relu, relu6, leaky_relu and add. Each asks
`training.fusion` whether its input is the output of a batch norm's training step in the graph being traced; if it
isn't, Keras's own function computes the result. TensorFlow's own modules stay as they are. Calls of tf.nn.relu, and `+`
on tensors, are not fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import numpy as np

from .framework import fusion

_installed = False


def install() -> None:
    """Called by the first batch norm that trains. Without effect afterwards."""
    global _installed
    if _installed:
        return
    _installed = True
    backend = keras.src.backend
    for module, name, fused in (
        (backend.nn, "relu", _relu),
        (backend.nn, "relu6", _relu6),
        (backend.nn, "leaky_relu", _leaky_relu),
        (backend.numpy, "add", _add),
    ):
        setattr(module, name, _first(fused, getattr(module, name)))


def fusable(operation: Any) -> int:
    """How many operations after this one, at most 2, are the only readers of what comes before them.

    A functional model knows the readers of each tensor. Elsewhere they are unknown, and count as one each.
    """
    for count in range(2):
        if len(operation._inbound_nodes) != 1 or not operation._outbound_nodes:
            return 2
        if len(operation._outbound_nodes) > 1:
            return count
        operation = operation._outbound_nodes[0].operation
    return 2


def has_other_readers(operation: Any) -> bool:
    """Whether a functional model reads the input of this operation elsewhere, too."""
    tensors = [tensor for node in operation._inbound_nodes for tensor in node.input_tensors]
    makers = [tensor._keras_history.operation for tensor in tensors]
    return any(len(maker._outbound_nodes) > len(maker._inbound_nodes) for maker in makers)


def _first(fused: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """The function that tries `fused` and calls Keras's own where that has no result."""

    @wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = fused(*args, **kwargs)
        return own(*args, **kwargs) if result is None else result

    return function


def _relu(x: Any) -> Any:
    return fusion.activate(x, "relu")


def _relu6(x: Any) -> Any:
    return fusion.activate(x, "relu6")


def _leaky_relu(x: Any, negative_slope: float = 0.2) -> Any:
    if not (isinstance(negative_slope, (int, float)) and math.isfinite(negative_slope) and negative_slope > 0):
        return None
    return fusion.activate(x, "leaky_relu", float(np.float32(negative_slope)))  # TensorFlow's op stores 32 bits of it


def _add(x1: Any, x2: Any) -> Any:
    return fusion.add(x1, x2)
