"""A generator and a discriminator in the functional style, with a custom training step."""

import tensorflow as tf
from tensorflow import keras
from tensorflow.keras.layers import BatchNormalization, Conv2D, Conv2DTranspose, Dense, Flatten, LeakyReLU, Reshape

LATENT = 16
tf.random.set_seed(3)


def make_generator():
    noise = keras.Input(shape=(LATENT,))
    x = Dense(4 * 4 * 32, use_bias=False)(noise)
    x = BatchNormalization()(x)
    x = LeakyReLU()(x)
    x = Reshape((4, 4, 32))(x)
    x = Conv2DTranspose(16, 5, strides=2, padding="same", use_bias=False)(x)
    x = BatchNormalization(momentum=0.8)(x)
    x = LeakyReLU(negative_slope=0.3)(x)
    return keras.Model(noise, Conv2DTranspose(1, 5, padding="same", activation="tanh")(x), name="generator")


generator = make_generator()
discriminator = keras.Sequential([keras.Input((8, 8, 1)), Conv2D(16, 5, strides=2), LeakyReLU(), Flatten(), Dense(1)])
cross_entropy = keras.losses.BinaryCrossentropy(from_logits=True)
generator_optimizer, discriminator_optimizer = keras.optimizers.Adam(1e-3), keras.optimizers.Adam(1e-3)


@tf.function
def train_step(images):
    noise = tf.random.normal([32, LATENT])
    with tf.GradientTape() as gen_tape, tf.GradientTape() as disc_tape:
        generated = generator(noise, training=True)
        real, fake = discriminator(images, training=True), discriminator(generated, training=True)
        gen_loss = cross_entropy(tf.ones_like(fake), fake)
        disc_loss = cross_entropy(tf.ones_like(real), real) + cross_entropy(tf.zeros_like(fake), fake)
    generator_optimizer.apply_gradients(
        zip(gen_tape.gradient(gen_loss, generator.trainable_variables), generator.trainable_variables)
    )
    discriminator_optimizer.apply_gradients(
        zip(disc_tape.gradient(disc_loss, discriminator.trainable_variables), discriminator.trainable_variables)
    )
    return gen_loss, disc_loss


before = [variable.numpy() for variable in generator.layers[2].weights]
for _ in range(5):
    gen_loss, disc_loss = train_step(tf.random.uniform([32, 8, 8, 1], -1, 1))
assert all(tf.reduce_any(old != new) for old, new in zip(before, generator.layers[2].weights))
assert generator(tf.random.normal([2, LATENT])).shape == (2, 8, 8, 1)
print("losses", float(gen_loss), float(disc_loss))
