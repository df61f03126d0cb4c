"""Changes the class of a layer in place: same object, same variables, same name.

Replacing the object would require finding every attribute, list, dict, closure and graph that refers to it, and would
change the order of the model's variables. Keras's norms and ours have the same variables, so it is enough to change the
class, the three arguments that only our batch norm has, and what Keras stores of the signature of `call`.
"""

from __future__ import annotations

from typing import Any

_ARGUMENTS = ("activation", "bridge", "replaces")
# Our LayerNormalization has a `training` argument, Keras's has none. Keras inspects `call` only when a layer is made.
_SIGNATURE = ("_call_signature", "call_signature_parameters", "_call_has_training_arg", "_call_has_context_arg")


def convert_layer_inplace(layer: Any, other: Any) -> None:
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


def reset_compiled_functions(model: Any) -> None:
    """Drop the functions traced with the old classes, and switch XLA off if a new layer does not support it."""
    model.train_function = model.test_function = model.predict_function = None
    if model.compiled:
        model.jit_compile = bool(model.jit_compile) and all(layer.supports_jit for layer in model._flatten_layers())
