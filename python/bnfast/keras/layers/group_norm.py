"""`bnfast.keras.GroupNormalization`: keras.layers.GroupNormalization, trained by bnfast's kernels.

`InstanceNormalization` has one group per channel, as in TensorFlow Addons. Integer inputs are left to Keras's own code.
"""

from __future__ import annotations

from typing import Any

import keras

from . import norms, reader
from .framework import group_norm


@keras.saving.register_keras_serializable(package="bnfast")
class GroupNormalization(keras.layers.GroupNormalization):  # type: ignore[misc]
    """Group normalization with the arguments, weights and results of `keras.layers.GroupNormalization`.

    The channels along `axis` are divided into `groups` consecutive slices. With mean and variance over each sample's
    slice, all other axes included, and gamma and beta of shape (C,):

        y = gamma*(x - mean)/sqrt(variance + epsilon) + beta

    The same formula holds in inference, so `training` doesn't affect the result, only how it is computed: with
    training=True, as in fit, inputs of at least 256 KiB run on the kernels, through a Python callback each way; all
    else runs on TensorFlow's own ops. (A batch of unknown size counts as 32 samples.) Second-order gradients are exact;
    Keras's are not, because tf.nn.moments leaves out a term.
    Integer inputs are left to Keras's code. XLA can't run the callbacks, so supports_jit is False. Where TensorFlow
    sees a GPU, all runs on TensorFlow's own ops and supports_jit is True, unless BNFAST_BRIDGE says otherwise.

    Args:
        groups: how many; they must divide the channels. -1: as many as channels.
        axis: the channel axis.
        epsilon: a finite number >= 0.
        center, scale: whether to have beta, gamma.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as
            in any layer of Keras.
        kwargs: those of keras.layers.Layer: name, dtype, trainable ...

    Call arguments:
        inputs: a tensor of rank 2 or more; axis 0 is the axis of the samples.
        training: None, True, False or a boolean tensor.

    Raises:
        ValueError, TypeError: epsilon is negative or not finite. And everything that Keras's layer raises.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import GroupNormalization
        >>> x = np.array([[1.0, 3.0, 10.0, 30.0]], "float32")
        >>> GroupNormalization(groups=2, epsilon=0.0)(x).numpy()
        array([[-1.,  1., -1.,  1.]], dtype=float32)

    Source: Wu and He 2018, arXiv:1803.08494.
    """

    def __init__(
        self,
        groups: int = 32,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            groups=groups,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )
        norms.check(self)

    save_assets = reader.save_assets

    def call(self, inputs: Any, training: Any = None) -> Any:
        axis = self.axis % len(inputs.shape)
        if axis == 0 or not group_norm.accepts(inputs):  # axis=0 is left to Keras, too
            return super().call(inputs)
        norm = group_norm.Norm((axis,), self.groups, self.epsilon)
        return group_norm.normalize(inputs, self.gamma, self.beta, norm, training, self.compute_dtype)


@keras.saving.register_keras_serializable(package="bnfast")
class InstanceNormalization(GroupNormalization):
    """Instance normalization: mean and variance of each channel of each sample separately, over all other axes.

        y = gamma*(x - mean)/sqrt(variance + epsilon) + beta

    This is `bnfast.keras.GroupNormalization` with groups = C; its remarks hold here, too.

    The arguments are those of TensorFlow Addons' layer of this name. A `groups` in a config of it is ignored.

    Args:
        axis: the channel axis.
        epsilon: a finite number >= 0.
        center, scale: whether to have beta, gamma.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as
            in any layer of Keras.
        kwargs: those of keras.layers.Layer: name, dtype, trainable ...

    Call arguments and errors are those of GroupNormalization.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import InstanceNormalization
        >>> x = np.array([[[1.0, 10.0], [3.0, 30.0]]], "float32")  # one sample, two positions, two channels
        >>> InstanceNormalization(epsilon=0.0)(x).numpy()
        array([[[-1., -1.],
                [ 1.,  1.]]], dtype=float32)

    Source: Ulyanov, Vedaldi and Lempitsky 2016, arXiv:1607.08022.
    """

    def __init__(
        self,
        axis: int = -1,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        if "groups" in kwargs:
            raise TypeError(f"InstanceNormalization accepts no groups: it always has C. Received: {kwargs['groups']!r}")
        super().__init__(
            groups=-1,
            axis=axis,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        return {name: value for name, value in super().get_config().items() if name != "groups"}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> InstanceNormalization:
        kept = {name: value for name, value in config.items() if name != "groups"}
        return super().from_config(kept)  # type: ignore[no-any-return]
