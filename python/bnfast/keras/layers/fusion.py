"""Where Keras's operations see that a batch norm of bnfast's made their input, and become part of its op; and where
Keras's own compiled functions let inference run on the kernels.

All of Keras's layers, keras.ops and keras.activations reach TensorFlow and JAX through the functions of Keras's
backend. `install` puts a function of the same signature in the place of those that add or activate. Each asks
`tensorflow.fusion`, or `portable.jax_fusion`, whether its input is the output of a batch norm in the graph being
traced; if it isn't, Keras's own function computes the result. The framework's own modules stay as they are: tf.nn.relu,
jax.nn.relu and `+` on tensors are not fused. On PyTorch there is no door: nothing is fused.

On JAX selu and leaky_relu aren't fused: JAX's have another slope at exactly 0 than the kernels.

The functions that `evaluate` and `predict` compile are never exported, so in them inference may use bnfast's op
(`tensorflow.inference`). `install` also has them wrapped. `export` and tf.function trace functions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import keras
import numpy as np

from .framework import FUSES, ON_TENSORFLOW, folding, fusion, inference

_installed = False


def install() -> None:
    """Called by the first batch norm that is made or adopted. Without effect afterwards, and on PyTorch."""
    global _installed
    if _installed or not FUSES:
        return
    _installed = True
    backend = keras.src.backend
    for name in ("relu", "relu6", "silu", "hard_silu", "hard_sigmoid"):
        _wrap(backend.nn, name, _named(name))
    for owner, name, fused in (
        (backend.nn, "sigmoid", _sigmoid),
        (backend.nn, "elu", _elu),
        (backend.nn, "gelu", _gelu),
        (backend.nn, "softplus", _softplus),
        (backend.numpy, "tanh", _named("tanh")),
        (backend.numpy, "add", _add),
    ):
        _wrap(owner, name, fused)
    mish: Any = getattr(keras.src.activations.activations, "Mish", None)  # Keras 3.8 and later
    if mish is not None:
        mish.static_call = staticmethod(_first(_named("mish"), mish.static_call))
    if not ON_TENSORFLOW:
        return
    _wrap(backend.nn, "selu", _named("selu"))
    _wrap(backend.nn, "leaky_relu", _leaky_relu)
    trainer: Any = keras.src.backend.tensorflow.trainer.TensorFlowTrainer
    for kind in ("test", "predict"):
        _wrap_compiled(trainer, f"make_{kind}_function", f"{kind}_function")


def trace_of(operation: Any) -> fusion.Trace:
    """What may be fused: the operations after this one, at most 2, that are the only readers of what is before them.

    A functional model knows the readers of each tensor. Elsewhere they are unknown, and count as one each.
    """
    alone = len(operation._inbound_nodes) == len(operation._outbound_nodes) == 1
    for count in range(2):
        if len(operation._inbound_nodes) != 1 or not operation._outbound_nodes:
            break
        if len(operation._outbound_nodes) > 1:
            return fusion.Trace(count, alone)
        operation = operation._outbound_nodes[0].operation
    return fusion.Trace(2, alone)


def has_other_readers(operation: Any) -> bool:
    """Whether a functional model reads the input of this operation elsewhere, too."""
    tensors = [tensor for node in operation._inbound_nodes for tensor in node.input_tensors]
    makers = [tensor._keras_history.operation for tensor in tensors]
    return any(len(maker._outbound_nodes) > len(maker._inbound_nodes) for maker in makers)


def _wrap(owner: Any, name: str, fused: Callable[..., Any]) -> None:
    setattr(owner, name, _first(fused, getattr(owner, name)))


def _first(fused: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """The function that tries `fused` and calls Keras's own where that has no result."""

    @wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = fused(*args, **kwargs)
        return own(*args, **kwargs) if result is None else result

    return function


def _wrap_compiled(trainer: Any, make: str, attribute: str) -> None:
    own = getattr(trainer, make)

    @wraps(own)
    def function(self: Any, force: bool = False) -> Any:
        result = own(self, force)
        compiled = getattr(self, attribute)
        if not isinstance(compiled, _OnKernels) and not self.jit_compile:  # XLA has no kernel for the op
            setattr(self, attribute, _OnKernels(compiled))
        return result

    setattr(trainer, make, function)


class _OnKernels:
    """A function that may run inference on the kernels while it is traced by a call."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with inference.on_kernels():
            return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_function":
            raise AttributeError(name)
        return getattr(self._function, name)


def _named(activation: str) -> Callable[[Any], Any]:
    return lambda x: fusion.activate(x, activation)


def _sigmoid(x: Any) -> Any:
    y = fusion.activate(x, "sigmoid")
    if y is not None and ON_TENSORFLOW:
        y._keras_logits = x  # as in Keras's own, for the losses of binary classification
    return y


def _elu(x: Any, alpha: float = 1.0) -> Any:
    return fusion.activate(x, "elu") if isinstance(alpha, (int, float)) and alpha == 1 else None


def _gelu(x: Any, approximate: bool = True) -> Any:
    return fusion.activate(x, "gelu_tanh" if approximate else "gelu")


def _leaky_relu(x: Any, negative_slope: float = 0.2) -> Any:
    if not (isinstance(negative_slope, (int, float)) and math.isfinite(negative_slope) and negative_slope > 0):
        return None
    return fusion.activate(x, "leaky_relu", float(np.float32(negative_slope)))  # TensorFlow's op stores 32 bits of it


def _softplus(x: Any) -> Any:
    y = fusion.activate(x, "softplus")
    return folding.softplus(x) if y is None and ON_TENSORFLOW else y


def _add(x1: Any, x2: Any) -> Any:
    return fusion.add(x1, x2)
