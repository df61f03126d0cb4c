"""The activations that the kernels fuse, in every form of Keras's that computes exactly these.

A layer instance is fused if its class is exactly keras.layers.ReLU, LeakyReLU or Activation (a subclass may compute
anything), if it computes in the batch norm's dtype and adds no loss. Any other activation is applied after the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from .framework import SMOOTH


class Fused(NamedTuple):
    """The arguments of bnfast.batch_norm_train."""

    activation: str | None
    negative_slope: float = 0.2


_FUNCTIONS = (
    (keras.activations.linear, Fused(None)),
    (keras.activations.relu, Fused("relu")),
    (keras.activations.relu6, Fused("relu6")),
    (keras.activations.leaky_relu, Fused("leaky_relu", 0.2)),
    # gelu: Keras's default is exact. Not sigmoid: Keras's attaches the logits, which binary cross-entropy reads.
    *((getattr(keras.activations, name, None), Fused(name)) for name in SMOOTH if name != "sigmoid"),
)


def get(activation: Any) -> Callable[..., Any]:
    """keras.activations.get, which also accepts layer instances, but not layer classes."""
    if isinstance(activation, type):
        raise TypeError(
            "activation must be None, a name, a function or a layer instance. "
            f"Received: the class {activation.__name__} (write {activation.__name__}())"
        )
    if isinstance(activation, dict):  # keras.activations.get reads layers only in Keras 3.6 and later
        activation = keras.saving.deserialize_keras_object(activation)
    function: Callable[..., Any] = keras.activations.get(activation)
    return function


def fuse(activation: Callable[..., Any], compute_dtype: str) -> Fused | None:
    """The fused form of this activation, or None if the kernels don't have it."""
    if not isinstance(activation, keras.layers.Layer):
        return _fuse_function(activation)
    if activation.compute_dtype != compute_dtype or activation.activity_regularizer is not None:
        return None
    if type(activation) is keras.layers.Activation:
        return _fuse_function(activation.activation)
    if type(activation) is keras.layers.LeakyReLU:
        return _leaky(activation.negative_slope)
    if type(activation) is keras.layers.ReLU and activation.threshold == 0:
        if activation.max_value is None:
            return _leaky(activation.negative_slope)
        if activation.max_value == 6 and activation.negative_slope == 0:
            return Fused("relu6")
    return None


def _leaky(slope: float) -> Fused | None:
    if slope == 0:
        return Fused("relu")
    return Fused("leaky_relu", float(slope)) if math.isfinite(slope) and slope > 0 else None


def _fuse_function(function: Callable[..., Any]) -> Fused | None:
    return next((fused for known, fused in _FUNCTIONS if function is known), None)
