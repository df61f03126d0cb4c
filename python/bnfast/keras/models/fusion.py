"""Finds the batch norms of a model that can be fused with the Add and the activation after them.

    BN -> activation            nothing else reads the BN's output, and it is no output of the model
    BN -> Add -> activation     the same for the sum; the Add has two inputs of one shape, the other one is the residual
    BN -> Add                   the same without an activation

For a batch norm that can't be fused, it returns the reason. Activations, as layers or as keras.ops, are fused if the
kernels compute them (`activation.fuse`). The model is never changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from ..layers import activation as activations
from .graph_copy import Graph, graphs, only_input


class Fusion(NamedTuple):
    """The operations to fuse with a batch norm; at least one of add and activation is not None."""

    add: Any
    activation: Any
    place: int = 0  # index of the batch norm's output in the inputs of the Add

    @property
    def last(self) -> Any:
        """The last fused operation: the fused layer has its output and its name."""
        return self.activation or self.add


class Finder:
    """Finds the fusions in one model. An Add of two batch norms is fused with the one that is queried first."""

    def __init__(self, model: Any) -> None:
        self._calls: dict[int, list[tuple[Graph, Any]]] = {}
        self._taken: set[int] = set()
        for graph in graphs(model):
            for node in graph.nodes:
                self._calls.setdefault(id(node.operation), []).append((graph, node))

    def shape(self, norm: Any) -> tuple[int | None, ...] | None:
        """The shape of its input at its first call; None if it is called inside another layer."""
        calls = self._calls.get(id(norm))
        return tuple(calls[0][1].input_tensors[0].shape) if calls else None

    def find(self, norm: Any) -> Fusion | str:
        """The operations to fuse with this batch norm, or the reason why there are none."""
        calls = self._calls.get(id(norm), [])
        if not calls:
            return "it is called inside another layer, which may use its output as it likes"
        if any(only_input(node) is None for _, node in calls):
            return "it is called with more than its input"
        if norm.activity_regularizer is not None:
            return "it has an activity regularizer, which sees its output"
        followers = [graph.sole_consumer(node) for graph, node in calls]
        if None in followers:
            return "its output is used more than once or is an output of the model"
        following = followers[0].operation
        if any(node.operation is not following for node in followers):
            return "it is shared, and different layers follow it"
        if layer_of(following, norm) is not None and None not in map(only_input, followers):
            if len(self._calls[id(following)]) != len(calls):
                return f"{following.name} is shared with other layers"
            return Fusion(None, following)
        return self._find_add(norm, *calls[0], followers)

    def bias_before(self, norm: Any) -> str | None:
        """The name of the layer before, if it has a bias and only this batch norm reads its outputs."""
        name = None
        for graph, node in self._calls.get(id(norm), []):
            before = graph.producer(node.input_tensors[0])
            if (
                before is None
                or graph.sole_consumer(before) is not node
                or not getattr(before.operation, "use_bias", False)
            ):
                return None
            name = before.operation.name
        return name

    def _find_add(self, norm: Any, graph: Graph, node: Any, followers: list[Any]) -> Fusion | str:
        following, add, output = followers[0], followers[0].operation, node.outputs[0]
        if not _is_add(add):
            return f"no activation that the kernels know follows it, but {type(add).__name__} {add.name}"
        tensors = following.input_tensors
        if len(tensors) != 2 or tensors[0] is tensors[1] or tensors[0].shape != tensors[1].shape:
            return f"{add.name} is not the sum of two tensors of one shape"
        if len(followers) > 1 or len(self._calls[id(add)]) > 1:
            return f"it or {add.name} is shared"
        if id(add) in self._taken:
            return f"{add.name} is fused with its other input"
        if isinstance(add, keras.layers.Layer):
            if add.compute_dtype != norm.compute_dtype or add.activity_regularizer is not None:
                return f"{add.name} has another dtype or an activity regularizer"
        elif any(tensor.dtype != norm.compute_dtype for tensor in tensors):
            return f"{add.name} has another dtype"
        self._taken.add(id(add))
        after = graph.sole_consumer(following)
        last = after.operation if after is not None else None
        if last is not None and (len(self._calls[id(last)]) > 1 or layer_of(last, norm) is None):
            last = None
        return Fusion(add, last, int(tensors[0] is not output))


def layer_of(operation: Any, norm: Any) -> Any:
    """The activation as a layer, if the kernels support it; else None. A layer is returned unchanged."""
    layer = operation if isinstance(operation, keras.layers.Layer) else _layer_of_op(operation, norm)
    fused = None if layer is None else activations.fuse(layer, norm.compute_dtype)
    return layer if fused is not None and fused.activation is not None else None


def _layer_of_op(op: Any, norm: Any) -> Any:
    """The layer equivalent to an activation from keras.ops or keras.activations; None for other operations."""
    words: dict[str, Any] = {"name": op.name, "dtype": norm.dtype_policy}
    match type(op).__module__, type(op).__name__:
        case "keras.src.ops.nn", "Relu":
            return keras.layers.ReLU(**words)
        case "keras.src.ops.nn", "Relu6":
            return keras.layers.ReLU(6, **words)
        case "keras.src.ops.nn", "LeakyRelu":
            return keras.layers.LeakyReLU(op.negative_slope, **words) if op.negative_slope >= 0 else None
        case "keras.src.activations.activations", "ReLU":
            return keras.layers.ReLU(op.max_value, op.negative_slope, op.threshold, **words)
    return None


def _is_add(operation: Any) -> bool:
    kind = type(operation)
    return kind is keras.layers.Add or (kind.__name__ == "Add" and kind.__module__ == "keras.src.ops.numpy")
