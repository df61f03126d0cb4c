"""The graph of a Keras model: the calls of its operations, and how a copy of the model gets other operations.

`graphs(model)` gives the model and the models nested in it; the nodes of a graph are its calls of operations, in the
order of the data flow. `calls(model)` gives the nodes of an operation in all graphs: more than one for a shared layer.
`rewire` edits the copy that a Copier has made of a model (copy.py). Its plan names operations of the original:

    plan[id(relu)] = (maximum, minimum)    # called with the ReLU's inputs: x -> minimum(maximum(x))
    plan[id(bn)] = ()                      # dropped: its consumers get its input

In a Sequential model replacements are layers. Elsewhere they are any callables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
from keras.src.models.functional import Functional  # Keras has no public name for it
from keras.src.ops.symbolic_arguments import SymbolicArguments
from keras.src.utils.tracking import DotNotTrackScope

from .copy import COMPILED, Copier, find

Replacement = tuple[Callable[..., Any], ...]

# What Functional.__init__ reads from the graph. TensorFlow tracks the lists among these.
_OPERATIONS = ("_nodes", "_nodes_by_depth", "_operations", "_operations_by_depth")


class Graph:
    """The nodes of one Functional or built Sequential model, without nested models. It never changes the model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        functional = model._functional if isinstance(model, keras.Sequential) else model
        by_depth = functional._nodes_by_depth
        self.nodes = [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth] if not n.is_input]
        self.inputs, self.outputs = functional.input, functional.output
        self._consumers: dict[int, list[Any]] = {}
        self._producers: dict[int, Any] = {}
        for node in self.nodes:
            for tensor in node.input_tensors:
                self._consumers.setdefault(id(tensor), []).append(node)
            for tensor in node.outputs:
                self._producers[id(tensor)] = node
        self._outputs = {id(tensor) for tensor in keras.tree.flatten(self.outputs)}

    def producer(self, tensor: Any) -> Any:
        """The node with this output; None for a model input."""
        return self._producers.get(id(tensor))

    def consumers(self, node: Any) -> list[Any]:
        """The nodes that read an output of this node."""
        return [consumer for output in node.outputs for consumer in self._consumers.get(id(output), [])]

    def sole_consumer(self, node: Any) -> Any:
        """The only consumer of this node's only output; None if there is none, or if the model outputs it too."""
        if len(node.outputs) != 1 or id(node.outputs[0]) in self._outputs:
            return None
        consumers = self.consumers(node)
        return consumers[0] if len(consumers) == 1 else None


def only_input(node: Any) -> Any:
    """The tensor x of a call f(x) without other arguments, except for the mask of x that Keras adds; else None."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    if len(args) != 1 or not isinstance(args[0], keras.KerasTensor):
        return None
    mask = getattr(args[0], "_keras_mask", None)
    return args[0] if all(v is None or (name == "mask" and v is mask) for name, v in kwargs.items()) else None


def has_default_arguments(node: Any) -> bool:
    """Whether the operation was called with its inputs only, apart from arguments that Keras adds."""
    return only_input(node) is not None or all(v is None for v in keras.tree.flatten(node.arguments.kwargs))


def is_graph(model: Any) -> bool:
    """Whether the model has a graph: Functional or built Sequential, or a subclass of these."""
    if isinstance(model, keras.Sequential):
        return model._functional is not None
    return isinstance(model, Functional)


def graphs(model: Any) -> list[Graph]:
    """The graphs of the model and of the models nested in it, each once, outer models first."""
    found: dict[int, Graph] = {}

    def visit(inner: Any) -> None:
        if is_graph(inner) and id(inner) not in found:
            found[id(inner)] = graph = Graph(inner)
            for node in graph.nodes:
                visit(node.operation)

    visit(model)
    return list(found.values())


def calls(model: Any) -> dict[int, list[Any]]:
    """{id(operation): its nodes in all graphs of the model}."""
    found: dict[int, list[Any]] = {}
    for graph in graphs(model):
        for node in graph.nodes:
            found.setdefault(id(node.operation), []).append(node)
    return found


def operations(model: Any) -> list[Any]:
    """Every operation of the model's graphs, once; nested models are replaced by their operations."""
    nodes = [node for graph in graphs(model) for node in graph.nodes]
    return [op for op in {id(node.operation): node.operation for node in nodes}.values() if not is_graph(op)]


def layers(model: Any) -> Iterator[Any]:
    """Every layer, also inside models, wrappers and other layers; where known, in the order of the data flow."""
    seen: set[int] = set()

    def visit(layer: Any) -> Iterator[Any]:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield layer
        if is_graph(layer):
            for node in Graph(layer).nodes:
                if isinstance(node.operation, keras.layers.Layer):
                    yield from visit(node.operation)
        for inner in layer._layers:
            yield from visit(inner)

    return visit(model)


def rewire(copier: Copier, plan: Mapping[int, Replacement]) -> None:
    """Replace operations in the copy of a model. The plan is described at the top of this file.

    All other calls stay the same objects, with the same outputs. Only the inputs change of those that read a result of
    a replaced operation.
    """
    moved: dict[int, Any] = {}  # id(tensor of the copy) -> the one that takes its place

    def follow(value: Any) -> Any:
        return moved.get(id(value), value)

    functionals = copier.pairs(Functional)  # also those that attributes hold
    for node in {id(node): node for original, _ in functionals for node in Graph(original).nodes}.values():
        steps, twin = plan.get(id(node.operation)), copier.of(node)
        if steps is None and not any(id(tensor) in moved for tensor in twin.input_tensors):
            continue
        for source in _sources(twin):
            if twin in source._outbound_nodes:
                source._outbound_nodes.remove(twin)
        args, kwargs = twin.arguments.convert(follow)
        if steps is None:
            twin.arguments = SymbolicArguments(*args, **kwargs)
            for source in _sources(twin):
                source._outbound_nodes.append(twin)
        else:
            outputs = _call(steps, args, {} if has_default_arguments(node) else kwargs)
            moved.update((id(old), new) for old, new in zip(twin.outputs, outputs, strict=True))
    for original, twin in functionals:
        if any(id(operation) in plan for operation in original._operations):
            _renew(twin, follow)
    for original, twin in copier.pairs(keras.Sequential):
        if is_graph(original):
            twin._layers[:] = twin._functional.layers
            _track(twin)


def _sources(node: Any) -> list[Any]:
    """The operations whose results a call reads, as often as it reads them; not those that were dropped."""
    found = (tensor._keras_history.operation for tensor in node.input_tensors)
    return [operation for operation in found if operation is not None]


def _call(steps: Replacement, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The results of steps, one after another, of which the first is called with these arguments."""
    for step in steps:
        args, kwargs = (step(*args, **kwargs),), {}
    outputs: list[Any] = keras.tree.flatten(args)
    return outputs


def _renew(model: Any, follow: Callable[[Any], Any]) -> None:
    """Read a Functional model's graph anew, after calls in it have changed."""
    function = keras.Function(model._inputs_struct, keras.tree.map_structure(follow, model._outputs_struct))
    vars(model).update(_outputs_struct=function._outputs_struct, _outputs=function._outputs)
    with DotNotTrackScope():
        for name in _OPERATIONS:
            setattr(model, name, getattr(function, name))
    model.output_names = [tensor._keras_history.operation.name for tensor in model.outputs]
    _track(model)


def _track(model: Any) -> None:
    """Track the layers of a model's graph, before those that only its attributes hold, and none that was dropped."""
    layers = model._layers if isinstance(model, keras.Sequential) else model.layers
    tracked = model._tracker.config["layers"][1]
    tracked[:] = {id(layer): layer for layer in (*layers, *tracked) if layer is not None}.values()
    model._tracker.stored_ids["layers"] = set(map(id, tracked))
    if model._layers is not tracked:  # Keras 3.5: a Functional model has a list of its own
        model._layers[:] = layers


def check_call(model: Any, plan: Mapping[int, Any]) -> None:
    """Raises if a subclass's call() may use a replaced layer, in another way than the graph does."""
    for own in [graph.model for graph in graphs(model)]:
        if type(own).call in (Functional.call, keras.Sequential.call):
            continue
        plain = {"_functional", *COMPILED, *vars(keras.Model(own.inputs, own.outputs))}
        for name, value in vars(own).items():
            held = None if name in plain else find(value, lambda item: id(item) in plan)
            if held is not None:
                raise ValueError(
                    f"model {own.name} ({type(own).__name__}) can't be copied: its own call() may use its attribute "
                    f"{name}, which holds the layer {held.name}, and the copy replaces that layer"
                )
