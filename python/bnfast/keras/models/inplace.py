"""What a model has to forget after the class of one of its layers was changed in place."""

from __future__ import annotations

from typing import Any


def reset_compiled_functions(model: Any) -> None:
    """Drop the functions traced with the old classes, and switch XLA off if a layer does not support it."""
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        model.jit_compile = bool(model.jit_compile) and all(layer.supports_jit for layer in model._flatten_layers())
