"""A conditional GAN: the generator draws the digit it is told to, by a gamma and a beta for each of the ten labels.

Its Dense and convolution layers know nothing of the label: conditional batch norm alone brings it in. The discriminator
sees images with their labels (the inner product of its features and the label's embedding, Miyato and Koyama 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import keras
import numpy as np
import tensorflow as tf
from bnfast.cli.datasets import Dataset
from bnfast.keras import ConditionalBatchNormalization
from keras import layers

NOISE = 16


def conditional_bn(x: Any, labels: Any) -> Any:
    return ConditionalBatchNormalization(10, momentum=0.9, activation="relu")([x, labels])


def build_model() -> keras.Model:
    """The generator: noise and labels to images of (8, 8, 1)."""
    keras.utils.set_random_seed(0)
    noise, labels = keras.Input((NOISE,)), keras.Input((), dtype="int32")
    x = layers.Reshape((4, 4, 32))(layers.Dense(4 * 4 * 32, use_bias=False)(noise))
    x = layers.UpSampling2D()(conditional_bn(x, labels))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
    x = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(conditional_bn(x, labels))
    return keras.Model([noise, labels], x, name="cgan_digits")


def build_discriminator() -> keras.Model:
    """Images and labels to logits: positive for images of the data."""
    images, labels = keras.Input((8, 8, 1)), keras.Input((), dtype="int32")
    features = layers.Dense(128, activation="leaky_relu")(layers.Flatten()(images))
    features = layers.Dense(64, activation="leaky_relu")(features)
    of_label = layers.Dot(1)([features, layers.Embedding(10, 64)(labels)])
    return keras.Model([images, labels], layers.Add()([layers.Dense(1)(features), of_label]))


def train(generator: Any, discriminator: Any, data: Dataset, steps: int) -> None:
    """Hinge losses, one step of each network in turn."""
    ours, theirs = (keras.optimizers.Adam(5e-3, beta_1=0) for _ in range(2))

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        noise = tf.random.normal([tf.shape(images)[0], NOISE])
        with tf.GradientTape(persistent=True) as tape:
            drawn = generator([noise, labels], training=True)
            real, fake = (discriminator([each, labels], training=True) for each in (images, drawn))
            judged = tf.reduce_mean(tf.nn.relu(1 - real)) + tf.reduce_mean(tf.nn.relu(1 + fake))
            deceived = -tf.reduce_mean(fake)
        for optimizer, loss, network in ((theirs, judged, discriminator), (ours, deceived, generator)):
            weights = network.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return deceived, judged

    for images, labels in common.batches(data, steps):
        losses = step(tf.constant(images), tf.constant(labels, tf.int32))
    print("cgan_digits: last losses, generator {:.3f}, discriminator {:.3f}".format(*(float(x) for x in losses)))


def recognized(generator: Any, data: Dataset) -> float:
    """The share of drawn images that lie nearest to the mean image of the digit they were to be."""
    means = np.stack([data.x_train[data.y_train == digit].mean(0).ravel() for digit in range(10)])
    labels = np.repeat(np.arange(10, dtype="int32"), 30)
    noise = np.random.default_rng(0).standard_normal((len(labels), NOISE), "float32")
    drawn = generator.predict([noise, labels], batch_size=len(labels), verbose=0).reshape(len(labels), 1, -1)
    return float((((drawn - means) ** 2).sum(-1).argmin(1) == labels).mean())


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the share of drawn digits that can be recognized."""
    steps = common.parse_steps(__doc__, argv)
    generator, data = build_model(), common.digits()
    train(generator, build_discriminator(), data, steps)
    share = recognized(generator, data)
    print(f"cgan_digits: {100 * share:.1f} % of the drawn digits can be recognized")
    return share


if __name__ == "__main__":
    main()
