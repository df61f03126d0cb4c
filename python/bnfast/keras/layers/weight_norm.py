"""`WeightNormalization(layer)`: a layer whose kernel is length times direction, w = g * v/|v|.

v is the wrapped layer's own kernel variable: names, initializers, regularizers, constraints and files stay what they
are; the wrapper adds g and a flag. The layer itself does the computing, with w in v's place for the time of a call
(keras.StatelessScope), so that gradients reach v and g by TensorFlow's own rules, and XLA, export and every dtype
policy work. |v| goes over all axes but the output channels. Lengths and w are computed in float32 or wider.
Source: Salimans and Kingma 2016, arXiv:1602.07868.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend import AutocastScope  # no public way leads to a variable's whole value under a mixed policy

from ...tensorflow.training import mode as freezing

_OUTPUT_AXES = {  # of the kernel
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D"), (-1,)),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), (-2,)),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), (-2, -1)),
}


@keras.saving.register_keras_serializable(package="bnfast")
class WeightNormalization(keras.layers.Wrapper):  # type: ignore[misc]
    """Weight normalization of a layer's kernel: the layer computes with w = g * v/|v|, where v is its kernel.

    At first g = |v|, so that the layer computes what it would without the wrapper. With `data_init`, the first training
    batch sets g and the layer's bias so that the layer's outputs, before its activation, have mean 0 and variance 1 in
    every channel; without a bias, variance 1 alone. Channels that don't vary in that batch, or aren't finite, keep
    their g and bias; where that is all of them (an empty batch, one value), the next training batch is the first.

    Args:
        layer: a Dense, Conv1D/2D/3D, Conv1D/2D/3DTranspose or DepthwiseConv1D/2D layer, or one of a derived class.
        data_init: whether the first training batch initializes g and the bias.
        **kwargs: of keras.layers.Layer (name, trainable, ...); dtype is the layer's own policy unless given.

    Call arguments:
        inputs: what the layer takes.
        training: None, True, False or a boolean tensor; matters for `data_init` alone. Where this wrapper or the layer
            has trainable = False, nothing is initialized.

    Weights: those of the layer; `g`, shape (channels,), for depthwise layers (inputs, multiplier); and `initialized`,
    a bool, saved like the others.

    Raises:
        TypeError: layer is none of those.
        ValueError: the layer is quantized or has LoRA enabled.
        NotImplementedError: the first training call with data_init on several replicas of a tf.distribute strategy.
        RuntimeError: Keras runs on a backend other than TensorFlow.
    """

    def __init__(self, layer: Any, data_init: bool = True, **kwargs: Any) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                "bnfast.keras.WeightNormalization needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). "
                f"Received: {keras.backend.backend()}"
            )
        if not _output_axes(layer):
            raise TypeError(f"layer must be one of {list(_OUTPUT_AXES)}. Received: {type(layer).__name__}")
        if not isinstance(data_init, bool):
            raise TypeError(f"data_init must be True or False. Received: {data_init!r}")
        _check_plain(layer)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.data_init = data_init
        self.supports_masking = layer.supports_masking
        self.supports_jit = layer.supports_jit

    def build(self, input_shape: Any = None) -> None:
        super().build(input_shape)
        rank = len(self.v.shape)
        kept = [axis + rank for axis in _output_axes(self.layer)]
        self._over = tuple(axis for axis in range(rank) if axis not in kept)  # what |v| goes over
        shape = tuple(self.v.shape[axis] for axis in kept)
        self.g = self.add_weight(name="g", shape=shape, initializer=self._length, dtype=self.v.dtype)
        self.initialized = self.add_weight(
            name="initialized", shape=(), initializer="zeros", dtype="bool", trainable=False
        )

    @property
    def v(self) -> Any:
        """The direction: the variable that is the layer's kernel."""
        return self.layer.kernel

    def call(self, inputs: Any, training: Any = None) -> Any:
        _check_plain(self.layer)
        if self.data_init and self.trainable and self.layer.trainable and freezing.possible(training):
            self._initialize(inputs, training)
        return _compute(self, self.layer, inputs, [(self.v, self._kernel(self.g))])

    def remove(self) -> Any:
        """The plain layer, its kernel now w, so that it computes what this one did. It is the layer that was wrapped:
        this wrapper goes on sharing it, with g = |w|.

        Raises:
            ValueError: the wrapper isn't built.
        """
        if not self.built:
            raise ValueError(f"layer {self.name} must be built before remove(): call it once, or build(input_shape)")
        _check_plain(self.layer)
        self.v.assign(self._kernel(self.g))
        self.g.assign(self._length(self.g.shape))
        self.initialized.assign(True)
        return self.layer

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_init": self.data_init}

    def _kernel(self, g: Any) -> tf.Tensor:
        """g * v/|v| in v's dtype, and 0 where |v| is 0."""
        v, squares = self._squares()
        some = squares > 0
        inverse = tf.where(some, 1 / tf.sqrt(tf.where(some, squares, 1)), 0)  # the inner one for the gradient: no 0/0
        return tf.cast(v * (tf.reshape(_wide(_whole(g)), squares.shape) * inverse), self.v.dtype)

    def _length(self, shape: Any, dtype: Any = None) -> tf.Tensor:
        """|v|, as an initializer of g."""
        return tf.cast(tf.reshape(tf.sqrt(self._squares()[1]), shape), dtype or self.v.dtype)

    def _squares(self) -> tuple[tf.Tensor, tf.Tensor]:
        """v as it is computed with, and the sum of its squares, which broadcasts against it."""
        v = _wide(_whole(self.v))
        return v, tf.reduce_sum(tf.square(v), self._over, keepdims=True)

    def _initialize(self, inputs: Any, training: Any) -> None:
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        if replicas > 1 and not tf.distribute.in_cross_replica_context():  # each has a batch of its own
            with tf.init_scope():
                initialized = bool(_whole(self.initialized))
            if not initialized:
                raise NotImplementedError(
                    "data_init=True initializes from one batch: pass data_init=False, or call the layer (the model) "
                    f"once with training=True under strategy.scope(), before. Received: {replicas} replicas"
                )
            return
        variables = [self.g, *([self.layer.bias] if self.layer.use_bias else []), self.initialized]
        now = [_whole(variable) for variable in variables]
        wanted = tf.logical_and(tf.cast(training, tf.bool), tf.logical_not(now[-1]))
        new = tf.cond(wanted, lambda: self._from_batch(inputs, *now[:-1]), lambda: now)
        for variable, value in zip(variables, new, strict=True):
            variable.assign(value)

    def _from_batch(self, inputs: Any, g: tf.Tensor, bias: tf.Tensor | None = None) -> list[tf.Tensor]:
        """g and, if there is one, the bias for this batch; and whether any channel of it varies."""
        linear = object.__new__(type(self.layer))  # the same layer, variables and all, without its activation
        vars(linear).update(vars(self.layer), activation=keras.activations.linear)
        values = [(self.v, self._kernel(tf.ones_like(g)))]
        if bias is not None:
            values.append((self.layer.bias, tf.zeros_like(bias)))
        t = _wide(_compute(None, linear, inputs, values))
        channel = 1 if getattr(self.layer, "data_format", None) == "channels_first" else t.shape.rank - 1
        mean, variance = tf.nn.moments(t, [axis for axis in range(t.shape.rank) if axis != channel])
        # t = x.v/|v| of fan_in terms has a rounding error of about eps*|x|, whatever cancels: less than 8 of these is
        # a channel of equal values, whose variance says nothing.
        eps = np.finfo(t.dtype.as_numpy_dtype).eps
        fan_in = math.prod(self.v.shape) // max(math.prod(g.shape), 1)
        varies = variance > (8 * eps) ** 2 * fan_in * tf.reduce_mean(tf.square(_wide(inputs)))
        scale = 1 / tf.sqrt(tf.where(varies, variance, 1))
        new = [_where(varies, scale, g)]
        if bias is not None:
            new.append(_where(varies, -mean * scale, bias))
        return [*new, tf.reduce_any(varies)]


def _output_axes(layer: Any) -> tuple[int, ...]:
    """Of the layer's kernel; none for a layer of another kind."""
    return next((axes for name, axes in _OUTPUT_AXES.items() if isinstance(layer, getattr(keras.layers, name))), ())


def _compute(owner: Any, layer: Any, inputs: Any, values: list[tuple[Any, Any]]) -> Any:
    """What `layer` computes with these values of its variables. Losses that come up become `owner`'s, if there is one;
    other variables that it updates stay updated."""
    state = {id(variable): (variable, _whole(variable)) for variable in layer.variables}
    state |= {id(variable): (variable, value) for variable, value in values}
    with keras.StatelessScope(list(state.values()), collect_losses=owner is not None) as scope:
        before = [scope.get_current_value(variable) for variable, _ in state.values()]
        outputs = layer(inputs)
    for (variable, _), value in zip(state.values(), before, strict=True):
        if scope.get_current_value(variable) is not value:
            variable.assign(scope.get_current_value(variable))
    for loss in scope.losses:
        owner.add_loss(tf.identity(loss))  # a tensor of its own: Keras counts a loss by whose it is
    return outputs


def _whole(variable: Any) -> tf.Tensor:
    """A variable's value in its own dtype, which a mixed policy would make a half type."""
    with AutocastScope(None):
        return tf.convert_to_tensor(variable)


def _wide(value: Any) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def _where(condition: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """new where the condition holds, else old: in old's shape and dtype."""
    return tf.where(tf.reshape(condition, old.shape), tf.cast(tf.reshape(new, old.shape), old.dtype), old)


def _check_plain(layer: Any) -> None:
    """Only a layer that computes with its kernel variable itself can be given another value for it."""
    mode = layer.dtype_policy.quantization_mode
    if mode is not None:
        raise ValueError(f"layer {layer.name} must not be quantized under weight normalization. Received: {mode}")
    if getattr(layer, "lora_rank", None) or getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"layer {layer.name} must not have LoRA under weight normalization. Received: lora_rank={layer.lora_rank}"
        )
