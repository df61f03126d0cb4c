"""Small Keras models with batch norms, and comparisons of two models."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from bnfast.keras import accelerate, report
from keras import layers as L

KERAS = keras.layers.BatchNormalization


def randomize(model: Any) -> Any:
    """Give every weight random values, so that a weight that is lost or swapped changes the output."""
    rng = np.random.default_rng(7)
    weights = [(w.path, w.shape) for w in model.weights]
    model.set_weights([rng.normal(0, 0.2, s) if "kernel" in path else rng.uniform(0.5, 1.5, s) for path, s in weights])
    return model


def states(model: Any) -> dict[str, str]:
    """{name of a batch norm: its state in report(model)}."""
    return {row.name: row.state for row in report(model).rows}


def fused(model: Any) -> list[str]:
    """What each batch norm of report(model) is fused with."""
    return [row.fused for row in report(model).rows]


def quiet(model: Any, **kwargs: Any) -> Any:
    return accelerate(model, verbose=False, **kwargs)


def same_predictions(model: Any, other: Any, *shapes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    x = [rng.normal(size=shape).astype("float32") for shape in shapes or [(3, *model.input_shape[1:])]]
    given = x[0] if len(x) == 1 else x
    for a, b in zip(keras.tree.flatten(model(given)), keras.tree.flatten(other(given)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def step(model: Any, *x: Any, training: Any = True) -> list[np.ndarray]:
    """Two steps in a graph: outputs, gradients of the inputs and of the trainable weights, and the weights after it."""

    @tf.function
    def run(*x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = keras.tree.flatten(model(list(x) if len(x) > 1 else x[0], training=training))
            ramps = [tf.reshape(tf.range(tf.size(y), dtype=y.dtype), tf.shape(y)) for y in outputs]
            sums = (tf.reduce_sum(tf.sin(y) * ramp) for y, ramp in zip(outputs, ramps, strict=True))
            loss = sum(tf.cast(value, "float64") for value in (*sums, *model.losses))
        sources = [*x, *(v.value for v in model.trainable_variables)]
        return [*outputs, *tape.gradient(loss, sources, unconnected_gradients="zero")]

    given = [tf.constant(value) for value in x]
    return [np.asarray(value) for value in (*run(*given), *run(*given), *model.weights)]


def same_steps(model: Any, other: Any, *x: Any, tolerance: float = 1e-9, **kwargs: Any) -> None:
    for i, (a, b) in enumerate(zip(step(model, *x, **kwargs), step(other, *x, **kwargs), strict=True)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()), err_msg=str(i))


def residual_net(dtype: str = "float32", compiled: Any = None, add: Any = None, **norm: Any) -> Any:
    """A small ResNet: a stem, a block with BNs on both inputs of its Add, a block with an identity shortcut, a head."""
    inputs = keras.Input((8, 8, 3), dtype=dtype, name="image")
    kwargs = {"dtype": dtype, "use_bias": False}
    x = L.Conv2D(4, 3, padding="same", name="conv0", **kwargs)(inputs)
    x = L.ReLU(name="relu0", dtype=dtype)(KERAS(name="bn0", momentum=0.9, dtype=dtype, **norm)(x))
    for i in (1, 2):
        y = KERAS(name=f"bn{i}", dtype=dtype, **norm)(L.Conv2D(4, 3, padding="same", name=f"conv{i}", **kwargs)(x))
        shortcut = KERAS(name="bn1s", dtype=dtype, **norm)(L.Conv2D(4, 1, name="conv1s", **kwargs)(x)) if i == 1 else x
        total = add(shortcut, y) if add else L.Add(name=f"add{i}", dtype=dtype)([shortcut, y])
        x = L.Activation("relu", name=f"out{i}", dtype=dtype)(total)
    x = L.Dense(5, name="head", dtype=dtype)(L.GlobalAveragePooling2D(dtype=dtype)(x))
    model = randomize(keras.Model(inputs, x, name="net"))
    if compiled is not None:
        model.compile(compiled, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def data(dtype: str = "float32", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(16, 8, 8, 3)).astype(dtype), rng.integers(0, 5, 16)


def dense_net(*, norm: Any = None, norm_name: str = "bn") -> Any:
    inputs = keras.Input((4,))
    x = L.ReLU(name="relu")((norm or KERAS(name=norm_name))(L.Dense(6, name="dense")(inputs)))
    return randomize(keras.Model(inputs, L.Dense(3, name="head")(x), name="net"))


class Block(keras.Model):
    """A subclassed model that keeps its layers in attributes, lists and dicts."""

    def __init__(self) -> None:
        super().__init__(name="block")
        self.first = L.Dense(4)
        self.norms = [KERAS(name=f"n{i}") for i in range(2)]
        self.more = {"a": KERAS(name="in_dict", momentum=0.5), "again": self.norms[0]}
        self.head = L.Dense(2)

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.first(x)
        for norm in self.norms:
            x = keras.ops.relu(norm(x, training=training))
        return self.head(self.more["again"](self.more["a"](x, training=training), training=training))


def subclassed() -> Any:
    model = Block()
    model(np.zeros((1, 4), "float32"))
    return randomize(model)
