"""The norm layers of a model as accelerate, report and to_keras see them, and the checks that these share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras

from ..layers.batch_norm import KERAS, BatchNormalization
from ..layers.batch_norm_add import BatchNormalizationAdd
from ..layers.group_norm import GroupNormalization, InstanceNormalization
from ..layers.layer_norm import LayerNormalization
from .copy import duplicate
from .graph import layers
from .patch import PatchedBatchNormalization

# bnfast's batch norms. A class derived from one of them may compute anything, so it doesn't count.
OURS = (BatchNormalization, BatchNormalizationAdd, PatchedBatchNormalization)

# bnfast's norms without moving statistics: Keras's class for each and its extra arguments. Nothing is fused into these.
RELATIVES: dict[Any, tuple[Any, dict[str, Any]]] = {
    LayerNormalization: (LayerNormalization.__bases__[0], {}),
    GroupNormalization: (GroupNormalization.__bases__[0], {}),
    InstanceNormalization: (GroupNormalization.__bases__[0], {"groups": -1}),
}


def norms(model: Any) -> Iterator[Any]:
    """Every batch norm: Keras's class and classes derived from it."""
    return (layer for layer in layers(model) if isinstance(layer, KERAS))


def scalars(layers: list[Any]) -> list[Any]:
    """The variables and tensors that serve as momentum and epsilon: a script that changes them means every copy."""
    values = [getattr(layer, name, None) for layer in layers for name in ("momentum", "epsilon")]
    return [value for value in values if keras.ops.is_tensor(value)]


def check_model(model: Any) -> None:
    """Raises the errors that accelerate and to_keras share: the type, and a model that isn't built."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. Received: {type(model).__module__}.{type(model).__name__}")
    if not model.built or (isinstance(model, keras.Sequential) and model._functional is None):
        raise ValueError(f"model {model.name} is not built: give it an Input, or call it once, before")


def reset_compiled_functions(model: Any) -> None:
    """Drop the functions traced with the old classes of layers, and switch XLA off if a layer does not support it."""
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        model.jit_compile = bool(model.jit_compile) and all(layer.supports_jit for layer in model._flatten_layers())


def part(layer: Any, name: str, whole: Any, shared: Iterable[Any] = ()) -> Any:
    """A copy of a layer inside another one, as a layer of a model with a name of its own, in place of that one."""
    new = duplicate(layer, shared)
    for calls in (new._inbound_nodes, new._outbound_nodes):
        calls.clear()
    rename(new, name, whole)
    return new


def rename(layer: Any, name: str, place: Any) -> None:
    """Name a built layer and its variables as if it stood beside, or in place of, another layer."""
    path = "/".join([*(place.path or place.name).split("/")[:-1], name])
    for variable in layer.variables:
        if variable.path.startswith(f"{layer.path}/"):
            variable._path = path + variable.path.removeprefix(layer.path)
    layer.name, layer._path = name, path
