"""y = activation(bn(x) + residual) in one layer, against Keras's three layers: results, gradients, files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalizationAdd
from bnfast.tensorflow import ops, reference
from bnfast.tensorflow.batch import Batch, Options

pytestmark = pytest.mark.usefixtures("each_bridge")

ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "silu", "tanh", "softsign"]  # softsign is not fused


def pair(activation: Any, shape: tuple[int, ...], **kwargs: Any) -> tuple[Any, Any]:
    """Our layer, and Keras's three layers as a function of [x, residual] whose attribute `norm` is the batch norm."""
    ours, norm = BatchNormalizationAdd(activation=activation, **kwargs), keras.layers.BatchNormalization(**kwargs)
    ours.build([shape, shape])
    norm.build(shape)
    rng = np.random.default_rng(3)
    weights = [rng.uniform(0.5, 1.5, w.shape) for w in norm.weights]
    ours.set_weights(weights)
    norm.set_weights(weights)

    def theirs(inputs: Any, training: bool, mask: Any = None) -> Any:
        y = norm(inputs[0], training=training, mask=mask) + inputs[1]
        return keras.activations.get(activation)(y)

    theirs.norm = norm  # type: ignore[attr-defined]
    return ours, theirs


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_keras(activation: Any, axis: int, training: bool, graph: bool, rng: np.random.Generator) -> None:
    shape = (4, 6, 5, 6)
    ours, theirs = pair(activation, shape, axis=axis, momentum=0.8)
    x, residual, dy = (tf.constant(rng.normal(0.5, 2, shape), tf.float32) for _ in range(3))

    def run(layer: Any, norm: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = layer([x, residual], training=training)
        sources = [x, residual, norm.gamma.value, norm.beta.value]
        return [y, *tape.gradient(y, sources, output_gradients=dy)]

    call = tf.function(run) if graph else run
    for actual, wanted in zip(call(ours, ours), call(theirs, theirs.norm), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5)
    for actual, wanted in zip(ours.weights, theirs.norm.weights, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)


def test_half_precision_and_mixed_policies(rng: np.random.Generator) -> None:
    for dtype in ("mixed_float16", "mixed_bfloat16", "float64"):
        ours, theirs = pair("relu", (8, 5), dtype=dtype)
        x, residual = (tf.constant(rng.normal(size=(8, 5)), ours.compute_dtype) for _ in range(2))
        y = ours([x, residual], training=True)
        assert y.dtype == ours.compute_dtype
        tolerance = 1e-12 if dtype == "float64" else 3e-2
        wanted = tf.cast(theirs([x, residual], training=True), tf.float64)
        np.testing.assert_allclose(tf.cast(y, tf.float64), wanted, atol=tolerance)


def test_the_residual_is_cast_to_the_dtype_of_the_layer() -> None:
    layer = BatchNormalizationAdd()
    y = layer([tf.ones([2, 3]), tf.ones([2, 3], tf.int32)])
    assert y.dtype == tf.float32
    np.testing.assert_allclose(y, 1 / np.sqrt(1.001) + 1, rtol=1e-6)


def test_without_an_activation_dresidual_is_dy(rng: np.random.Generator) -> None:
    x, residual, dy = (tf.constant(rng.normal(size=(9, 4)), tf.float32) for _ in range(3))
    with tf.GradientTape() as tape:
        tape.watch(residual)
        y = BatchNormalizationAdd()([x, residual], training=True)
    np.testing.assert_array_equal(tape.gradient(y, residual, output_gradients=dy), dy)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_second_order(activation: Any, rng: np.random.Generator) -> None:
    """Gradients of a gradient penalty with respect to x, gamma and residual, against TensorFlow's ops."""
    x, residual = (tf.constant(rng.normal(size=(7, 3)), tf.float64) for _ in range(2))
    gamma, beta, zeros, ones = (tf.constant(v, tf.float64) for v in ([1.5, 0.5, 1], [0.1, 0, -1], [0.0] * 3, [1.0] * 3))
    options = Options(activation=activation)

    def penalty(step: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch([x, gamma, residual])
            with tf.GradientTape() as inner:
                inner.watch([x, residual])
                y = step(Batch(x, gamma, beta, residual=residual), (zeros, ones), 0.9, options)[0]
                loss = tf.reduce_sum(y**3)
            squares = [tf.reduce_sum(g**2) for g in inner.gradient(loss, [x, residual])]
            total = tf.add_n(squares)
        return outer.gradient(total, [x, gamma, residual])

    for actual, wanted in zip(penalty(ops.train_step), penalty(reference.train_step), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-9)


def test_a_mask_applies_to_the_statistics_only(rng: np.random.Generator) -> None:
    ours, theirs = pair("relu", (4, 6, 3))
    x, residual = (tf.constant(rng.normal(size=(4, 6, 3)), tf.float32) for _ in range(2))
    mask = tf.constant(rng.uniform(size=(4, 6)) > 0.4)
    wanted = theirs([x, residual], training=True, mask=mask)
    for given in (mask, [mask, None]):
        np.testing.assert_allclose(ours([x, residual], training=True, mask=given), wanted, rtol=1e-4, atol=1e-5)


def test_the_output_has_the_mask_of_add(rng: np.random.Generator) -> None:
    first, second = (tf.constant(rng.uniform(size=(2, 5)) > 0.5) for _ in range(2))
    tensors = [tf.ones([2, 5, 3])] * 2
    layer, add = BatchNormalizationAdd(), keras.layers.Add()
    np.testing.assert_array_equal(
        layer.compute_mask(tensors, [first, second]), add.compute_mask(tensors, [first, second])
    )
    assert layer.compute_mask(tensors, [first, None]) is None
    assert layer.compute_mask(tensors, None) is None


def test_model_file(tmp_path: Path, rng: np.random.Generator) -> None:
    inputs = [keras.Input((4, 4, 3), name=name) for name in ("x", "residual")]
    layer = BatchNormalizationAdd(activation=keras.layers.ReLU(6), name="end")
    model = keras.Model(inputs, layer(inputs))
    layer.set_weights([rng.uniform(0.5, 1.5, 3) for _ in range(4)])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_layer("end").activation.max_value == 6
    given = [rng.normal(size=(2, 4, 4, 3)).astype("float32") for _ in range(2)]
    np.testing.assert_array_equal(again(given), model(given))


@pytest.mark.parametrize("shapes", [[(4, 3), (4, 1)], [(4, 3)], [(4, 3), (4, 2, 3)], [(4, 3)] * 3])
def test_inputs_of_different_shapes_are_errors(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"inputs must be \[x, residual\], two tensors of one shape"):
        BatchNormalizationAdd()([tf.ones(shape) for shape in shapes])


def test_a_single_tensor_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"inputs must be \[x, residual\]"):
        BatchNormalizationAdd()(tf.ones([2, 3]))
