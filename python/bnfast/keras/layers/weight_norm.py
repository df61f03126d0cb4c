"""`WeightNormalization(layer)`: a layer whose kernel is length times direction, w = g * v/|v|.

v is the wrapped layer's own kernel variable, so names, initializers, regularizers, constraints and files don't change;
the wrapper adds g and a flag. The layer itself computes its outputs, with w in place of v for the duration of a call
(keras.StatelessScope). So gradients reach v and g by the framework's own rules, and XLA, export and every dtype policy
work. |v| is taken over all axes but the output channels.
Source: Salimans and Kingma 2016, arXiv:1602.07868.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from keras.src.backend import AutocastScope  # Keras has no public way to read a variable uncast under a mixed policy

from . import reader
from .framework import may_train, weight_norm

_OUTPUT_AXES = {  # of the kernel
    **dict.fromkeys(("Dense", "Conv1D", "Conv2D", "Conv3D"), (-1,)),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), (-2,)),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), (-2, -1)),
}


@keras.saving.register_keras_serializable(package="bnfast")
class WeightNormalization(keras.layers.Wrapper):  # type: ignore[misc]
    """Weight normalization of a layer's kernel: the layer computes with w = g * v/|v|, where v is its kernel.

    At first g = |v|, so the layer computes the same as without the wrapper. With `data_init`, the first training batch
    sets g and the layer's bias so that the layer's outputs, before its activation, have mean 0 and variance 1 in every
    channel; without a bias, only variance 1. Channels that don't vary in that batch, or aren't finite, keep their g and
    bias. If no channel varies (an empty batch, a single value), the next training batch initializes.

    Args:
        layer: a Dense, Conv1D/2D/3D, Conv1D/2D/3DTranspose or DepthwiseConv1D/2D layer, or one of a derived class.
        data_init: whether the first training batch initializes g and the bias.
        kwargs: arguments of keras.layers.Layer (name, trainable, ...); dtype defaults to the layer's own policy.

    Call arguments:
        inputs: the inputs of the layer.
        training: None, True, False or a boolean tensor; used only for `data_init`. Nothing is initialized while this
            wrapper or the layer has trainable = False.

    Weights: those of the layer; `g` of shape (channels,), for depthwise layers (inputs, multiplier); and `initialized`,
    a bool that is saved like the others.

    Raises:
        TypeError: layer is of another kind.
        ValueError: the layer is quantized or has LoRA enabled.
        NotImplementedError: the first training call with data_init on several replicas of a tf.distribute strategy.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import WeightNormalization
        >>> dense = keras.layers.Dense(1, kernel_initializer="ones")
        >>> layer = WeightNormalization(dense, data_init=False)
        >>> layer(np.ones((1, 4), "float32")).numpy(), layer.g.numpy()
        (array([[4.]], dtype=float32), array([2.], dtype=float32))
        >>> _ = layer.g.assign([1.0])  # half the length, the same direction
        >>> layer(np.ones((1, 4), "float32")).numpy()
        array([[2.]], dtype=float32)

    Source: Salimans and Kingma 2016, arXiv:1602.07868.
    """

    def __init__(self, layer: Any, data_init: bool = True, **kwargs: Any) -> None:
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
        self._over = tuple(axis for axis in range(rank) if axis not in kept)  # the axes of |v|
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
        if self.data_init and self.trainable and self.layer.trainable and may_train(training):
            self._initialize(inputs, training)
        return _compute(self, self.layer, inputs, [(self.v, self._kernel(self.g))])

    save_assets = reader.save_assets

    def remove(self) -> Any:
        """The wrapped layer, with its kernel set to w, so that it computes the same as this wrapper.

        It is the same object that was wrapped: this wrapper keeps sharing it, with g = |w|.

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

    def _kernel(self, g: Any) -> Any:
        """g * v/|v| in the dtype of v, and 0 where |v| is 0."""
        return weight_norm.kernel(_uncast(self.v), _uncast(g), self._over)

    def _length(self, shape: Any, dtype: Any = None) -> Any:
        """|v|, as an initializer of g."""
        return weight_norm.length(_uncast(self.v), self._over, shape, dtype)

    def _initialize(self, inputs: Any, training: Any) -> None:
        replicas = weight_norm.replicas()
        if replicas > 1:  # each replica has a batch of its own
            if not weight_norm.initialized_already(partial(_uncast, self.initialized)):
                raise NotImplementedError(
                    "data_init=True initializes from one batch: pass data_init=False, or call the layer (the model) "
                    f"once with training=True under strategy.scope(), before. Received: {replicas} replicas"
                )
            return
        variables = [self.g, *([self.layer.bias] if self.layer.use_bias else []), self.initialized]
        now = [_uncast(variable) for variable in variables]
        new = weight_norm.choose(training, now[-1], partial(self._from_batch, inputs, *now[:-1]), now)
        for variable, value in zip(variables, new, strict=True):
            variable.assign(value)

    def _from_batch(self, inputs: Any, g: Any, bias: Any = None) -> list[Any]:
        """g and, if there is one, the bias for this batch; and whether any of its channels varies."""
        linear = object.__new__(type(self.layer))  # the same layer with the same variables, without its activation
        vars(linear).update(vars(self.layer), activation=keras.activations.linear)
        values = [(self.v, self._kernel(keras.ops.ones_like(g)))]
        if bias is not None:
            values.append((self.layer.bias, keras.ops.zeros_like(bias)))
        outputs = _compute(None, linear, inputs, values)
        channels_first = getattr(self.layer, "data_format", None) == "channels_first"
        return weight_norm.from_batch(outputs, inputs, channels_first, self.v.shape, g, bias)


def _output_axes(layer: Any) -> tuple[int, ...]:
    """The output axes of the layer's kernel; () for a layer of another kind."""
    return next((axes for name, axes in _OUTPUT_AXES.items() if isinstance(layer, getattr(keras.layers, name))), ())


def _compute(owner: Any, layer: Any, inputs: Any, values: list[tuple[Any, Any]]) -> Any:
    """The outputs of `layer` with these values of its variables.

    Losses are added to `owner`, if there is one. Other variables that the layer updates stay updated.
    """
    state = {id(variable): (variable, _uncast(variable)) for variable in layer.variables}
    state |= {id(variable): (variable, value) for variable, value in values}
    with keras.StatelessScope(list(state.values()), collect_losses=owner is not None) as scope:
        before = [scope.get_current_value(variable) for variable, _ in state.values()]
        outputs = layer(inputs)
    for (variable, _), value in zip(state.values(), before, strict=True):
        if scope.get_current_value(variable) is not value:
            variable.assign(scope.get_current_value(variable))
    for loss in scope.losses:
        owner.add_loss(weight_norm.copy_of(loss))  # a new tensor: Keras counts each loss tensor once
    return outputs


def _uncast(variable: Any) -> Any:
    """A variable's value in its own dtype, which a mixed policy would cast to a half type."""
    with AutocastScope(None):
        return weight_norm.as_tensor(variable)


def _check_plain(layer: Any) -> None:
    """Raises ValueError unless the layer computes with its kernel variable itself, whose value can then be replaced."""
    mode = layer.dtype_policy.quantization_mode
    if mode is not None:
        raise ValueError(f"layer {layer.name} must not be quantized under weight normalization. Received: {mode}")
    if getattr(layer, "lora_rank", None) or getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"layer {layer.name} must not have LoRA under weight normalization. Received: lora_rank={layer.lora_rank}"
        )
