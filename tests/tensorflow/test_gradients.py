"""Gradients of ops.train and of the layer, in float64: against Keras's layer and against plain TensorFlow ops."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization
from bnfast.tensorflow import ops
from bnfast.tensorflow.batch import Options
from bnfast.tensorflow.custom_gradient import custom_gradient

pytestmark = pytest.mark.usefixtures("each_bridge")

SHAPES = {2: (7, 3), 3: (4, 5, 3), 4: (3, 4, 2, 5), 5: (2, 3, 2, 2, 3)}
CASES = [(rank, axis) for rank, shape in SHAPES.items() for axis in range(1, len(shape))] + [(4, -1), (3, 0)]
ACTIVATIONS = {
    None: lambda y: y,
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": lambda y: tf.where(y > 0, y, 0.2 * y),  # tf.nn.leaky_relu rounds its slope to float32
}


def close(actual: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max(initial=0) <= tolerance * max(1.0, np.abs(wanted).max(initial=0))


def filled(layer: Any, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    layer.build(shape)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return layer


def plain(x: Any, gamma: Any, beta: Any, mask: Any, axis: int, epsilon: float = 1e-3) -> tuple[Any, Any, Any]:
    """y, mean and variance from plain reductions, which TensorFlow can differentiate any number of times."""
    axes = [i for i in range(x.shape.rank) if i != axis % x.shape.rank]
    weights = tf.ones_like(x) if mask is None else tf.cast(mask, x.dtype) * tf.ones_like(x)
    total = tf.reduce_sum(weights, axes, keepdims=True)
    mean = tf.reduce_sum(weights * x, axes, keepdims=True) / total
    variance = tf.reduce_sum(weights * (x - mean) * (x - mean), axes, keepdims=True) / total
    y = tf.reshape(gamma, mean.shape) * (x - mean) * (variance + epsilon) ** -0.5 + tf.reshape(beta, mean.shape)
    return y, tf.reshape(mean, [-1]), tf.reshape(variance, [-1])


def data(rng: np.random.Generator, shape: tuple[int, ...], axis: int) -> tuple[Any, Any, Any]:
    channels = shape[axis]
    return (
        tf.constant(rng.normal(2, 3, shape)),
        tf.constant(rng.uniform(0.5, 2, channels) * rng.choice([-1, 1], channels)),
        tf.constant(rng.normal(1, 1, channels)),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rank", "axis", "graph"), [(*case, i % 2 == 1) for i, case in enumerate(CASES)])
def test_layer_gradients_equal_keras(
    rank: int, axis: int, activation: str | None, graph: bool, rng: np.random.Generator
) -> None:
    shape = SHAPES[rank]
    x, dy = tf.constant(rng.normal(2, 3, shape)), tf.constant(rng.normal(size=shape))
    ours = filled(BatchNormalization(axis=axis, dtype="float64", activation=activation), shape, rng)
    keras_layer = filled(keras.layers.BatchNormalization(axis=axis, dtype="float64"), shape, rng)
    keras_layer.set_weights(ours.get_weights())

    def gradients(layer: Any, activate: Callable[[Any], Any]) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activate(layer(x, training=True))
        return [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=dy)]

    run = tf.function(gradients) if graph else gradients
    for actual, wanted in zip(run(ours, lambda y: y), gradients(keras_layer, ACTIVATIONS[activation]), strict=True):
        close(actual, wanted)
    close(ours.moving_mean, keras_layer.moving_mean)
    close(ours.moving_variance, keras_layer.moving_variance)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("rank", SHAPES)
def test_masked_layer_gradients_equal_keras(rank: int, scale: bool, center: bool, rng: np.random.Generator) -> None:
    before = keras.config.epsilon()
    keras.config.set_epsilon(0.0)  # Keras divides by the mask's sum + epsilon(): a relative error of 1e-7 in the mean
    try:
        shape = SHAPES[rank]
        mask = tf.constant(rng.random(shape[:-1]) < 0.6)
        x, dy = tf.constant(rng.normal(2, 3, shape)), tf.constant(rng.normal(size=shape))
        layers = [
            filled(kind(dtype="float64", scale=scale, center=center), shape, np.random.default_rng(1))
            for kind in (BatchNormalization, keras.layers.BatchNormalization)
        ]
        results = []
        for layer in layers:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask)
            sources = [x, *(weight.value for weight in layer.trainable_weights)]
            results.append([y, *tape.gradient(y, sources, output_gradients=dy), *layer.get_weights()])
        for actual, wanted in zip(*results, strict=True):
            close(actual, wanted)
    finally:
        keras.config.set_epsilon(before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rank", "axis", "graph"), [(2, -1, False), (3, 1, True), (4, 1, False), (4, -1, True), (5, 2, False)]
)
def test_first_and_second_order_through_y_mean_and_variance(
    rank: int, axis: int, activation: str | None, masked: bool, graph: bool, rng: np.random.Generator
) -> None:
    x, gamma, beta = data(rng, SHAPES[rank], axis)
    mask = tf.expand_dims(tf.constant(rng.random(np.delete(SHAPES[rank], axis)) < 0.7), axis) if masked else None
    options = Options(axis=axis, activation=activation)
    weights = [tf.constant(rng.normal(size=t.shape)) for t in (x, gamma, beta)]

    def ours(x: Any, gamma: Any, beta: Any) -> Any:
        return ops.train(x, gamma, beta, mask=mask, options=options)

    def wanted(x: Any, gamma: Any, beta: Any) -> Any:
        y, mean, variance = plain(x, gamma, beta, mask, axis)
        return ACTIVATIONS[activation](y), mean, variance

    def orders(f: Any) -> Any:
        primal = [x, gamma, beta]
        with tf.GradientTape() as second:
            second.watch(primal)
            with tf.GradientTape() as first:
                first.watch(primal)
                y, mean, variance = f(*primal)
                loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(mean**3) + tf.reduce_sum(tf.exp(-variance) * mean)
            dx = first.gradient(loss, primal)
            penalty = tf.add_n([tf.reduce_sum(w * g * g) for w, g in zip(weights, dx, strict=True)])
        return [y, mean, variance, *dx, *second.gradient(penalty, primal)]

    results = tf.function(lambda: orders(ours))() if graph else orders(ours)
    for actual, right in zip(results, orders(wanted), strict=True):
        close(actual, right)


def test_each_output_alone_and_pairs(rng: np.random.Generator) -> None:
    x, gamma, beta = data(rng, (6, 4), -1)
    for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):

        def gradient(f: Any, used: list[int] = used) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([x, gamma, beta])
                outputs = f(x, gamma, beta)
                loss = tf.add_n([tf.reduce_sum(tf.sin(outputs[i])) for i in used])
            return tape.gradient(loss, [x, gamma, beta], unconnected_gradients="zero")

        ours = gradient(lambda *p: ops.train(*p, options=Options()))
        for actual, right in zip(ours, gradient(lambda *p: plain(*p, None, -1)), strict=True):
            close(actual, right)


def test_third_order(rng: np.random.Generator) -> None:
    x, gamma, beta = data(rng, (5, 2), -1)

    def third(f: Any) -> Any:
        with tf.GradientTape() as t3:
            t3.watch(x)
            with tf.GradientTape() as t2:
                t2.watch(x)
                with tf.GradientTape() as t1:
                    t1.watch(x)
                    loss = tf.reduce_sum(f(x)[0] ** 3)
                g1 = tf.reduce_sum(tf.sin(t1.gradient(loss, x)))
            g2 = tf.reduce_sum(tf.sin(t2.gradient(g1, x)))
        return t3.gradient(g2, x)

    close(third(lambda x: ops.train(x, gamma, beta)), third(lambda x: plain(x, gamma, beta, None, -1)), 1e-9)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_gradient_penalty_equals_keras(graph: bool, rng: np.random.Generator) -> None:
    """Second order through the layers.

    Keras's result is correct only if the gradient of the loss with respect to dx sums to 0 per channel, as here:
    tf.nn.moments stops the gradient at the mean inside the variance.
    """
    shape = (4, 3, 3, 2)
    x = tf.constant(rng.normal(1, 2, shape))

    def penalty(layer: Any) -> Any:
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                loss = tf.reduce_sum(tf.nn.tanh(layer(x, training=True)))
            dx = first.gradient(loss, x)
            value = tf.reduce_sum(dx * dx)
        return [value, *second.gradient(value, [x, layer.gamma.value, layer.beta.value], unconnected_gradients="zero")]

    ours = filled(BatchNormalization(dtype="float64"), shape, np.random.default_rng(3))
    wanted = filled(keras.layers.BatchNormalization(dtype="float64"), shape, np.random.default_rng(3))
    for actual, right in zip((tf.function(penalty) if graph else penalty)(ours), penalty(wanted), strict=True):
        close(actual, right)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 2), (6, 2)])
def test_frozen_gradients_equal_keras(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(1, 2, shape), dtype)

    def orders(kind: Any) -> Any:
        layer = filled(kind(dtype=dtype), shape, np.random.default_rng(3))
        layer.trainable = False
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                loss = tf.reduce_sum(layer(x, training=True) ** 3)
            dx, *rest = first.gradient(loss, [x, layer.gamma.value, layer.beta.value])
            value = tf.reduce_sum(dx * dx)
        return [dx, *rest, second.gradient(value, x)]

    for actual, right in zip(orders(BatchNormalization), orders(keras.layers.BatchNormalization), strict=True):
        close(actual, right, 1e-12 if dtype == "float64" else 2e-5)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_jacobian_equals_keras(graph: bool, rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(size=(5, 3)))

    def jacobian(layer: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return tape.jacobian(y, x)

    ours, theirs = (
        filled(k(dtype="float64"), (5, 3), rng) for k in (BatchNormalization, keras.layers.BatchNormalization)
    )
    theirs.set_weights(ours.get_weights())
    close((tf.function(jacobian) if graph else jacobian)(ours), jacobian(theirs))


def test_in_a_graph_loop(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(size=(5, 3)))

    def repeated(layer: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for _ in tf.range(3):
                y = layer(y, training=True) ** 3
            loss = tf.reduce_sum(y * x)
        return tape.gradient(loss, x)

    ours, theirs = (
        filled(k(dtype="float64"), (5, 3), rng) for k in (BatchNormalization, keras.layers.BatchNormalization)
    )
    theirs.set_weights(ours.get_weights())
    close(tf.function(repeated)(ours), repeated(theirs))
    close(ours.moving_variance, theirs.moving_variance)


@pytest.mark.parametrize("each_bridge", ["op"], indirect=True)
def test_a_copy_of_a_graph_that_is_gone_has_no_gradient() -> None:
    """The nodes name a gradient that no longer is: an error, and no other gradient."""

    def double(x: Any) -> Any:
        return 2 * x, lambda dy: 2 * dy

    def nodes() -> Any:
        run = tf.function(lambda x: custom_gradient(double, x), autograph=False)
        graph = run.get_concrete_function(tf.TensorSpec([])).graph
        return graph.as_graph_def(), graph.inputs[0].name, graph.outputs[0].name

    definition, x, y = nodes()
    gc.collect()
    with tf.Graph().as_default():
        one = tf.constant(1.0)
        copied = tf.import_graph_def(definition, {x: one}, [y])
        with pytest.raises(LookupError, match="the graph that this operation was traced in is gone, and its gradient"):
            tf.gradients(copied, one)
