"""`bnfast.keras.LayerNormalization`: keras.layers.LayerNormalization, trained by bnfast's kernels.

Everything goes through `norms`, but for `rms_scaling` and integers, which are left to Keras's own code.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from . import norms


@keras.saving.register_keras_serializable(package="bnfast")
class LayerNormalization(keras.layers.LayerNormalization):  # type: ignore[misc]
    """Layer normalization with the arguments, weights and results of `keras.layers.LayerNormalization`.

    With mean and variance over `axis`, of each index of the other axes on its own:

        y = gamma*(x - mean)/sqrt(variance + epsilon) + beta

    The same formula holds in inference, so `training` chooses no result, only the way: with training=True, as in fit,
    from 1 MiB of x on the kernels, a Python callback each way; else TensorFlow's own ops. (A batch of unknown size
    counts as 32.) Second-order gradients are exact, which Keras's aren't: tf.nn.moments leaves out a term.
    Integers, computed as Keras does, and rms_scaling=True are left to Keras's code. XLA can't run the callbacks:
    supports_jit is False.

    Args: all of Keras's: axis (an int, or several), epsilon, center, scale, initializers, regularizers, constraints,
        dtype, name ...

    Call arguments:
        inputs: a tensor of any rank.
        training: None, True, False or a boolean tensor.

    Raises:
        RuntimeError: Keras runs on a backend other than TensorFlow.
        ValueError, TypeError: epsilon is negative or not finite; and all that Keras's layer raises.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        norms.check(self)

    def call(self, inputs: Any, training: Any = None) -> Any:
        if getattr(self, "rms_scaling", False) or not norms.takes(inputs):
            return super().call(inputs)
        # Weights have the axes' extents in the order of `axis`, and Keras reads them as if it were ascending.
        axes = tuple(sorted(axis % len(inputs.shape) for axis in self.axis))
        y = norms.normalize(inputs, self.gamma, self.beta, norms.Norm(axes, None, self.epsilon), training)
        return tf.cast(y, self.compute_dtype)
