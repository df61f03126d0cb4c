"""Replaces the batch norms of a built model by TensorFlow's fused op, or by nothing. Imports Keras and TensorFlow.

replace_batch_norms() returns a clone with the same layer names and weights; it never changes the model it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's layer on FusedBatchNormV3, which also computes the new moving statistics, as in tf.keras 2.

    This holds for channels_last inputs of rank 4 without a mask; other inputs use Keras's own ops. As in tf.keras 2,
    the moving variance follows the sample variance, M/(M - 1) times the batch's.
    """

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if len(inputs.shape) != 4 or self.axis not in (-1, 3) or mask is not None:
            return super().call(inputs, training=training, mask=mask)
        training = bool(training) and self.trainable
        channels = tf.shape(self.moving_mean)
        result = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.convert_to_tensor(self.gamma) if self.scale else tf.ones(channels),
            offset=tf.convert_to_tensor(self.beta) if self.center else tf.zeros(channels),
            mean=tf.convert_to_tensor(self.moving_mean),
            variance=tf.convert_to_tensor(self.moving_variance),
            epsilon=self.epsilon,
            exponential_avg_factor=1 - self.momentum,
            is_training=training,
        )
        if training:
            self.moving_mean.assign(result.batch_mean)
            self.moving_variance.assign(result.batch_variance)
        return result.y


class NoBatchNormalization(keras.layers.Layer):  # type: ignore[misc]
    """The identity, with the call arguments of a batch norm (keras.layers.Identity accepts no mask)."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return inputs


def make_fused(layer: Any) -> Any:
    """A layer on the fused op with the configuration of `layer`."""
    return FusedBatchNormalization.from_config(layer.get_config())


def make_identity(layer: Any) -> Any:
    """An identity layer with the name of `layer`."""
    return NoBatchNormalization(name=layer.name)


def is_batch_norm(layer: Any) -> bool:
    """Whether the layer is Keras's batch norm or inherits from it, as bnfast's and the one above do."""
    return isinstance(layer, keras.layers.BatchNormalization)


def replace_batch_norms(model: Any, make: Callable[[Any], Any]) -> Any:
    """A clone of `model` with make(layer) in place of each batch norm. Weights are copied by layer name."""

    def clone(layer: Any) -> Any:
        return make(layer) if is_batch_norm(layer) else layer.__class__.from_config(layer.get_config())

    result = keras.models.clone_model(model, clone_function=clone)
    for new in result.layers:
        if new.weights:
            new.set_weights(model.get_layer(new.name).get_weights())
    return result
