"""`to_keras(model)`: the inverse of `accelerate`; a model with only Keras's layers, which loads without bnfast.

Layer, group and instance norms, which `accelerate` never makes, become Keras's, too. Classes change, nothing else. Only
a layer that was built with an activation or an Add inside is split. The batch norm keeps its name; if it is an output
of the model, whose names must not change, the last part keeps it. Others are called NAME_bn, NAME_add or
NAME_activation.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import keras

from ..layers import activation as activations
from ..layers import bias
from ..layers.arguments import Features
from ..layers.batch_norm import KERAS
from ..layers.batch_norm_add import BatchNormalizationAdd
from .copy import Copier
from .graph import Replacement, check_call, graphs, is_graph, layers, operations, rewire
from .norms import OURS, RELATIVES, check_model, part, rename, reset_compiled_functions, scalars
from .patch import PatchedBatchNormalization


def to_keras(model: Any, *, inplace: bool = False) -> Any:
    """A model with the same weights, names and outputs and with Keras's own norms. Use it to export and convert.

    Args:
        model: a built model with layers of bnfast's. It is not changed.
        inplace: True changes the given model and returns it, as in `accelerate`.

    Returns:
        The new model, compiled if the model was, as in `accelerate`.

    Raises:
        TypeError: as `accelerate`.
        ValueError: the model has no layer of bnfast's or isn't built, or can't be copied; an activation or an Add is
            built into a batch norm that is converted in place, or whose model is subclassed or a layer of another kind;
            a batch norm has an argument that Keras's layer lacks (momentum=None, correction=1, several axes ...).

    Example:
        >>> import keras
        >>> from bnfast.keras import BatchNormalization, to_keras
        >>> model = keras.Sequential([keras.Input((4,)), BatchNormalization(activation="relu", name="norm")])
        >>> [type(layer).__name__ for layer in to_keras(model).layers]
        ['BatchNormalization', 'Activation']
    """
    check_model(model)
    ours = [layer for layer in layers(model) if _is_ours(layer)]
    if not ours:
        raise ValueError(f"model {model.name} has no layer of bnfast's: its layers are Keras's already")
    in_graphs = operations(model) if is_graph(model) and not inplace else []
    split = {id(layer): layer for layer in in_graphs if _is_ours(layer) and not _is_alone(layer)}
    if not inplace and not is_graph(model) and not all(map(_is_alone, ours)):
        raise ValueError(
            f"model {model.name} ({type(model).__name__}) is neither Functional nor Sequential, so the activation or "
            f"Add that is built into {next(layer.name for layer in ours if not _is_alone(layer))} can't become a layer"
        )
    for layer in ours:
        if id(layer) not in split:
            _require_alone(layer)
    if inplace:
        _convert_all(model)
        return model
    check_call(model, split)
    copier = Copier(shared=scalars(ours))
    copy = copier.duplicate(model)
    outputs = _output_operations(model)
    plan = {key: _apart(copier.of(layer), key in outputs) for key, layer in split.items()}
    _convert_all(copy)
    rewire(copier, plan)
    return copy


def _convert_all(model: Any) -> None:
    ours = [layer for layer in layers(model) if _is_ours(layer)]
    patched = [layer for layer in ours if type(layer) is PatchedBatchNormalization]
    # all are made before one changes
    for layer, other in [(layer, _norm(layer)) for layer in ours if layer not in patched]:
        _convert(layer, other)
    for layer in patched:
        layer.release()
    for layer in layers(model):
        bias.release(layer)
    reset_compiled_functions(model)


def _output_operations(model: Any) -> set[int]:
    """The ids of the operations whose results are outputs of the model, or of one nested in it."""
    tensors = [tensor for graph in graphs(model) for tensor in keras.tree.flatten(graph.outputs)]
    return {id(tensor._keras_history.operation) for tensor in tensors}


def _is_ours(layer: Any) -> bool:
    return type(layer) in OURS or type(layer) in RELATIVES


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
    return activations.fuse(layer._features.activation, layer.compute_dtype) == activations.Fused(None)


def _norm(layer: Any) -> Any:
    """The unbuilt layer of Keras's for this one."""
    if type(layer) in RELATIVES:
        kind, kwargs = RELATIVES[type(layer)]
        return _clone(layer, kind, kwargs)
    return _clone(layer, KERAS, dict.fromkeys(("activation", "bridge", "fused"), ...))


def _clone(layer: Any, kind: Any, changes: dict[str, Any]) -> Any:
    """A new, unbuilt layer with this class and the config of another one. The value ... removes an argument."""
    held = vars(layer)
    try:
        config = layer.get_config()
        config.update((name, held[name]) for name in config if isinstance(held.get(name), FunctionType))
        config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
        with keras.saving.custom_object_scope({type(value).__name__: type(value) for value in held.values()}):
            return kind.from_config(config)
    except Exception as error:
        raise ValueError(
            f"{layer.name} ({kind.__name__}) can't be copied: {kind.__name__}.from_config(get_config()) fails with "
            f"{type(error).__name__}: {error}"
        ) from error


def _apart(norm: Any, is_output: bool) -> Replacement:
    """What takes the place of a layer in the copy: itself as a batch norm, then an Add and an activation."""
    has_add, linear = isinstance(norm, BatchNormalizationAdd), _linear(norm)
    name, activation = norm.name, norm._features.activation
    last = name if is_output else f"{name}_{'add' if linear else 'activation'}"
    words = {"name": last, "dtype": norm.dtype_policy}
    norm._inbound_nodes.clear()  # it is called again
    steps: list[Callable[..., Any]] = [norm]
    if has_add:
        add = keras.layers.Add(**{**words, "name": last if linear else f"{name}_add"})
        steps = [lambda tensors, **kwargs: add([norm(tensors[0], **_first(kwargs)), tensors[1]])]
    if isinstance(activation, keras.layers.Layer):  # the optimizer knows its variables
        steps.append(part(activation, last, norm, shared=activation.variables))
        norm._tracker.untrack(activation)
    elif not linear:
        steps.append(keras.layers.Activation(activation, **words))
    if is_output:
        rename(norm, f"{name}_bn", norm)
    return tuple(steps)


def _first(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call arguments for the batch norm alone: from a list of masks, that of x."""
    return {name: word[0] if isinstance(word, (list, tuple)) else word for name, word in kwargs.items()}


_ARGUMENTS = (*Features._fields, "_bnfast_trace")
# Our LayerNormalization has a `training` argument, Keras's has none. Keras inspects `call` only when a layer is made.
_SIGNATURE = ("_call_signature", "call_signature_parameters", "_call_has_training_arg", "_call_has_context_arg")


def _convert(layer: Any, other: Any) -> None:
    """Give a built layer the class of `other`, a layer made from its config."""
    for name in _ARGUMENTS:
        if name in vars(layer):
            delattr(layer, name)
    for name in _SIGNATURE:
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))
    if isinstance(layer, BatchNormalizationAdd):  # it was built for two tensors
        layer.input_spec = layer.input_spec[0]
        layer._build_shapes_dict = {name: shapes[0] for name, shapes in layer._build_shapes_dict.items()}
    layer.supports_jit = other.supports_jit
    layer.__class__ = type(other)
