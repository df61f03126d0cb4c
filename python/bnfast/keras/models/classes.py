"""The classes of norm layers that the functions of whole models distinguish, and the checks that these share."""

from __future__ import annotations

from typing import Any

import keras

from ..layers.batch_norm import BatchNormalization
from ..layers.batch_norm_add import BatchNormalizationAdd
from ..layers.framework import check_backend
from ..layers.group_norm import GroupNormalization, InstanceNormalization
from ..layers.layer_norm import LayerNormalization
from .patch import PatchedBatchNormalization

# bnfast's batch norms. A class derived from one of them may compute anything, so it doesn't count.
OURS = (BatchNormalization, BatchNormalizationAdd, PatchedBatchNormalization)

# bnfast's norms without moving statistics: Keras's class for each and its extra arguments. Nothing is fused into these.
RELATIVES: dict[Any, tuple[Any, dict[str, Any]]] = {
    LayerNormalization: (LayerNormalization.__bases__[0], {}),
    GroupNormalization: (GroupNormalization.__bases__[0], {}),
    InstanceNormalization: (GroupNormalization.__bases__[0], {"groups": -1}),
}


def check_model(model: Any, function: str) -> None:
    """Raises the errors that accelerate and to_keras share: backend, type, and a model that isn't built."""
    check_backend(function)
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. Received: {type(model).__module__}.{type(model).__name__}")
    if not model.built or (isinstance(model, keras.Sequential) and model._functional is None):
        raise ValueError(f"model {model.name} is not built: give it an Input, or call it once, before")
