"""A conditional GAN: the generator draws the digit of a given label.

Only its conditional batch norms, with one gamma and beta per label, know the label; the Dense and convolution layers do
not. The discriminator gets images and labels, and adds the inner product of its features and an embedding of the label
to its output (Miyato and Koyama 2018).
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
    """Batch norm with the gamma and beta of each sample's label, and ReLU."""
    return ConditionalBatchNormalization(10, momentum=0.9, activation="relu")([x, labels])


def build_model() -> keras.Model:
    """The generator: from noise and labels to images of shape (8, 8, 1)."""
    keras.utils.set_random_seed(0)
    noise, labels = keras.Input((NOISE,)), keras.Input((), dtype="int32")
    x = layers.Reshape((4, 4, 32))(layers.Dense(4 * 4 * 32, use_bias=False)(noise))
    x = layers.UpSampling2D()(conditional_bn(x, labels))
    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)
    x = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(conditional_bn(x, labels))
    return keras.Model([noise, labels], x, name="cgan_digits")


def build_discriminator() -> keras.Model:
    """The discriminator: from images and labels to logits, which are positive for real images."""
    images, labels = keras.Input((8, 8, 1)), keras.Input((), dtype="int32")
    features = layers.Dense(128, activation="leaky_relu")(layers.Flatten()(images))
    features = layers.Dense(64, activation="leaky_relu")(features)
    label_score = layers.Dot(1)([features, layers.Embedding(10, 64)(labels)])
    return keras.Model([images, labels], layers.Add()([layers.Dense(1)(features), label_score]))


def train(generator: Any, discriminator: Any, data: Dataset, steps: int) -> None:
    """Train both networks with hinge losses: per batch, one step of the discriminator and one of the generator."""
    generator_optimizer = keras.optimizers.Adam(5e-3, beta_1=0)
    discriminator_optimizer = keras.optimizers.Adam(5e-3, beta_1=0)

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        noise = tf.random.normal([tf.shape(images)[0], NOISE])
        with tf.GradientTape(persistent=True) as tape:
            drawn = generator([noise, labels], training=True)
            real = discriminator([images, labels], training=True)
            fake = discriminator([drawn, labels], training=True)
            discriminator_loss = tf.reduce_mean(tf.nn.relu(1 - real)) + tf.reduce_mean(tf.nn.relu(1 + fake))
            generator_loss = -tf.reduce_mean(fake)
        weights = discriminator.trainable_variables
        gradients = tape.gradient(discriminator_loss, weights)
        discriminator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        weights = generator.trainable_variables
        gradients = tape.gradient(generator_loss, weights)
        generator_optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return generator_loss, discriminator_loss

    losses = (float("nan"), float("nan"))
    for images, labels in common.batches(data, steps):
        losses = step(tf.constant(images), tf.constant(labels, tf.int32))
    print(f"cgan_digits: last losses, generator {float(losses[0]):.3f}, discriminator {float(losses[1]):.3f}")


def recognized(generator: Any, data: Dataset) -> float:
    """The share of drawn images that are closest to the mean image of their label."""
    means = np.stack([data.x_train[data.y_train == digit].mean(0).ravel() for digit in range(10)])
    labels = np.repeat(np.arange(10, dtype="int32"), 30)
    noise = np.random.default_rng(0).standard_normal((len(labels), NOISE), "float32")
    drawn = generator.predict([noise, labels], batch_size=len(labels), verbose=0).reshape(len(labels), 1, -1)
    distances = ((drawn - means) ** 2).sum(axis=-1)
    return float((distances.argmin(axis=1) == labels).mean())


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the share of drawn digits that are recognized."""
    steps = common.parse_steps(__doc__, argv)
    generator, data = build_model(), common.digits()
    train(generator, build_discriminator(), data, steps)
    share = recognized(generator, data)
    print(f"cgan_digits: {100 * share:.1f} % of the drawn digits are recognized")
    return share


if __name__ == "__main__":
    main()
