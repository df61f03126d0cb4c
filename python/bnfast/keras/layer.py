"""`bnfast.keras.BatchNormalization`: keras.layers.BatchNormalization, trained by bnfast's kernels.

Training goes through `bridge` (one callback forward, one backward), inference through `inference` (TensorFlow ops
only, so that an exported model doesn't need bnfast). Weights, their names and order, config, dtype policies and the
meaning of `training` and `trainable` are Keras's own. Two things differ, on purpose: a mask is read along the right
axes for every `axis`, and an empty or fully masked batch leaves the moving statistics as they are.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import keras
import tensorflow as tf

from . import activation as activations
from . import bridge, formula, inference
from .formula import Options


@keras.saving.register_keras_serializable(package="bnfast")
class BatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Batch normalization with the arguments, weights and results of `keras.layers.BatchNormalization`.

    In training mode, over all axes but `axis`, and `moving_mean` and `moving_variance` move towards mean and variance:

        y = activation(gamma*(x - mean)/sqrt(variance + epsilon) + beta)
        moving = moving*momentum + batch*(1 - momentum)

    In inference mode, which includes any call with `trainable = False`, the moving statistics stand for the batch's.

    Args: all of Keras's (axis, momentum, epsilon, center, scale, initializers, regularizers, constraints, dtype, name
    ...), and
        activation: None, a name, a function or a layer instance. relu, relu6 and leaky_relu are fused into the kernels
            (also as keras.activations functions, ReLU, LeakyReLU and Activation layers); any other is applied after.

    Call arguments:
        inputs: float tensor of any rank; integers are computed in float32, as in Keras.
        training: None, True, False or a boolean tensor.
        mask: inputs.shape without the channel axis, or with extents of 1; zero or False leaves an entry out of the
            statistics. The mask that Keras attached to inputs (Masking) lies along inputs.shape[:-1], whatever `axis`
            is, and so does any other that fits nothing else.

    Raises:
        RuntimeError: Keras runs on a backend other than TensorFlow.
        NotImplementedError: synchronized=True, renorm=True, several axes.
        ValueError, TypeError: an argument out of range or of the wrong type; the message says which.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def __init__(self, axis: int = -1, *args: Any, activation: Any = None, **kwargs: Any) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "bnfast.keras.BatchNormalization needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). "
                f"Received: {keras.backend.backend()}"
            )
        super().__init__(_one_axis(axis), *args, **kwargs)
        for word in ("synchronized", "renorm"):
            if getattr(self, word, False):
                raise NotImplementedError(f"{word}=True is not supported yet by bnfast.keras.BatchNormalization")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1]. Received: {self.momentum}")
        if not (self.epsilon >= 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"epsilon must be finite and >= 0. Received: {self.epsilon}")
        self.activation = activations.get(activation)
        self.supports_jit = False  # XLA has no kernel for a callback

    def build(self, input_shape: Any) -> None:
        rank = len(input_shape)
        if not -rank <= self.axis < rank:
            raise ValueError(f"axis must be in [{-rank}, {rank}) for inputs of rank {rank}. Received: {self.axis}")
        if input_shape[self.axis] is None:
            raise ValueError(f"axis {self.axis} of inputs must have a known extent. Received: {tuple(input_shape)}")
        super().build(input_shape)
        if isinstance(self.activation, keras.layers.Layer) and not self.activation.built:
            self.activation.build(input_shape)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        x = tf.convert_to_tensor(inputs)
        if x.dtype not in (tf.float16, tf.bfloat16):
            x = tf.cast(x, keras.backend.result_type(x.dtype.name, "float32"))
        attached = getattr(inputs, "_keras_mask", None)
        if mask is None and tf.is_tensor(training):  # Keras hands masks on to calls with one tensor argument only
            mask = attached
        places = (-1, self.axis) if mask is attached else (self.axis, -1)
        weights = None if mask is None else _weights(mask, x, places)
        y = tf.cast(self._normalize(x, training, weights), self.compute_dtype)
        return y if self._fused else tf.cast(self.activation(y), self.compute_dtype)

    def _normalize(self, x: tf.Tensor, training: Any, weights: tf.Tensor | None) -> tf.Tensor:
        gamma = _parameter(self.gamma) if self.scale else None
        beta = _parameter(self.beta) if self.center else None
        moving = _parameter(self.moving_mean), _parameter(self.moving_variance)
        fused = self._fused or activations.Fused(None)
        options = Options(self.axis, self.epsilon, *fused)

        def infer() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            return inference.infer(x, gamma, beta, *moving, options), *moving

        def train() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            step = bridge.train_step
            if weights is not None and weights.shape[self.axis] != 1:
                step = formula.train_step  # weights of their own for each channel: the kernels don't take these
            return step(x, gamma, beta, *moving, weights, self.momentum, options)

        if not self.trainable or not _possible(training):
            return infer()[0]
        if tf.is_tensor(training) and tf.get_static_value(training) is None:
            y, *moving_new = tf.cond(tf.cast(training, tf.bool), train, infer)
        else:
            y, *moving_new = train()
        self.moving_mean.assign(moving_new[0])
        self.moving_variance.assign(moving_new[1])
        return y

    @property
    def _fused(self) -> activations.Fused | None:
        return activations.fuse(self.activation, self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = super().compute_output_shape(input_shape)
        if isinstance(self.activation, keras.layers.Layer):
            shape = self.activation.compute_output_shape(shape)
        return shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "activation": keras.activations.serialize(self.activation)}


def _one_axis(axis: Any) -> int:
    """The axis as an int; Keras 2 and tf.keras configs hold a list of one."""
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    if len(axes) > 1:
        raise NotImplementedError(f"several axes are not supported yet. Received: axis={axis}")
    try:
        return operator.index(axes[0])
    except (IndexError, TypeError):
        raise TypeError(f"axis must be an integer. Received: {axis!r}") from None


def _possible(training: Any) -> bool:
    """Whether this call trains, or may: a tensor whose value the graph will know may."""
    if tf.is_tensor(training):
        training = tf.get_static_value(training)
        return training is None or bool(training)
    return bool(training)


def _parameter(variable: Any) -> tf.Tensor:
    """A weight as the kernels take it: float32 or float64."""
    value = tf.convert_to_tensor(variable)
    return value if value.dtype in (tf.float32, tf.float64) else tf.cast(value, tf.float32)


def _weights(mask: Any, x: tf.Tensor, places: tuple[int, int]) -> tf.Tensor:
    """The mask as booleans of x's rank, its missing axis at the first of `places` where its extents fit."""
    mask = tf.cast(mask, tf.bool)
    if mask.shape.rank != x.shape.rank - 1:
        raise ValueError(
            f"mask must have one dimension less than inputs. Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
        )
    for place in places:
        weights = tf.expand_dims(mask, place)
        if all(m in (1, None) or n in (m, None) for m, n in zip(weights.shape, x.shape, strict=True)):
            return weights
    raise ValueError(
        f"mask must have the shape of inputs without axis {places[0]}, or extents of 1 in it. "
        f"Received: mask.shape={mask.shape}, inputs.shape={x.shape}"
    )
