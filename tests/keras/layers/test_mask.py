"""Masks along any axis, against sums in NumPy. Keras's layer supports masks for axis=-1 only."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization

pytestmark = pytest.mark.usefixtures("each_bridge")

CASES = [
    ((6, 5), -1),
    ((6, 5), 1),
    ((4, 6, 5), -1),
    ((4, 6, 5), 1),
    ((3, 4, 2, 5), 1),
    ((3, 4, 2, 5), 3),
    ((4, 5, 5), 1),
]


def reference(x: np.ndarray, weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y and the moving statistics of a fresh layer with momentum 0.9, in float64; weights broadcast to x."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    w = np.broadcast_to(weights, x.shape).astype(float)
    kept = np.where(w > 0, x.astype(float), 0)
    total = w.sum(axes, keepdims=True)
    mean = (w * kept).sum(axes, keepdims=True) / total
    variance = (w * (kept - mean) ** 2).sum(axes, keepdims=True) / total
    y = (x - mean) / np.sqrt(variance + 1e-3)
    return y, mean.ravel() * 0.1, 0.9 + variance.ravel() * 0.1


def check(layer: Any, y: Any, wanted: tuple[np.ndarray, ...]) -> None:
    for actual, right in zip((y, layer.moving_mean, layer.moving_variance), wanted, strict=True):
        np.testing.assert_allclose(actual, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_masks_for_any_axis(shape: tuple[int, ...], axis: int, graph: bool, rng: np.random.Generator) -> None:
    x = rng.normal(3, 2, shape).astype("float32")
    mask = rng.random(np.delete(shape, axis)) < 0.6
    mask.flat[:2] = True
    layer = BatchNormalization(axis=axis, momentum=0.9)
    run = tf.function(lambda x, m: layer(x, training=True, mask=m)) if graph else None
    y = run(x, mask) if run else layer(x, training=True, mask=tf.constant(mask))
    check(layer, y, reference(x, np.expand_dims(mask, axis), axis))


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32", "float64"])
def test_nonzero_mask_values_mean_true(dtype: str, rng: np.random.Generator) -> None:
    """As in Keras: 0.5 and 3 include a value, 0 excludes it."""
    x = rng.normal(3, 2, (8, 4)).astype("float32")
    mask = np.array([1, 0, 3, 0.5, 0, 1, 1, 0])
    layer = BatchNormalization(momentum=0.9)
    y = layer(x, training=True, mask=tf.cast(mask, dtype))
    check(layer, y, reference(x, (mask.astype(dtype) != 0)[:, None], -1))


@pytest.mark.parametrize("mask_shape", [(4, 1), (1, 6), (1, 1), (4, 6)], ids=str)
def test_mask_extents_of_1_broadcast(mask_shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.normal(3, 2, (4, 6, 5)).astype("float32")
    mask = np.ones(mask_shape, bool)
    mask.flat[0] = mask.size == 1
    layer = BatchNormalization(momentum=0.9)
    check(layer, layer(x, training=True, mask=tf.constant(mask)), reference(x, mask[..., None], -1))


def test_masking_layer_with_axis_1(rng: np.random.Generator) -> None:
    """Masking's mask has the shape inputs.shape[:-1] for any axis, so for axis=1 it differs between channels."""
    x = rng.normal(3, 2, (5, 2, 3)).astype("float32")
    x[:3, 1] = 0
    mask = (x != 0).any(-1)
    masked = keras.layers.Masking()(x)
    layer = BatchNormalization(axis=1, momentum=0.9)
    check(layer, layer(masked, training=True), reference(x, mask[..., None], 1))
    x[:, 1] = 0  # a fully masked channel keeps its moving statistics
    before = layer.get_weights()
    layer(keras.layers.Masking()(x), training=True)
    after = layer.get_weights()
    assert np.array_equal([w[1] for w in after], [w[1] for w in before])
    assert not np.array_equal([w[0] for w in after[2:]], [w[0] for w in before[2:]])


@pytest.mark.parametrize("extent", [2, None])
def test_attached_masks_are_unambiguous(extent: int | None, rng: np.random.Generator) -> None:
    """A mask (N, 2) fits two axes of (N, 2, 2) or (N, 2, unknown); one from Masking always means inputs.shape[:-1]."""
    x = rng.normal(3, 2, (5, 2, 2)).astype("float32")
    x[:3, 1] = 0
    layer = BatchNormalization(axis=1, momentum=0.9)
    layer.build(x.shape)
    masking = keras.layers.Masking()
    run = tf.function(lambda x: layer(masking(x), training=True), input_signature=[tf.TensorSpec([None, 2, extent])])
    check(layer, run(x), reference(x, (x != 0).any(-1)[..., None], 1))


def test_masked_values_do_not_matter(rng: np.random.Generator) -> None:
    x = rng.normal(3, 2, (8, 4)).astype("float32")
    mask = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)
    layers = [BatchNormalization(momentum=0.9) for _ in range(2)]
    results = []
    for layer, hole in zip(layers, (0.0, np.nan), strict=True):
        x[~mask] = hole
        results.append(layer(x, training=True, mask=tf.constant(mask)).numpy()[mask])
    assert np.array_equal(*results)
    for a, b in zip(*(layer.get_weights() for layer in layers), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_fully_masked_batch_changes_nothing(graph: bool, rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(3, 2, (8, 4)), "float32")
    layer = BatchNormalization()
    layer.build(x.shape)
    layer.set_weights([rng.uniform(0.5, 1.5, 4) for _ in range(4)])
    before = layer.get_weights()
    run = tf.function(lambda m: layer(x, training=True, mask=m)) if graph else lambda m: layer(x, training=True, mask=m)
    assert np.isfinite(run(tf.zeros(8, tf.bool)).numpy()).all()
    assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))


def test_an_all_true_mask_gives_the_same_bits(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(3, 2, (8, 7, 4)), "float32")
    plain, masked = BatchNormalization(), BatchNormalization()
    y = plain(x, training=True), masked(x, training=True, mask=tf.ones([8, 7], tf.bool))
    assert np.array_equal(*y)
    assert all(np.array_equal(a, b) for a, b in zip(plain.get_weights(), masked.get_weights(), strict=True))


def test_inference_ignores_and_propagates_the_mask(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(3, 2, (8, 7, 4)), "float32")
    layer = BatchNormalization()
    assert np.array_equal(layer(x, mask=tf.zeros([8, 7])), layer(x))
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, BatchNormalization()(keras.layers.Masking()(inputs)))
    assert model.output._keras_mask is not None


@pytest.mark.parametrize("training", [True, False])
def test_wrong_masks(training: bool) -> None:
    layer = BatchNormalization(axis=1)
    layer.build((4, 6, 5))
    before = layer.get_weights()
    with pytest.raises(ValueError, match=r"one dimension less than inputs. Received: mask.shape=\(4,\)"):
        layer(tf.ones([4, 6, 5]), training=training, mask=tf.ones([4]))
    with pytest.raises(ValueError, match=r"without axis 1.*Received: mask.shape=\(4, 3\), inputs.shape=\(4, 6, 5\)"):
        layer(tf.ones([4, 6, 5]), training=training, mask=tf.ones([4, 3]))
    assert all(np.array_equal(a, b) for a, b in zip(layer.get_weights(), before, strict=True))
