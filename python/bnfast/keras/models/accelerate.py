"""`accelerate(model)`: the same model with its batch norms on bnfast, fused with the layers that follow where exact.

The result is a copy made from configs (graph_copy.py), with values, flags and compiled state copied; or, with
inplace=True, the model itself. In place, only the class of a layer changes: the object keeps its place in attributes,
lists, dicts and graphs, with the same variables in the same order, so weights, optimizer slots and files don't change.
"""

from __future__ import annotations

from typing import Any

import keras

from ..layers.batch_norm import BatchNormalization
from ..layers.batch_norm_add import BatchNormalizationAdd
from .classes import OURS, check_model
from .compiled import carry_over
from .fusion import Finder, Fusion, layer_of
from .graph_copy import Bundle, Replacement, clone, is_graph, layers, name_scopes, operations, paired, rebuild, transfer
from .inplace import convert_layer_inplace, reset_compiled_functions
from .patch import uses_bnfast
from .report import norms, report, why_unchanged


def accelerate(
    model: Any, *, inplace: bool = False, strict: bool = False, bridge: str = "auto", verbose: bool = True
) -> Any:
    """A model with the same weights, names and outputs, whose batch norms are bnfast's.

    Each keras.layers.BatchNormalization (exactly that class) becomes a `bnfast.keras.BatchNormalization`. If only a
    ReLU, ReLU6 or LeakyReLU reads its output, the two become one layer; so do BN + Add and BN + Add + activation
    (`BatchNormalizationAdd`). The fused layer has the name of the last of them. Other layers stay, Keras's layer and
    group norms included: bnfast.keras has layers of the same names to replace them by hand.
    `bnfast.keras.report(model)` lists what each batch norm is now, why, and which names were removed; `to_keras` is the
    way back.

    If only a batch norm reads the output of a Dense or convolution layer, training leaves out that layer's bias: the
    batch's mean would take it away again. y and moving_mean are the same. The gradient of the bias is exactly 0 instead
    of a sum of rounding errors, without the pass over memory that Keras needs for it (2 % of a ResNet50 step).

    Args:
        model: a built Functional or Sequential model, which may contain nested models. It is not changed.
        inplace: True changes the given model and returns it. Subclassed models need this. Layers change their class,
            nothing is fused, and compiled state needs no copy.
        strict: raise if a batch norm would stay on Keras's layer, before anything is changed.
        bridge: how TensorFlow calls the kernels, as in `bnfast.keras.BatchNormalization`.
        verbose: print the report.

    Returns:
        The new model, compiled if the model was: optimizer with its slots and iterations, losses and metrics. Layers
        and optimizer are copies: training one model doesn't change the other. A model compiled with jit_compile=True
        continues without XLA, which can't call the kernels.

    Raises:
        TypeError: not a keras.Model.
        ValueError: the model has no batch norm or isn't built; it is subclassed and inplace isn't True; a layer can't
            be copied from its config; strict=True and a batch norm stays on Keras's layer. The message names the layer.
        RuntimeError: Keras runs on a backend other than TensorFlow.
    """
    check_model(model, "accelerate")
    found = list(norms(model))
    if not found:
        raise ValueError(f"model {model.name} has no batch norm: there is nothing to accelerate")
    if not inplace and not is_graph(model):
        raise ValueError(
            f"model {model.name} ({type(model).__name__}) is neither Functional nor Sequential, so it can't be copied "
            "layer by layer: accelerate(model, inplace=True) replaces the layers of the model itself"
        )
    finder = Finder(model)
    others = [norm for norm in found if type(norm) not in OURS or not uses_bnfast(norm)]
    reasons = {id(norm): why_unchanged(norm, finder.shape(norm), bridge) for norm in others}
    if strict:
        for norm in found:
            if reasons.get(id(norm)) is not None:
                raise ValueError(
                    f"strict=True, and batch norm {norm.path or norm.name} stays on Keras's layer: {reasons[id(norm)]}"
                )
    swapped = [norm for norm in found if _unfused(norm) and reasons.get(id(norm)) is None]
    options = {} if bridge == "auto" else {"bridge": bridge}
    if inplace:
        for norm, ours in [
            (norm, _alone(norm, finder, options)) for norm in swapped
        ]:  # all are made before one changes
            convert_layer_inplace(norm, ours)
        reset_compiled_functions(model)
    else:
        model = _accelerated(model, swapped, finder, options)
    if verbose:
        print(report(model))
    return model


def _accelerated(model: Any, swapped: list[Any], finder: Finder, options: dict[str, Any]) -> Any:
    in_graphs = {id(operation) for operation in operations(model)}
    plan: dict[int, Replacement] = {}
    new: list[tuple[Any, Any]] = []  # (batch norm, ours)
    for norm in (norm for norm in swapped if id(norm) in in_graphs):
        fusion = finder.find(norm)
        if isinstance(fusion, str):
            ours = _alone(norm, finder, options)
            plan[id(norm)] = (ours,)
        else:
            ours = _fused(norm, fusion, finder, options)
            shape = norm.get_build_config()["input_shape"]
            with name_scopes(norm):  # the activation that it replaces has no path
                ours.build(shape if fusion.add is None else [shape, shape])
            plan.update(_steps(norm, fusion, ours))
        new.append((norm, ours))
    copy = rebuild(model, plan)
    for norm, ours in new:
        transfer(norm, ours)
    chosen = {id(norm) for norm in swapped}
    for original in operations(model):  # batch norms inside layers of other kinds
        if isinstance(original, keras.layers.Layer) and id(original) in copy.of:
            for old, inner in zip(layers(original), layers(copy.of[id(original)]), strict=True):
                if id(old) in chosen:
                    convert_layer_inplace(inner, clone(inner, BatchNormalization, **options))
    variables = copy.variables(operations(model))
    variables.update((id(a), b) for norm, ours in new for a, b in paired(norm, ours))
    carry_over(model, copy.model, variables)
    return copy.model


def _unfused(norm: Any) -> bool:
    """Whether nothing is fused into this batch norm, Keras's or ours."""
    activation = getattr(norm, "activation", keras.activations.linear)
    return activation is keras.activations.linear and not isinstance(norm, BatchNormalizationAdd)


def _alone(norm: Any, finder: Finder, options: dict[str, Any]) -> Any:
    """The unbuilt layer that replaces this batch norm alone."""
    return clone(norm, BatchNormalization, replaces=_bias(norm, finder), **options)


def _bias(norm: Any, finder: Finder) -> dict[str, Any]:
    name = finder.bias_before(norm)
    return {} if name is None else {"bias": name}


def _fused(norm: Any, fusion: Fusion, finder: Finder, options: dict[str, Any]) -> Any:
    """The unbuilt layer that replaces all layers of the fusion."""
    gone: dict[str, Any] = {"norm": norm.name, **_bias(norm, finder)}
    if fusion.add is not None:
        gone["place"] = fusion.place
        if fusion.activation is not None:
            gone["add"] = fusion.add.name
    activation = None if fusion.activation is None else clone(layer_of(fusion.activation, norm))
    kind = BatchNormalization if fusion.add is None else BatchNormalizationAdd
    return clone(norm, kind, name=fusion.last.name, activation=activation, replaces=gone, **options)


def _steps(norm: Any, fusion: Fusion, ours: Any) -> dict[int, Replacement]:
    """The plan of one fusion: the fused layer gets the batch norm's input and the other input of the Add."""
    if fusion.add is None:
        return {id(norm): (), id(fusion.activation): (ours,)}

    def pair(*tensors: Any) -> list[Any]:
        two = list(tensors[0]) if len(tensors) == 1 else list(tensors)  # the Add layer takes a list, keras.ops.add two
        return [two[fusion.place], two[1 - fusion.place]]

    if fusion.activation is None:
        return {id(norm): (), id(fusion.add): (lambda *tensors: ours(pair(*tensors)),)}
    return {
        id(norm): (),
        id(fusion.add): (lambda *tensors: Bundle(pair(*tensors)),),
        id(fusion.activation): (lambda bundle: ours(bundle.tensors),),
    }
