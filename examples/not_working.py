"""Batch norm isn't working: one small script per cause, what `bnfast.keras.diagnose` says, and the cure.

    python not_working.py                      all of them
    python not_working.py outlier drift        some

Each function below makes one mistake that people make, on scikit-learn's digits, and returns the diagnosis.
docs/not-working.md shows them with what they print.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import common
import keras
import numpy as np
import tensorflow as tf
from bnfast.keras import BatchNormalization, Diagnosis, diagnose
from keras import layers

DATA = common.digits(flat=True)
X, Y = DATA.x_train, DATA.y_train
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(**norm: Any) -> Any:
    """Two hidden layers with batch norm, by default Keras's momentum of 0.99."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((64,))
    for i in (1, 2):
        x = layers.Dense(64)(x)
        x = layers.ReLU()(BatchNormalization(name=f"bn{i}", **norm)(x))
    return keras.Model(inputs, layers.Dense(10)(x), name="mlp")


def fit(model: Any, x: Any, y: Any, steps: int = 150, batch: int = 64, rate: float = 2e-3) -> Any:
    """`steps` random batches."""
    if not model.compiled or model.optimizer.learning_rate != rate:
        model.compile(keras.optimizers.Adam(rate), LOSS, metrics=["accuracy"])
    rows = np.random.default_rng(0).integers(0, len(y), steps * batch)
    model.fit(keras.tree.map_structure(lambda a: a[rows], x), y[rows], batch_size=batch, shuffle=False, verbose=0)
    return model


def too_few_updates() -> Diagnosis:
    """Two epochs, and validation accuracy is stuck: momentum 0.99 needs 459 updates to forget what it starts with."""
    model = fit(mlp(), X, Y, steps=48)
    return diagnose(model, X, Y)


def never_updated() -> Diagnosis:
    """A training loop of one's own that forgets training=True. (tf.GradientTape; TensorFlow 1: UPDATE_OPS.)"""
    model, optimizer = mlp(), keras.optimizers.Adam(2e-3)
    for rows in np.random.default_rng(0).integers(0, len(X), (150, 64)):
        with tf.GradientTape() as tape:
            loss = LOSS(Y[rows], model(30 * X[rows]))  # model(..., training=True)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return diagnose(model, 30 * X, Y)


def never_trained() -> Diagnosis:
    """The weights were loaded into another object than the one that predicts."""
    model = mlp()
    return diagnose(model, X, Y)


def small_batches() -> Diagnosis:
    """Two images per batch, because the images are large: the statistics of two values are noise."""
    model = fit(mlp(momentum=0.9), X, Y, steps=300, batch=2)
    return diagnose(model, X, Y, batch_size=2)


def frozen_other_data() -> Diagnosis:
    """Fine-tuning: the batch norms are frozen, and the new images are prepared in another way (0 to 255, inverted)."""
    model = fit(mlp(momentum=0.9), X, Y)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, BatchNormalization)
    other = 4 * (1 - X)
    fit(model, other, Y, steps=30, rate=1e-3)
    return diagnose(model, other, Y)


def outlier() -> Diagnosis:
    """One sample in another unit."""
    x = X.copy()
    x[77] *= 1000
    model = fit(mlp(momentum=0.9), x, Y)
    return diagnose(model, x, Y)


def wrong_axis() -> Diagnosis:
    """axis=1, copied from a channels_first network: every row of the image has statistics of its own."""
    keras.utils.set_random_seed(0)
    conv, norm = layers.Conv2D(8, 3, padding="same"), BatchNormalization(axis=1, momentum=0.9, name="bn")
    head = [layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential([keras.Input((8, 8, 1)), conv, norm, *head], name="cnn")
    images = X.reshape(-1, 8, 8, 1)
    fit(model, images, Y)
    return diagnose(model, images, Y)


def shared() -> Diagnosis:
    """A Siamese network: one tower, two kinds of images."""
    tower = mlp(momentum=0.9)
    a, b = keras.Input((64,)), keras.Input((64,))
    model = keras.Model([a, b], layers.Dense(10)(layers.Concatenate()([tower(a), tower(b)])), name="siamese")
    pair = [X, 2 * (1 - X)]
    fit(model, pair, Y)
    return diagnose(model, pair, Y)


def mixed_batches() -> Diagnosis:
    """The data is sorted by class, and nobody shuffles it."""
    model, order = fit(mlp(momentum=0.9), X, Y), np.argsort(Y)
    data = tf.data.Dataset.from_tensor_slices((X[order], Y[order])).batch(64)
    model.fit(data, epochs=3, verbose=0)
    return diagnose(model, data)


def drift() -> Diagnosis:
    """A learning rate that is far too high at the end: the moving statistics belong to weights of long ago."""
    model = fit(mlp(), X, Y, steps=600)
    model.optimizer.learning_rate = 0.05
    model.fit(X, Y, batch_size=32, verbose=0)
    return diagnose(model, X, Y)


def constant_channels() -> Diagnosis:
    """Dead ReLUs before a batch norm: a bias that a bad step has thrown far below 0."""
    keras.utils.set_random_seed(0)
    dense = layers.Dense(64, activation="relu", bias_initializer=keras.initializers.Constant(-100))
    head = [BatchNormalization(momentum=0.9, name="bn"), layers.Dense(10)]
    model = fit(keras.Sequential([keras.Input((64,)), dense, *head], name="dead"), X, Y)
    return diagnose(model, X, Y)


def not_finite() -> Diagnosis:
    """Loss nan after loading: one non-finite batch in training has poisoned the moving statistics."""
    model = fit(mlp(momentum=0.9), X, Y)
    broken = X[:64].copy()
    broken[3] = np.nan
    model(broken, training=True)
    return diagnose(model, X, Y)


def overflow() -> Diagnosis:
    """Mixed precision: float16 ends at 65,504."""
    keras.utils.set_random_seed(0)
    dense = layers.Dense(64, dtype="mixed_float16", kernel_initializer=keras.initializers.RandomNormal(stddev=100))
    norm, head = BatchNormalization(dtype="mixed_float16", name="bn"), layers.Dense(10, dtype="float32")
    model = keras.Sequential([keras.Input((64,)), dense, norm, head], name="half")
    return diagnose(model, 255 * X, Y)


def shifted_data() -> Diagnosis:
    """In production the images come as 0 to 16, not as 0 to 1."""
    model = fit(mlp(momentum=0.9), X, Y)
    return diagnose(model, X, Y, data2=(16 * DATA.x_test, DATA.y_test))


def epsilon() -> Diagnosis:
    """Weights from PyTorch (epsilon 1e-5) in a layer with Keras's default of 1e-3, where variances are small."""
    trained = fit(mlp(momentum=0.9, epsilon=1e-5), X / 500, Y, steps=400)
    model = mlp(momentum=0.9)
    model.set_weights(trained.get_weights())
    model.compile("adam", LOSS, metrics=["accuracy"])
    return diagnose(model, X / 500, Y)


def momentum() -> Diagnosis:
    """momentum=0.1, copied from PyTorch, where it is the weight of the new value."""
    model = fit(mlp(momentum=0.1), X, Y, batch=16)
    return diagnose(model, X, Y)


class AlwaysTraining(keras.Model):
    """Gives its batch norm training=True, always."""

    def __init__(self) -> None:
        super().__init__(name="always")
        self.hidden, self.norm, self.head = layers.Dense(64), BatchNormalization(name="bn"), layers.Dense(10)

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.head(keras.ops.relu(self.norm(self.hidden(x), training=True)))


def always_training() -> Diagnosis:
    """training=True in the model's call: predict gives other outputs for other batches."""
    model = AlwaysTraining()
    model(X[:1])
    fit(model, X, Y)
    return diagnose(model, X, Y)


def stale() -> Diagnosis:
    """Averaged weights (SWA, model soups): the moving statistics belong to none of them."""
    model = fit(mlp(momentum=0.9), X, Y)
    early = [np.array(weight) for weight in model.get_weights()]
    fit(model, X[:, ::-1], Y, steps=300)
    late = model.get_weights()
    names = [weight.path for weight in model.weights]
    model.set_weights([b if "moving" in n else (a + b) / 2 for n, a, b in zip(names, early, late, strict=True)])
    return diagnose(model, X, Y)


CAUSES = {
    cause.__name__.replace("_", "-"): cause
    for cause in (
        too_few_updates, never_updated, never_trained, small_batches, frozen_other_data, outlier, wrong_axis, shared,
        mixed_batches, drift, constant_channels, not_finite, overflow, shifted_data, epsilon, momentum, always_training,
        stale,
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Diagnosis]:
    """Run the scripts, print and return the diagnoses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("causes", nargs="*", metavar="CAUSE", help=f"some of {', '.join(CAUSES)}")
    chosen = parser.parse_args(argv).causes
    if unknown := sorted(set(chosen) - set(CAUSES)):
        parser.error(f"CAUSE must be one of {', '.join(CAUSES)}. Received: {', '.join(unknown)}")
    found = {}
    for name in chosen or CAUSES:
        found[name] = CAUSES[name]()
        print(f"==== {name}: {CAUSES[name].__doc__}\n\n{found[name]}\n")
    return found


if __name__ == "__main__":
    main()
