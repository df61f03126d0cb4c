"""Gamma and beta per class: against a float64 reference; one class, call-time gamma and beta, errors."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, ConditionalBatchNormalization

pytestmark = pytest.mark.usefixtures("each_bridge")

CASES = [((6, 4), -1), ((6, 3, 2, 4), -1), ((6, 4, 3, 2), 1), ((6, 3, 4), 2)]
LABELS = np.array([2, 0, 2, 1, 0, 2])
CLASSES = 4  # no label in the batch is of the last class


def layer_of(shape: Any, classes: int = CLASSES, **kwargs: Any) -> Any:
    """A built layer whose gamma and beta differ between classes."""
    layer = ConditionalBatchNormalization(classes, momentum=0.75, **kwargs)
    layer.build([shape, (shape[0],)])
    rng = np.random.default_rng(3)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.weights])
    return layer


def reference(x: Any, gamma: Any, beta: Any, dy: Any, axis: int, present: Any) -> tuple[Any, ...]:
    """y, dx, mean, variance, and dgamma and dbeta per sample and channel.

    gamma and beta have shape (N, C). present broadcasts to x and selects the values used for the statistics.
    """
    axis %= x.ndim
    others = tuple(i for i in range(x.ndim) if i != axis)
    spread = tuple(i for i in range(1, x.ndim) if i != axis)
    weights = np.broadcast_to(present, x.shape)

    def mean(values: Any) -> Any:
        return (values * weights).sum(others, keepdims=True) / weights.sum(others, keepdims=True)

    average = mean(x)
    variance = mean((x - average) ** 2)
    s = 1 / np.sqrt(variance + 1e-3)
    xhat = (x - average) * s
    g = np.expand_dims(gamma, spread) * dy
    total = weights.sum(others, keepdims=True)
    sums = [(v).sum(others, keepdims=True) / total for v in (g, g * xhat)]
    dx = s * (g - weights * (sums[0] + xhat * sums[1]))
    y = np.expand_dims(gamma, spread) * xhat + np.expand_dims(beta, spread)
    return y, dx, average.ravel(), variance.ravel(), (dy * xhat).sum(spread), dy.sum(spread)


def by_class(rows: Any) -> Any:
    return np.stack([rows[k == LABELS].sum(0) for k in range(CLASSES)])


def gradients(layer: Any, inputs: Any, dy: Any, sources: list[Any], **kwargs: Any) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(sources)
        y = layer(inputs, training=True, **kwargs)
    return [y, *tape.gradient(y, sources, output_gradients=dy)]


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_reference(shape: Any, axis: int, graph: bool, masked: bool, rng: np.random.Generator) -> None:
    layer = layer_of(shape, axis=axis, dtype="float64")
    gamma, beta, moving_mean, moving_variance = layer.get_weights()
    x, dy = (tf.constant(rng.normal(1, 2, shape)) for _ in range(2))
    labels = tf.constant(LABELS[:, None] if graph else LABELS)
    present: Any = rng.uniform(size=shape) > 0.3 if masked else np.ones(shape, bool)
    present = present.any(axis, keepdims=True) if masked else present[..., :1]
    if masked:
        present[0] = False
    kwargs = {"mask": tf.constant(np.squeeze(present, axis))} if masked else {}
    sources = [x, layer.gamma.value, layer.beta.value]

    def run(x: Any, labels: Any, dy: Any) -> Any:
        return gradients(layer, [x, labels], dy, [x, *sources[1:]], **kwargs)

    actual = (tf.function(run) if graph else run)(x, labels, dy)
    y, dx, mean, variance, dgamma, dbeta = reference(
        x.numpy(), gamma[LABELS], beta[LABELS], dy.numpy(), axis, present if masked else np.ones(shape)
    )
    for a, b in zip(actual, (y, dx, by_class(dgamma), by_class(dbeta)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    assert not actual[2][3].numpy().any()
    np.testing.assert_allclose(layer.moving_mean, moving_mean * 0.75 + mean * 0.25, rtol=1e-12)
    np.testing.assert_allclose(layer.moving_variance, moving_variance * 0.75 + variance * 0.25, rtol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_inference(shape: Any, axis: int, rng: np.random.Generator) -> None:
    layer = layer_of(shape, axis=axis, activation="relu")
    x = rng.normal(1, 2, shape).astype("float32")
    y = layer([x, LABELS])
    spread = [i for i in range(x.ndim) if i != axis % x.ndim]
    mean, variance = (np.expand_dims(w, spread) for w in layer.get_weights()[2:])
    gamma, beta = (np.expand_dims(w[LABELS], spread[1:]) for w in layer.get_weights()[:2])
    wanted = np.maximum(gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta, 0)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"activation": "relu"}, {"dtype": "mixed_float16"}, {"center": False}], ids=str)
def test_one_class_equals_the_plain_layer(kwargs: dict[str, Any], rng: np.random.Generator) -> None:
    shape = (6, 5, 4)
    ours = layer_of(shape, 1, **kwargs)
    plain = BatchNormalization(momentum=0.75, **kwargs)
    plain.build(shape)
    plain.set_weights([w.reshape(-1) for w in ours.get_weights()])
    x, dy = (tf.constant(rng.normal(1, 2, shape), ours.compute_dtype) for _ in range(2))
    labels = tf.zeros([6], tf.int32)
    for training in (True, False):
        np.testing.assert_array_equal(ours([x, labels], training=training), plain(x, training=training))
    actual = gradients(ours, [x, labels], dy, [x, *(w.value for w in ours.trainable_variables)])
    wanted = gradients(plain, x, dy, [x, *(w.value for w in plain.trainable_variables)])
    for a, b in zip([*actual, *ours.weights], [*wanted, *plain.weights], strict=True):
        np.testing.assert_array_equal(np.ravel(a), np.ravel(b))


@pytest.mark.parametrize("rows", [True, False], ids=["(N, C)", "(C,)"])
@pytest.mark.parametrize(("shape", "axis"), CASES[1:3], ids=str)
def test_call_time_gamma_and_beta(shape: Any, axis: int, rows: bool, rng: np.random.Generator) -> None:
    layer = layer_of(shape, axis=axis, dtype="float64")
    x, dy = (tf.constant(rng.normal(1, 2, shape)) for _ in range(2))
    gamma, beta = (tf.constant(rng.uniform(0.5, 1.5, (6, 4) if rows else 4)) for _ in range(2))
    actual = gradients(layer, [x], dy, [x, gamma, beta], gamma=gamma, beta=beta)
    wide: list[Any] = [np.broadcast_to(v, (6, 4)) for v in (gamma, beta)]
    y, dx, _, _, dgamma, dbeta = reference(x.numpy(), wide[0], wide[1], dy.numpy(), axis, np.ones(shape))
    if not rows:
        dgamma, dbeta = dgamma.sum(0), dbeta.sum(0)
    for a, b in zip(actual, (y, dx, dgamma, dbeta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)
    mixed = layer([x, LABELS], training=True, beta=beta)  # gamma is taken by label
    y = reference(x.numpy(), layer.get_weights()[0][LABELS], wide[1], dy.numpy(), axis, np.ones(shape))[0]
    np.testing.assert_allclose(mixed, y, rtol=1e-10, atol=1e-11)


def test_second_order(rng: np.random.Generator) -> None:
    """Gradients of a gradient penalty, against TensorFlow's ops."""
    layer = layer_of((6, 4), dtype="float64")
    x = tf.constant(rng.normal(size=(6, 4)))

    def plain(inputs: Any, training: bool) -> Any:
        mean, variance = tf.reduce_mean(inputs[0], 0), tf.math.reduce_variance(inputs[0], 0)
        xhat = (inputs[0] - mean) / tf.sqrt(variance + 1e-3)
        return tf.gather(layer.gamma.value, LABELS) * xhat + tf.gather(layer.beta.value, LABELS)

    def penalty(call: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(call([x, tf.constant(LABELS)], training=True) ** 3)
            total = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return [tf.convert_to_tensor(g) for g in outer.gradient(total, [x, layer.gamma.value])]

    for actual, wanted in zip(penalty(layer), penalty(plain), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-8, atol=1e-8)


def test_mixed_float16(rng: np.random.Generator) -> None:
    layer = layer_of((6, 3, 4), dtype="mixed_float16")
    x = rng.normal(1, 2, (6, 3, 4)).astype("float16")
    gamma, beta = (w[LABELS] for w in layer.get_weights()[:2])
    y = layer([x, LABELS], training=True)
    assert (y.dtype, layer.gamma.dtype) == (tf.float16, "float32")
    wanted = reference(x.astype(float), gamma, beta, np.ones(x.shape), -1, np.ones(x.shape))[0]
    np.testing.assert_allclose(y, wanted, atol=5e-3)


def test_fit_and_a_model_file(tmp_path: Path, rng: np.random.Generator) -> None:
    kwargs: dict[str, Any] = {"activation": "silu", "gamma_regularizer": "l2", "beta_initializer": "random_normal"}
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((5,)), keras.Input((1,), dtype="int32")]
    layer = ConditionalBatchNormalization(3, name="norm", momentum=0.5, **kwargs)
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    labels = rng.integers(0, 2, (64, 1)).astype("int32")
    x = rng.normal(2, 3, (64, 5)).astype("float32")
    before = layer.gamma.numpy()
    history = model.fit([x, labels], x[:, :1] * (2 * labels - 1), batch_size=16, epochs=8, verbose=0).history["loss"]
    assert history[-1] < history[0] * 0.75
    moved = np.abs(layer.gamma.numpy() - before).max(1)
    assert moved.min() > 0  # also for the class without samples, because of the regularizer
    np.testing.assert_allclose(layer.moving_mean, x.mean(0), atol=1.5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_layer("norm").get_config() == layer.get_config()
    assert layer.get_config()["num_classes"] == 3
    np.testing.assert_array_equal(again([x, labels]), model([x, labels]))
    assert keras.saving.get_registered_name(type(layer)) == "bnfast>ConditionalBatchNormalization"


def test_the_mask_of_a_masking_layer(rng: np.random.Generator) -> None:
    layer = layer_of((6, 5, 4))
    x = rng.normal(1, 2, (6, 5, 4)).astype("float32")
    x[rng.uniform(size=(6, 5)) > 0.6] = 0
    masked = keras.layers.Masking()(x)
    kwargs: dict[str, Any] = {"training": True}
    wanted = layer([x, LABELS], mask=tf.constant((x != 0).any(-1)), **kwargs)
    y = layer([masked, tf.constant(LABELS)], **kwargs)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(y._keras_mask, (x != 0).any(-1))
    gamma = tf.constant(layer.get_weights()[0][LABELS])
    np.testing.assert_array_equal(layer([masked, tf.constant(LABELS)], gamma=gamma, **kwargs), wanted)
    assert np.abs(layer([x, LABELS], **kwargs) - wanted).max() > 0.1


def test_a_frozen_layer_keeps_its_statistics(rng: np.random.Generator) -> None:
    layer = layer_of((6, 4))
    layer.trainable = False
    before = layer.get_weights()
    x = rng.normal(size=(6, 4)).astype("float32")
    np.testing.assert_array_equal(layer([x, LABELS], training=True), layer([x, LABELS]))
    assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


def test_labels_out_of_range() -> None:
    for classes in (1, 3):
        layer = layer_of((2, 4), classes)
        before = layer.get_weights()
        x = tf.ones([2, 4])
        graph = tf.function(lambda labels, layer=layer, x=x: layer([x, labels], training=True))
        for wrong in (classes, -1):
            labels = tf.constant([0, wrong])
            with pytest.raises(ValueError, match=rf"labels must be in \[0, {classes}\). Received: {wrong}"):
                layer([x, labels], training=True)
            with pytest.raises(tf.errors.InvalidArgumentError, match=rf"labels must be in \[0, {classes}\)"):
                graph(labels)
        assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


@pytest.mark.parametrize(
    ("inputs", "kwargs", "error", "message"),
    [
        ([np.ones((6, 4)), np.ones(6, "float32")], {}, TypeError, "labels must have an integer dtype. Received: float"),
        ([np.ones((6, 4)), LABELS[:3]], {}, ValueError, r"labels must have shape \(N,\) or \(N, 1\) with N = 6"),
        ([np.ones((6, 4)), np.zeros((6, 2), int)], {}, ValueError, r"labels must have .* Received: \(6, 2\)"),
        ([np.ones((6, 4))], {}, ValueError, r"inputs must be \[x, labels\] unless gamma and beta are given"),
        ([np.ones((6, 4))], {"gamma": np.ones(4)}, ValueError, r"inputs must be \[x, labels\] unless"),
        ([np.ones((6, 4))] * 3, {}, ValueError, r"inputs must be \[x, labels\], \[x\] or x. Received: 3"),
        ([np.ones((6, 5)), LABELS], {}, ValueError, r"x must have 4 channels along axis -1. Received: shape \(6, 5\)"),
        (
            [np.ones((6, 4)), LABELS],
            {"gamma": np.ones((5, 4))},
            ValueError,
            r"gamma must have shape \(6, 4\) or \(4,\)",
        ),
        ([np.ones((6, 4)), LABELS], {"beta": np.ones(3)}, ValueError, r"beta must have shape \(6, 4\) or \(4,\)"),
    ],
    ids=str,
)
def test_bad_calls(inputs: Any, kwargs: dict[str, Any], error: Any, message: str) -> None:
    layer = layer_of((6, 4))
    before = layer.get_weights()
    with pytest.raises(error, match=message):
        layer(inputs, training=True, **kwargs)
    assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


def test_bad_arguments() -> None:
    for classes, error in ((0, ValueError), (-2, ValueError), (2.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="num_classes must be"):
            ConditionalBatchNormalization(classes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"axis must be one axis. Received: \[1, 2\]"):
        ConditionalBatchNormalization(3, axis=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis must not be 0"):
        ConditionalBatchNormalization(3, axis=0).build([(6, 4), (6,)])
    with pytest.raises(ValueError, match="gamma must be None with scale=False"):
        ConditionalBatchNormalization(3, scale=False)([tf.ones([6, 4]), LABELS], gamma=tf.ones(4))


def test_graphs_are_freed() -> None:
    layer = ConditionalBatchNormalization(3)
    x, labels = tf.ones((4, 2)), tf.constant([0, 1, 2, 0])
    layer.build([(4, 2), (4,)])

    def trace() -> Any:
        @tf.function
        def run(x: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer([x, labels], training=True))
            return tape.gradient(loss, layer.trainable_variables[0].value)

        run(x, labels)
        return weakref.ref(run.get_concrete_function(x, labels).graph)

    graphs = [trace() for _ in range(2)]
    gc.collect()
    assert [graph() for graph in graphs] == [None, None]
