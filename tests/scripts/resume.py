"""A regularized CNN in the functional style. Training stops and resumes from the JSON config and the weights."""

import sys

import keras
import numpy as np
from keras import layers, regularizers
from keras.models import model_from_json

folder = sys.argv[1] if len(sys.argv) > 1 else "."
rng = np.random.default_rng(0)
x_train = rng.normal(size=(256, 12, 12, 3)).astype("float32")
y_train = (x_train.mean((1, 2, 3)) > 0).astype("int32")


def conv_bn_relu(x, filters):
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_regularizer=regularizers.L2(1e-4))(x)
    x = layers.BatchNormalization(beta_regularizer=regularizers.L2(1e-4), gamma_constraint="non_neg")(x)
    return layers.Activation("relu")(x)


inputs = keras.Input(shape=(12, 12, 3))
x = conv_bn_relu(inputs, 8)
x = layers.MaxPooling2D()(x)
x = conv_bn_relu(x, 8)
x = layers.BatchNormalization(renorm=True, name="renormed")(x) if keras.__version__ >= "3.14" else x
x = layers.GlobalAveragePooling2D()(x)
outputs = layers.Dense(1, activation="sigmoid")(x)
model = keras.Model(inputs, outputs)
model.compile(optimizer=keras.optimizers.SGD(0.01, momentum=0.9), loss="binary_crossentropy", metrics=["accuracy"])
checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/resume.weights.h5", save_weights_only=True)
model.fit(x_train, y_train, epochs=2, verbose=0, callbacks=[checkpoint])

with open(f"{folder}/resume.json", "w") as file:
    file.write(model.to_json())

with open(f"{folder}/resume.json") as file:
    resumed = model_from_json(file.read())
resumed.load_weights(f"{folder}/resume.weights.h5")
resumed.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
np.testing.assert_allclose(resumed.predict(x_train, verbose=0), model.predict(x_train, verbose=0), rtol=1e-4, atol=1e-5)
history = resumed.fit(x_train, y_train, epochs=1, verbose=2)
