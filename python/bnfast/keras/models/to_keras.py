"""`to_keras(model)`: the inverse of `accelerate`; a model with only Keras's layers, which loads without bnfast.

Layer, group and instance norms, which `accelerate` never makes, become Keras's, too. Classes change, nothing else. Only
a layer that was built with an activation or an Add inside is split. The batch norm keeps its name; if it is an output
of the model, whose names must not change, the last part keeps it. Others are called NAME_bn, NAME_add or
NAME_activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from ..layers import activation as activations
from ..layers import bias
from ..layers.batch_norm import KERAS
from ..layers.batch_norm_add import BatchNormalizationAdd
from ..layers.framework import renorm
from .compiled import carry_over
from .copy import duplicate
from .graph_copy import Graph, Replacement, assign, clone, graphs, is_graph, layers, operations, paired, rebuild
from .inplace import reset_compiled_functions
from .norms import OURS, RELATIVES, check_model, scalars
from .patch import PatchedBatchNormalization


def to_keras(model: Any, *, inplace: bool = False) -> Any:
    """A model with the same weights, names and outputs and with Keras's own norms. Use it to export and convert.

    Args:
        model: a built model with layers of bnfast's. It is not changed.
        inplace: True changes the given model and returns it, as in `accelerate`.

    Returns:
        The new model, compiled if the model was, as in `accelerate`.

    Raises:
        TypeError, RuntimeError: as `accelerate`.
        ValueError: the model has no layer of bnfast's or isn't built, or can't be copied; an activation or an Add is
            built into a batch norm that is converted in place, or whose model is subclassed or a layer of another kind;
            a batch norm has an argument that Keras's layer lacks (momentum=None, correction=1, several axes ...).
    """
    check_model(model, "to_keras")
    ours = [layer for layer in layers(model) if _is_ours(layer)]
    if not ours:
        raise ValueError(f"model {model.name} has no layer of bnfast's: its layers are Keras's already")
    if not inplace and not all(map(_is_alone, ours)):
        if is_graph(model):
            return _copied(model, ours)
        raise ValueError(
            f"model {model.name} ({type(model).__name__}) is neither Functional nor Sequential, so the activation or "
            f"Add that is built into {next(layer.name for layer in ours if not _is_alone(layer))} can't become a layer"
        )
    for layer in ours:
        _require_alone(layer)
    if not inplace:
        model = duplicate(model, shared=scalars(ours))
        ours = [layer for layer in layers(model) if _is_ours(layer)]
    # all are made before one changes
    for layer, keras_layer in [(layer, None if _is_patched(layer) else _norm(layer, layer.name)) for layer in ours]:
        if keras_layer is None:
            layer.release()
        else:
            _convert(layer, keras_layer)
    for layer in layers(model):
        bias.release(layer)
    reset_compiled_functions(model)
    return model


def _copied(model: Any, ours: list[Any]) -> Any:
    in_graphs = {id(operation) for operation in operations(model)}
    outputs = {id(node.operation) for graph in graphs(model) for node in _output_nodes(graph)}
    plan: dict[int, Replacement] = {}
    parts: list[tuple[Any, list[Any]]] = []  # (our layer; its batch norm and, if it is a layer, its activation)
    for layer in ours:
        if id(layer) in in_graphs:
            new, plan[id(layer)] = _apart(layer, id(layer) in outputs)
            parts.append((layer, new))
        else:
            _require_alone(layer)
    copy = rebuild(model, plan)
    pairs = [pair for layer, new in parts for pair in _pairs(layer, *new)]
    assign(pairs)
    for original in operations(model):
        if isinstance(original, keras.layers.Layer) and id(original) in copy.of:
            for inner in list(layers(copy.of[id(original)])):
                if _is_ours(inner):
                    _convert(inner, _norm(inner, inner.name))
    variables = copy.variables(operations(model))
    variables.update((id(old), new) for old, new in pairs)
    carry_over(model, copy.model, variables)
    return copy.model


def _output_nodes(graph: Graph) -> list[Any]:
    nodes = (graph.producer(tensor) for tensor in keras.tree.flatten(graph.outputs))
    return [node for node in nodes if node is not None]


def _is_ours(layer: Any) -> bool:
    return type(layer) in OURS or type(layer) in RELATIVES


def _is_patched(layer: Any) -> bool:
    return type(layer) is PatchedBatchNormalization


def _is_alone(layer: Any) -> bool:
    """Whether no activation or Add is built into the layer."""
    return not isinstance(layer, BatchNormalizationAdd) and _linear(layer)


def _require_alone(layer: Any) -> None:
    if not _is_alone(layer):
        raise ValueError(
            f"layer {layer.path or layer.name} has an activation or an Add fused into it: not convertible in place"
        )


def _linear(layer: Any) -> bool:
    if type(layer) in RELATIVES:
        return True
    return activations.fuse(layer.activation, layer.compute_dtype) == activations.Fused(None)


def _norm(layer: Any, name: str) -> Any:
    """The unbuilt layer of Keras's for this one."""
    if type(layer) in RELATIVES:
        kind, kwargs = RELATIVES[type(layer)]
        return clone(layer, kind, name=name, **kwargs)
    return clone(layer, KERAS, name=name, activation=..., bridge=..., fused=...)


def _pairs(layer: Any, norm: Any, activation: Any = None) -> list[tuple[Any, Any]]:
    """(variable, its counterpart) for a layer and its parts."""
    names = ("gamma", "beta", "moving_mean", "moving_variance", *renorm.NAMES)
    own = [(getattr(layer, name), getattr(norm, name)) for name in names if getattr(norm, name, None) is not None]
    return [*own, *([] if activation is None else paired(layer.activation, activation))]


def _apart(layer: Any, is_output: bool) -> tuple[list[Any], Replacement]:
    """The batch norm and, if it is a layer, the activation; and the steps that replace the layer."""
    has_add, linear = isinstance(layer, BatchNormalizationAdd), _linear(layer)
    if not has_add and linear:
        norm = _norm(layer, layer.name)
        return [norm], (norm,)
    norm = _norm(layer, f"{layer.name}_bn" if is_output else layer.name)
    last = layer.name if is_output else f"{layer.name}_{'add' if linear else 'activation'}"
    steps: list[Callable[..., Any]] = []
    if has_add:
        add_name = last if linear else f"{layer.name}_add"
        add = keras.layers.Add(name=add_name, dtype=layer.dtype_policy)
        steps.append(lambda tensors, **kwargs: add([norm(tensors[0], **_first(kwargs)), tensors[1]]))
    else:
        steps.append(norm)
    if linear:
        return [norm], tuple(steps)
    if isinstance(layer.activation, keras.layers.Layer):
        activation = clone(layer.activation, name=last)
        return [norm, activation], (*steps, activation)
    return [norm], (*steps, keras.layers.Activation(layer.activation, name=last, dtype=layer.dtype_policy))


def _first(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call arguments for the batch norm alone: from a list of masks, that of x."""
    return {name: word[0] if isinstance(word, (list, tuple)) else word for name, word in kwargs.items()}


_ARGUMENTS = ("activation", "bridge", "trace")
# Our LayerNormalization has a `training` argument, Keras's has none. Keras inspects `call` only when a layer is made.
_SIGNATURE = ("_call_signature", "call_signature_parameters", "_call_has_training_arg", "_call_has_context_arg")


def _convert(layer: Any, other: Any) -> None:
    """Give a built layer the class of `other`, a layer made from its config."""
    for name in _ARGUMENTS:
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))
        elif name in vars(layer):  # it may also be a class attribute, which stays
            delattr(layer, name)
    for name in _SIGNATURE:
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))
    layer.supports_jit = other.supports_jit
    layer.__class__ = type(other)
