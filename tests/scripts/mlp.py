"""A multilayer perceptron on scikit-learn's digits, written as in a tutorial."""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf
from sklearn.datasets import load_digits
from tensorflow import keras
from tensorflow.keras import layers, regularizers
from tensorflow.keras.layers import BatchNormalization, Dense, Dropout

tf.keras.utils.set_random_seed(1)

digits = load_digits()
x_train, y_train = digits.data / 16.0, digits.target

model = keras.Sequential()
model.add(layers.Input((64,)))
model.add(Dense(64, use_bias=False, kernel_regularizer=regularizers.l2(1e-4)))
model.add(BatchNormalization(gamma_regularizer=regularizers.L2(1e-4)))
model.add(layers.Activation("relu"))
model.add(Dropout(0.2))
model.add(tf.keras.layers.Dense(32))
model.add(tf.keras.layers.BatchNormalization(momentum=0.9))
model.add(tf.keras.layers.Activation("relu"))
model.add(Dense(10, activation="softmax"))

model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, epochs=4, batch_size=64, verbose=0)
loss, accuracy = model.evaluate(x_train, y_train, verbose=0)
print(f"accuracy {accuracy:.3f}")
assert accuracy > 0.85
