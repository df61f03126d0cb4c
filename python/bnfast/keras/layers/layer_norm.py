"""`bnfast.keras.LayerNormalization`: keras.layers.LayerNormalization, trained by bnfast's kernels.

`rms_scaling` and integer inputs are left to Keras's own code.
"""

from __future__ import annotations

from typing import Any

import keras

from . import norms
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

    Args: all of Keras's: axis (an int, or several), epsilon, center, scale, initializers, regularizers, constraints,
        dtype, name ...

    Call arguments:
        inputs: a tensor of any rank.
        training: None, True, False or a boolean tensor.

    Raises:
        ValueError, TypeError: epsilon is negative or not finite. And everything that Keras's layer raises.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norms.check(self)

    def call(self, inputs: Any, training: Any = None) -> Any:
        if getattr(self, "rms_scaling", False) or not group_norm.accepts(inputs):
            return super().call(inputs)
        # The weights have the extents of the axes in the order of `axis`; Keras reads them as if `axis` were ascending.
        axes = tuple(sorted(axis % len(inputs.shape) for axis in self.axis))
        norm = group_norm.Norm(axes, None, self.epsilon)
        return group_norm.normalize(inputs, self.gamma, self.beta, norm, training, self.compute_dtype)
