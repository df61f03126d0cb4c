"""`bnfast.keras.LayerNormalization`: keras.layers.LayerNormalization, trained by bnfast's kernels.

`rms_scaling` and integer inputs are left to Keras's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from . import norms, reader
from .framework import group_norm


@keras.saving.register_keras_serializable(package="bnfast")
class LayerNormalization(keras.layers.LayerNormalization):  # type: ignore[misc]
    """Layer normalization with the arguments, weights and results of `keras.layers.LayerNormalization`.

    With mean and variance over `axis`, separately for each index of the other axes:

        y = gamma*(x - mean)/sqrt(variance + epsilon) + beta

    The same formula holds in inference, so `training` doesn't affect the result, only how it is computed: with
    training=True, as in fit, inputs of at least 1 MiB run on the kernels, through a Python callback each way; all else
    runs on TensorFlow's own ops. (A batch of unknown size counts as 32 samples.) Second-order gradients are exact;
    Keras's are not, because tf.nn.moments leaves out a term.
    Integer inputs and rms_scaling=True are left to Keras's code. XLA can't run the callbacks, so supports_jit is
    False. Where TensorFlow sees a GPU, all runs on TensorFlow's own ops and supports_jit is True, unless BNFAST_BRIDGE
    says otherwise.

    Args:
        axis: an axis, or several; gamma and beta have their extents.
        epsilon: a finite number >= 0.
        center, scale: whether to have beta, gamma.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: as
            in any layer of Keras.
        kwargs: those of keras.layers.Layer: name, dtype, trainable ...

    Call arguments:
        inputs: a tensor of any rank.
        training: None, True, False or a boolean tensor.

    Raises:
        ValueError, TypeError: epsilon is negative or not finite. And everything that Keras's layer raises.

    Example:
        >>> import numpy as np
        >>> from bnfast.keras import LayerNormalization
        >>> LayerNormalization(epsilon=0.0)(np.array([[1.0, 3.0], [10.0, 30.0]], "float32")).numpy()
        array([[-1.,  1.],
               [-1.,  1.]], dtype=float32)

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
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
        if getattr(self, "rms_scaling", False) or not group_norm.accepts(inputs):
            return super().call(inputs)
        # The weights have the extents of the axes in the order of `axis`; Keras reads them as if `axis` were ascending.
        axes = tuple(sorted(axis % len(inputs.shape) for axis in self.axis))
        norm = group_norm.Norm(axes, None, self.epsilon)
        return group_norm.normalize(inputs, self.gamma, self.beta, norm, training, self.compute_dtype)
