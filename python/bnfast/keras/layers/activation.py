"""Which activations the kernels fuse: None, relu, relu6, leaky_relu, and whatever else computes exactly these.

A layer instance counts where it is keras.layers.ReLU, LeakyReLU or Activation itself (a subclass may do anything),
computes in the batch norm's own dtype and adds no loss. Everything else is applied after, as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras


class Fused(NamedTuple):
    """The words of bnfast.batch_norm_train."""

    activation: str | None
    negative_slope: float = 0.2


_FUNCTIONS = (
    (keras.activations.linear, Fused(None)),
    (keras.activations.relu, Fused("relu")),
    (keras.activations.relu6, Fused("relu6")),
    (keras.activations.leaky_relu, Fused("leaky_relu", 0.2)),
)


def get(activation: Any) -> Callable[..., Any]:
    """keras.activations.get, which also takes layer instances; not their classes."""
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
    """How the kernels compute this activation, or None where they don't."""
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
