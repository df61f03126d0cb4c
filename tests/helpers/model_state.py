"""The whole state of a Keras model as comparable values: to show that a function leaves a model as it was."""

from __future__ import annotations

import hashlib
from typing import Any

import keras
import numpy as np


def state(model: Any) -> dict[str, Any]:
    """Weights, seeds, optimizer, metrics and compile state of a model, and what its layers hold under `call`."""
    variables = [*model.variables, *model.metrics_variables]
    if model.compiled and model.optimizer is not None:
        variables += model.optimizer.variables
    hashes = {
        f"{i} {v.path}": hashlib.sha256(np.asarray(keras.ops.convert_to_numpy(v)).tobytes()).hexdigest()
        for i, v in enumerate(variables)
    }
    layers = list(model._flatten_layers())
    functions = {
        name: id(getattr(model, name, None)) for name in ("train_function", "test_function", "predict_function")
    }
    compiled = {
        name: id(vars(model).get(name)) for name in ("optimizer", "_compile_loss", "_compile_metrics", "_loss_tracker")
    }
    metrics = getattr(model, "_compile_metrics", None)
    return {
        **hashes,
        **functions,
        **compiled,
        "metrics built": getattr(metrics, "built", None),
        "layers": [id(layer) for layer in layers],
        "classes": [type(layer) for layer in layers],
        "trainable": [layer.trainable for layer in layers],
        "attributes": [sorted(vars(layer)) for layer in layers],
        "losses": [len(layer._losses) for layer in layers],
        "compiled": model.compiled,
    }
