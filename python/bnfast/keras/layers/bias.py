"""Keras's convolution layers with `bias.pass_over`: for those whose output a batch norm of bnfast's reads.

`adopt(layer)` changes nothing but the class of a layer. The class has the name of Keras's, and a layer of it is saved
and pickled as Keras's layer. Dense stays: Keras quantizes only layers of exactly that class, and the pass over its
output is short.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import keras
from keras.src import api_export

from .framework import ON_TENSORFLOW, bias

_KINDS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


_made: dict[Any, Any] = {}  # the class for each of Keras's


def adopt(layer: Any) -> None:
    """Changes the class of a layer of exactly these of Keras's kinds that adds a bias last; leaves all others.

    Without effect off TensorFlow.
    """
    if (
        ON_TENSORFLOW
        and type(layer) in _KINDS
        and layer.use_bias
        and layer.activation in (None, keras.activations.linear)
    ):
        layer.__class__ = _passing(type(layer))


def release(layer: Any) -> None:
    """Undoes `adopt`."""
    layer.__class__ = keras_class(layer)


def keras_class(layer: Any) -> Any:
    """The class of a layer, or the one that it had before `adopt`."""
    kind = type(layer)
    return next((known for known, made in _made.items() if kind is made), kind)


def _passing(kind: Any) -> Any:
    if kind in _made:
        return _made[kind]

    @wraps(kind.call)  # Keras reads the signature when a layer is made: clone_model(model)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        y, training = kind.call(self, *args, **kwargs), getattr(self._get_call_context(), "training", None)
        return bias.pass_over(y) if keras.ops.is_tensor(training) or training else y

    def reduce(self: Any) -> Any:
        rebuild, state = kind.__reduce__(self)
        return rebuild.__func__.__get__(kind), state  # pickle finds Keras's class under its name, and not this one

    members = {"call": call, "__reduce__": reduce}
    made = type(kind.__name__, (kind,), {**members, "__module__": kind.__module__, "__doc__": kind.__doc__})
    api_export.REGISTERED_OBJS_TO_NAMES[made] = api_export.REGISTERED_OBJS_TO_NAMES[kind]
    _made[kind] = made
    return made
