"""Copies a Keras model and replaces, fuses or drops some of its operations. All other names stay.

The original is only read: operations are cloned by config, and values are copied. Models keep their classes and their
attributes, without a call of a subclass's __init__. `graphs(model)` gives the model and the models nested in it; the
nodes of a graph are its calls of operations, in the order of the data flow. `calls(model)` gives the nodes of an
operation in all graphs: more than one for a shared layer. Operations in the plan are replaced:

    plan[id(relu)] = (fused,)              # called with the ReLU's inputs: x -> fused(x)
    plan[id(bn)] = ()                      # dropped: its consumers get its input
    plan[id(layer)] = (first, second)      # first, then second
    copy = rebuild(model, plan)            # copy.model, copy.of[id(operation)] = its clone
    transfer(bn, fused)                    # after rebuild: the caller copies the values of its replacements

In a Sequential model replacements are layers. Elsewhere they are any callables.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy as shallow_copy
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import keras
from keras.src.models.functional import Functional  # Keras has no public name for it

from ..layers.bias import keras_class
from .copy import Copier, find

Replacement = tuple[Callable[..., Any], ...]


# What compile(), fit(), evaluate() and predict() add to a model. The copy is not compiled.
COMPILED_STATE = frozenset(
    {"_compile_config", "_compiled_trainable_state", "history", "optimizer", "stop_evaluating", "stop_predicting"}
    | {"_eval_epoch_iterator", "stop_training"}
)


@dataclass
class Copy:
    model: Any
    of: dict[int, Any] = field(default_factory=dict)  # id(operation of the original) -> its clone
    models: list[tuple[Any, Any]] = field(default_factory=list)  # each model and its copy, inner models first
    tensors: list[tuple[Any, Any]] = field(default_factory=list)  # each symbolic tensor and what takes its place

    def variables(self, originals: Iterable[Any]) -> dict[int, Any]:
        """{id(variable): its copy} for those of these operations that were cloned."""
        pairs = ((original, self.of.get(id(original))) for original in originals)
        return {id(a): b for original, clone in pairs if clone is not None for a, b in paired(original, clone)}


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

    def sole_consumer(self, node: Any) -> Any:
        """The only consumer of this node's only output; None if there is none, or if the model outputs it too."""
        if len(node.outputs) != 1 or id(node.outputs[0]) in self._outputs:
            return None
        consumers = self._consumers.get(id(node.outputs[0]), [])
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
    """Whether `rebuild` supports the model: Functional or built Sequential, or a subclass of these."""
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


def rebuild(model: Any, plan: Mapping[int, Replacement]) -> Copy:
    """The uncompiled copy of a model for which `is_graph` holds. The plan is described at the top of this file.

    Raises ValueError, with the layer's name, if a layer can't be cloned by its config, or if an attribute of a model
    can't be copied.
    """
    copy = Copy(None)
    copy.model = _copy_model(model, plan, copy)
    for operation in operations(model):
        if id(operation) in copy.of:
            transfer(operation, copy.of[id(operation)])
    _copy_attributes(model, plan, copy)
    return copy


def _copy_model(model: Any, plan: Mapping[int, Replacement], copy: Copy) -> Any:
    of = copy.of
    if id(model) in of:
        return of[id(model)]

    def replacement(operation: Any) -> Replacement:
        if id(operation) in plan:
            return plan[id(operation)]
        if id(operation) not in of:
            of[id(operation)] = _copy_model(operation, plan, copy) if is_graph(operation) else clone(operation)
        return (of[id(operation)],)

    # Keras's own __init__, on the class of the model: a subclass's may need arguments, and builds layers of its own.
    if isinstance(model, keras.Sequential):
        new = keras.Sequential.__new__(type(model))
        steps = [layer for old in model.layers for layer in replacement(old)]
        keras.Sequential.__init__(new, [clone(model._layers[0]), *steps], name=model.name)
    else:
        inputs, outputs = _copy_functional(model, replacement, copy)
        new = Functional.__new__(type(model))
        Functional.__init__(new, inputs, outputs, name=model.name)
    new._trainable = model.trainable  # not by the setter, which would overwrite the flags of the layers
    new._called = model._called  # Keras refuses to export a model to ONNX that was never called
    if model.dtype_policy.quantization_mode is None:
        new.dtype_policy = model.dtype_policy
    of[id(model)] = new
    copy.models.append((model, new))
    return new


def _copy_functional(model: Any, replacement: Callable[[Any], Replacement], copy: Copy) -> tuple[Any, Any]:
    """The inputs and outputs of the copy's graph."""
    graph, values = Graph(model), {}
    for tensor in keras.tree.flatten(graph.inputs):
        values[id(tensor)] = clone(tensor._keras_history.operation).output
        copy.tensors.append((tensor, values[id(tensor)]))
    for node in graph.nodes:
        args, kwargs = node.arguments.fill_in(values)
        if has_default_arguments(node):  # a replacement may not accept the mask=None that Keras added
            kwargs = {}
        with name_scopes(node.operation):
            for step in replacement(node.operation):
                args, kwargs = (step(*args, **kwargs),), {}
        outputs = keras.tree.flatten(args)
        pairs = list(zip(node.outputs, outputs, strict=True))
        values.update((id(tensor), value) for tensor, value in pairs)
        copy.tensors += pairs
    inputs, outputs = (
        keras.tree.map_structure(lambda tensor: values[id(tensor)], tensors)
        for tensors in (graph.inputs, graph.outputs)
    )
    return inputs, outputs


def _copy_attributes(model: Any, plan: Mapping[int, Replacement], copy: Copy) -> None:
    """Give the copied models the attributes that a subclass, or its user, has set.

    Attributes that hold a layer of the graph get the layer that takes its place, or None if it was dropped.
    """
    extra = {id(old): [n for n in vars(old) if n not in {*vars(new), *COMPILED_STATE}] for old, new in copy.models}
    if not any(extra.values()):
        return
    copier = Copier("Remove the attribute from the model, and set it on the copy")
    for operation in operations(model):
        new = copy.of.get(id(operation))
        if id(operation) in plan:
            steps = [step for step in plan[id(operation)] if isinstance(step, keras.layers.Layer)]
            copier.pair(operation, steps[0] if steps else None)
        elif isinstance(operation, keras.layers.Layer):
            copier.pair_layers(operation, new)
        else:
            copier.pair(operation, new)
    for old, new in copy.models:
        copier.pair(old, new)
        copier.pair(old._tracker, new._tracker)
    for tensor, value in copy.tensors:
        copier.pair(tensor, value)
    for old, new in copy.models:
        names = extra[id(old)]
        _check_call(old, names, plan)
        if "_auto_config" in vars(old):  # the constructor's arguments, for get_config
            names = ["_auto_config", *names]
        copier.copy_attributes(old, new, names)


def _check_call(model: Any, names: list[str], plan: Mapping[int, Replacement]) -> None:
    """A subclass's call() may use layers in another way than the graph, for which alone the plan is right."""
    if type(model).call in (Functional.call, keras.Sequential.call):
        return
    for name in names:
        held = find(vars(model)[name], lambda item: id(item) in plan)
        if held is not None:
            raise ValueError(
                f"model {model.name} ({type(model).__name__}) can't be copied: its own call() may use its attribute "
                f"{name}, which holds the layer {held.name}, and the copy replaces that layer"
            )


def name_scopes(operation: Any) -> ExitStack:
    """The name scopes in which a layer was built: they are part of the paths of its variables."""
    stack = ExitStack()
    for name in (getattr(operation, "path", None) or "").split("/")[:-1]:
        stack.enter_context(keras.name_scope(name))
    return stack


def clone(thing: Any, kind: Any = None, **changes: Any) -> Any:
    """A new, unbuilt layer with this class and config. Also for optimizers and metrics.

    `kind` overrides the class and `changes` the config; the value ... removes an argument. Values of variables are not
    copied (see `transfer`). Operations of keras.ops have no state and are copied directly.
    """
    if isinstance(thing, keras.Operation) and not isinstance(thing, keras.layers.Layer):
        same = shallow_copy(thing)
        same._inbound_nodes, same._outbound_nodes = [], []
        return same
    kind, held = kind or keras_class(thing), vars(thing)
    try:
        config = thing.get_config()
        own = {name: held.get(name, held.get(f"_{name}")) for name in config}
        config.update((name, value) for name, value in own.items() if isinstance(value, FunctionType))
        if hasattr(kind, "not_in_config") and hasattr(thing, "not_in_config"):
            config.update(thing.not_in_config())
        config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
        if kind is keras.layers.Lambda:  # Lambda.from_config accepts functions only by name
            return kind(**config)
        with keras.saving.custom_object_scope({type(value).__name__: type(value) for value in held.values()}):
            return kind.from_config(config)
    except Exception as error:
        raise ValueError(
            f"{thing.name} ({kind.__name__}) can't be copied: {kind.__name__}.from_config(get_config()) fails with "
            f"{type(error).__name__}: {error}"
        ) from error


def paired(original: Any, copy: Any) -> list[tuple[Any, Any]]:
    """Pairs (variable, copy) for two layers with the same variables in the same order."""
    if not isinstance(original, keras.layers.Layer):
        return []
    pairs = list(zip(original.variables, copy.variables, strict=False))
    if len(original.variables) != len(copy.variables) or any(a.shape != b.shape for a, b in pairs):
        shapes = ([tuple(variable.shape) for variable in layer.variables] for layer in (original, copy))
        raise ValueError(
            f"layer {original.name} ({type(original).__name__}) can't be copied: its variables have shapes "
            "{}, those of the layer made from its config {}".format(*shapes)
        )
    return pairs


def assign(pairs: Iterable[tuple[Any, Any]]) -> None:
    for old, new in pairs:
        new.assign(old)
        new.trainable = old.trainable


def transfer(original: Any, copy: Any) -> None:
    """Copy the state of a built layer: variables, random seeds, vocabulary, and trainable flags."""
    assign(paired(original, copy))
    if callable(getattr(original, "save_assets", None)) and callable(getattr(original, "get_vocabulary", None)):
        with tempfile.TemporaryDirectory() as folder:
            original.save_assets(folder)
            copy.load_assets(folder)
    if callable(getattr(copy, "finalize_state", None)):  # Normalization caches tensors computed from its variables
        copy.finalize_state()
