"""A convolutional network on scikit-learn's digits, saved and loaded. The argument is the folder to save to."""

import argparse
import pathlib

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("folder", type=pathlib.Path)
args = parser.parse_args()

keras.utils.set_random_seed(2)
digits = load_digits()
x = digits.images[..., None].astype("float32") / 16
y = keras.utils.to_categorical(digits.target, 10)


class Norm(keras.layers.BatchNormalization):
    """A subclass with another default momentum."""

    def __init__(self, momentum=0.8, **kwargs):
        super().__init__(momentum=momentum, **kwargs)

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training, mask=mask)


model = keras.Sequential(
    [
        keras.Input(shape=(8, 8, 1)),
        layers.Conv2D(16, 3, use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(16, 3, use_bias=False),
        Norm(),
        layers.Activation("relu"),
        layers.Flatten(),
        layers.Dense(10, activation="softmax"),
    ]
)
model.summary(print_fn=lambda line: None)
model.compile(loss="categorical_crossentropy", optimizer=keras.optimizers.Adam(3e-3), metrics=["accuracy"])
history = model.fit(x, y, batch_size=128, epochs=args.epochs, validation_split=0.1, verbose=0)
assert history.history["accuracy"][-1] > 0.85

model.save(args.folder / "cnn.keras")
again = keras.models.load_model(args.folder / "cnn.keras", custom_objects={"Norm": Norm})
np.testing.assert_allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
assert all(isinstance(again.layers[i], keras.layers.BatchNormalization) for i in (1, 4))

rebuilt = keras.models.model_from_json(model.to_json(), custom_objects={"Norm": Norm})
rebuilt.set_weights(model.get_weights())
np.testing.assert_allclose(rebuilt.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
