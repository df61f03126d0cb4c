"""Batch norm in a built model exchanged for TensorFlow's fused op, or for nothing. Imports Keras and TensorFlow.

exchange() never changes the model it is given: it returns a clone with the same layer names and weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf


class FusedBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """Keras's layer on FusedBatchNormV3, which computes the new moving statistics too, as tf.keras 2 had it.

    Channels-last inputs of rank 4 without a mask; any other takes Keras's own ops. The moving variance is that of the
    sample, M/(M - 1) times the batch's, as it was there.
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


class LeftOut(keras.layers.Layer):  # type: ignore[misc]
    """The identity, called as a batch norm is (keras.layers.Identity takes no mask)."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return inputs


def fused(layer: Any) -> Any:
    """The layer's counterpart on the fused op."""
    return FusedBatchNormalization.from_config(layer.get_config())


def identity(layer: Any) -> Any:
    """What stands where batch norm is left out."""
    return LeftOut(name=layer.name)


def is_batch_norm(layer: Any) -> bool:
    """Keras's layer and all that inherit from it: ours and the one above."""
    return isinstance(layer, keras.layers.BatchNormalization)


def exchange(model: Any, make: Callable[[Any], Any]) -> Any:
    """A clone of `model` with make(layer) for each of Keras's batch norms; weights are copied by the layers' names."""

    def clone(layer: Any) -> Any:
        return make(layer) if is_batch_norm(layer) else layer.__class__.from_config(layer.get_config())

    result = keras.models.clone_model(model, clone_function=clone)
    for new in result.layers:
        if new.weights:
            new.set_weights(model.get_layer(new.name).get_weights())
    return result
