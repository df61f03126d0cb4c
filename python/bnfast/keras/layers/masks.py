"""The masks that Keras attaches to tensors, as its layer Masking does. They have the shape x.shape[:-1], for any axis.

A functional model computes such a mask anew and passes a tensor of its own: its graph tells what that stands for.
"""

from __future__ import annotations

from typing import Any

import keras

_find: Any = getattr(keras.src.backend, "get_keras_mask", None)  # newer than Keras 3.5; JAX's tracers need it


def attached(x: Any) -> Any:
    """The mask that Keras attached to a tensor, or None."""
    return getattr(x, "_keras_mask", None) if _find is None else _find(x)


def is_attached(mask: Any, inputs: Any, layer: Any) -> bool:
    """Whether `mask`, with which the layer is called, is the one that Keras attached to its inputs."""
    own = attached(inputs)
    if own is None or mask is own:
        return own is not None
    nodes = layer._inbound_nodes
    return getattr(mask, "shape", None) == own.shape and bool(nodes) and all(map(_passes_it, nodes))


def _passes_it(node: Any) -> bool:
    """Whether this call of a layer in a functional model passes the mask of its first tensor."""
    x, mask = (
        value[0] if isinstance(value, (list, tuple)) else value
        for value in (node.arguments.args[0], node.arguments.kwargs.get("mask"))
    )
    return mask is not None and attached(x) is mask
