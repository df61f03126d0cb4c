"""The weights of Dense and convolution layers in float64, and their change by y -> a*y + b before or after the layer.

    after    a, b per output channel:  kernel*a, bias*a + b
    before   a, b per input channel:   kernel*a over the inputs, bias + what the kernel makes of the constant b

`before` is exact where every output sees the whole kernel: Dense, and convolutions without padding. Kernel shapes, with
spatial extents k: Dense (in, out); Conv (*k, in/groups, out); Conv transpose (*k, out, in); DepthwiseConv (*k, in,
multiplier), output channel in*multiplier + m; SeparableConv that depthwise one, then (*1, in*multiplier, out).
"""

from __future__ import annotations

from copy import copy
from typing import Any, NamedTuple

import keras
import numpy as np

from ..layers.bias import keras_class

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
TRANSPOSES = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
DEPTHWISE = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)
SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)
KINDS = (keras.layers.Dense, *CONVOLUTIONS, *TRANSPOSES, *DEPTHWISE, *SEPARABLE)


class Affine(NamedTuple):
    """y = a*x + b, with one a and b per channel."""

    a: np.ndarray
    b: np.ndarray


def values(variable: Any) -> np.ndarray:
    """A variable in float64."""
    return np.asarray(keras.ops.convert_to_numpy(variable)).astype(np.float64)


class FoldableLayer:
    """A built layer of KINDS and weights for it, initially its own. The layer itself is never changed."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        separable = isinstance(layer, SEPARABLE)
        names = ("depthwise_kernel", "pointwise_kernel") if separable else ("kernel",)
        self.kernels = [values(getattr(layer, name)) for name in names]
        self.bias = values(layer.bias) if layer.use_bias else np.zeros(self._outputs)

    @staticmethod
    def accepts(layer: Any) -> bool:
        """Whether the layer computes with exactly these weights: no subclass, quantization or LoRA."""
        return (
            keras_class(layer) in KINDS
            and layer.built
            and layer.dtype_policy.quantization_mode is None
            and not getattr(layer, "lora_enabled", False)
        )

    @property
    def _outputs(self) -> int:
        shape = self.kernels[-1].shape
        if isinstance(self.layer, DEPTHWISE):
            return int(shape[-2] * shape[-1])
        return int(shape[-2 if isinstance(self.layer, TRANSPOSES) else -1])

    @property
    def pads(self) -> bool:
        """Whether some output sees only a part of the kernel, so that a constant input gives an output that varies."""
        layer = self.layer
        if isinstance(layer, keras.layers.Dense):
            return False
        return isinstance(layer, TRANSPOSES) or (layer.padding != "valid" and any(k != 1 for k in layer.kernel_size))

    def after(self, affine: Affine) -> FoldableLayer:
        """The weights with y -> a*y + b applied to the outputs."""
        a = affine.a
        if isinstance(self.layer, DEPTHWISE):
            a = a.reshape(self.kernels[-1].shape[-2:])
        kernel = self.kernels[-1] * (a[:, None] if isinstance(self.layer, TRANSPOSES) else a)
        return self._with([*self.kernels[:-1], kernel], self.bias * affine.a + affine.b)

    def before(self, affine: Affine) -> FoldableLayer:
        """The weights with x -> a*x + b applied to the inputs; not for a layer that pads."""
        first, rest = self.kernels[0], self.kernels[1:]
        a, b = (self._over_inputs(channels) for channels in affine)
        shift = (first * b).sum(tuple(range(first.ndim - 2)))  # without spatial extents: (in, out) or (in, multiplier)
        if rest:
            shift = shift.reshape(-1) @ rest[0].reshape(-1, rest[0].shape[-1])
        elif isinstance(self.layer, DEPTHWISE):
            shift = shift.reshape(-1)
        else:
            shift = shift.sum(0)
        return self._with([first * a, *rest], self.bias + shift)

    def _with(self, kernels: list[np.ndarray], bias: np.ndarray) -> FoldableLayer:
        other = copy(self)
        other.kernels, other.bias = kernels, bias
        return other

    def _over_inputs(self, channels: np.ndarray) -> np.ndarray:
        """Values per input channel, in a shape that broadcasts to the last two axes of the first kernel."""
        if isinstance(self.layer, CONVOLUTIONS) and self.layer.groups > 1:
            groups = self.layer.groups  # output channel o sees the inputs of group o // (out/groups)
            return np.repeat(channels.reshape(groups, -1).T, self.kernels[0].shape[-1] // groups, axis=1)
        return channels[:, None]

    def assign_to(self, layer: Any) -> None:
        """Give a copy of the layer these weights, without regularizers and constraints."""
        if not layer.use_bias:
            layer._tracker.unlock()
            layer.bias = layer.add_weight(name="bias", shape=(self._outputs,))
            layer._tracker.lock()
            layer.bias._path = f"{layer.path}/bias"  # whatever name scope is open here
            layer.bias.trainable = layer.variables[0].trainable
            layer.use_bias = True
        for name in vars(layer).keys() - {"activity_regularizer"}:
            if name.endswith(("_regularizer", "_constraint")):
                setattr(layer, name, None)
        for variable in layer.variables:
            variable.regularizer = variable.constraint = None
        layer.set_weights(self.weights())

    def weights(self) -> list[np.ndarray]:
        """Kernels and bias in the dtype and the order of the layer's variables."""
        dtype = keras.ops.convert_to_numpy(self.layer.variables[0]).dtype
        with np.errstate(over="ignore"):  # the caller checks for infinities
            return [array.astype(dtype) for array in (*self.kernels, self.bias)]


def channel_axis(layer: Any, rank: int) -> int:
    """The channel axis of the layer's inputs and outputs."""
    return 1 if getattr(layer, "data_format", "channels_last") == "channels_first" else rank - 1
