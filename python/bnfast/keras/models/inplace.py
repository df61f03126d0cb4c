"""A layer of one class becomes one of another where it sits: the same object, variables and name in all that holds it.

Replacing the object instead would mean finding every attribute, list, dict, closure and graph that holds it, and would
change the order of the model's variables. Keras's norms and ours keep the same variables, so the class is all that has
to change, with the three arguments that only our batch norm has, and what Keras keeps of the signature of `call`.
"""

from __future__ import annotations

from typing import Any

_ARGUMENTS = ("activation", "bridge", "replaces")
# Keras's LayerNormalization takes no `training`, ours does: Keras looks once, when a layer is made, and here.
_SIGNATURE = ("_call_signature", "call_signature_parameters", "_call_has_training_arg", "_call_has_context_arg")


def convert_layer_inplace(layer: Any, other: Any) -> None:
    """Give a built layer the class of `other`, which was made from its config."""
    for name in _ARGUMENTS:
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))
        elif name in vars(layer):  # not so where the value is the class's own
            delattr(layer, name)
    for name in _SIGNATURE:
        if hasattr(other, name):
            setattr(layer, name, getattr(other, name))
    layer.supports_jit = other.supports_jit
    layer.__class__ = type(other)


def reset_compiled_functions(model: Any) -> None:
    """Drop what was traced with the layers' old classes; and XLA, where layers came that it has no kernel for."""
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        model.jit_compile = bool(model.jit_compile) and all(layer.supports_jit for layer in model._flatten_layers())
