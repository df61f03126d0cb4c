"""bnfast.keras.WeightNormalization: against PyTorch's weight_norm; data_init, remove(). More in ../models/."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import WeightNormalization

Layer = keras.layers


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(3)  # the initial kernels are random


CASES: dict[str, Any] = {  # name: (layer, shape of its input)
    "dense": (lambda **k: Layer.Dense(4, **k), (40, 7)),
    "conv1d": (lambda **k: Layer.Conv1D(4, 3, **k), (6, 9, 5)),
    "conv2d": (lambda **k: Layer.Conv2D(4, 3, strides=2, **k), (5, 7, 7, 3)),
    "grouped": (lambda **k: Layer.Conv2D(4, 3, groups=2, **k), (5, 7, 7, 6)),
    "conv3d": (lambda **k: Layer.Conv3D(4, 2, **k), (5, 4, 4, 4, 3)),
    "conv1d_transpose": (lambda **k: Layer.Conv1DTranspose(4, 3, **k), (6, 9, 5)),
    "conv2d_transpose": (lambda **k: Layer.Conv2DTranspose(4, 3, strides=2, **k), (5, 4, 4, 3)),
    "conv3d_transpose": (lambda **k: Layer.Conv3DTranspose(4, 2, **k), (3, 3, 4, 3, 2)),
    "depthwise1d": (lambda **k: Layer.DepthwiseConv1D(3, depth_multiplier=2, **k), (6, 9, 3)),
    "depthwise2d": (lambda **k: Layer.DepthwiseConv2D(3, depth_multiplier=2, **k), (5, 6, 6, 3)),
}


def batch(name: str, rng: np.random.Generator, dtype: str = "float32") -> Any:
    return (rng.standard_normal(CASES[name][1]) * 2 + 3).astype(dtype)


def wrapped(name: str, x: Any, data_init: bool = True, **kwargs: Any) -> Any:
    layer = WeightNormalization(CASES[name][0](**kwargs), data_init=data_init)
    layer.build(x.shape)
    return layer


def per_channel(y: Any) -> tuple[Any, Any]:
    rows = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    return rows.mean(0), rows.var(0)


def torch_layer(torch: Any, name: str, x: Any) -> tuple[Any, int, Any, Any]:
    """PyTorch's layer, the dim of its weight_norm, and functions that convert kernels to PyTorch's layout and back."""
    nn, channels = torch.nn, x.shape[-1]
    if name == "dense":
        return nn.Linear(channels, 4), 0, np.transpose, np.transpose
    rank = x.ndim - 2
    space = tuple(range(rank))
    back = (*range(2, rank + 2), 1, 0)
    kind = getattr(nn, f"Conv{'Transpose' if 'transpose' in name else ''}{rank}d")
    stride = 2 if name in ("conv2d", "conv2d_transpose") else 1
    if "depthwise" in name:
        layer = kind(channels, 2 * channels, 3, groups=channels)

        def to_torch(k: Any) -> Any:
            return k.transpose(rank, rank + 1, *space).reshape(2 * channels, 1, *k.shape[:rank])

        return layer, 0, to_torch, lambda k: k.reshape(channels, 2, *k.shape[2:]).transpose(*range(2, rank + 2), 0, 1)
    layer = kind(channels, 4, 2 if "3d" in name else 3, stride=stride, groups=2 if name == "grouped" else 1)
    order = (rank + 1, rank, *space)
    return layer, int("transpose" in name), lambda k: k.transpose(order), lambda k: k.transpose(back)


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str, need: Any, rng: np.random.Generator) -> None:
    torch = need("torch")
    x = batch(name, rng, "float64")
    layer = wrapped(name, x, dtype="float64")
    for variable in layer.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape))
    theirs, dim, to_torch, to_keras = torch_layer(torch, name, x)
    theirs = torch.nn.utils.parametrizations.weight_norm(theirs.double(), dim=dim)
    length, direction = theirs.parametrizations.weight.original0, theirs.parametrizations.weight.original1
    with torch.no_grad():
        direction.copy_(torch.from_numpy(np.ascontiguousarray(to_torch(layer.v.numpy()))))
        length.copy_(torch.from_numpy(layer.g.numpy().reshape(length.shape)))
        theirs.bias.copy_(torch.from_numpy(layer.layer.bias.numpy()))
    tx = torch.from_numpy(x if name == "dense" else np.moveaxis(x, -1, 1).copy()).requires_grad_()
    ty = theirs(tx)
    dy = rng.standard_normal(ty.shape)
    ty.backward(torch.from_numpy(dy))

    inputs = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layer(inputs)
    ours_dy = dy if name == "dense" else np.moveaxis(dy, 1, -1)
    sources = [inputs, layer.v, layer.g, layer.layer.bias]
    dx, dv, dg, dbias = tape.gradient(y, sources, output_gradients=tf.constant(ours_dy))
    last = (lambda a: a) if name == "dense" else (lambda a: np.moveaxis(a, 1, -1))
    for mine, other in (
        (y, last(ty.detach().numpy())),
        (dx, last(tx.grad.numpy())),
        (dv, to_keras(direction.grad.numpy())),
        (dg, length.grad.numpy().reshape(layer.g.shape)),
        (dbias, theirs.bias.grad.numpy()),
    ):
        np.testing.assert_allclose(mine, other, rtol=1e-11, atol=1e-11 * np.abs(other).max())


@pytest.mark.parametrize("name", CASES)
def test_initially_equals_the_plain_layer(name: str, rng: np.random.Generator) -> None:
    x = batch(name, rng)
    layer = wrapped(name, x)
    np.testing.assert_allclose(layer(x), layer.layer(x), rtol=1e-5, atol=1e-5)
    assert layer.compute_output_shape(x.shape) == layer(x).shape
    assert not layer.initialized.numpy()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_first_training_batch_initializes(name: str, use_bias: bool, rng: np.random.Generator) -> None:
    x = batch(name, rng)
    layer = wrapped(name, x, use_bias=use_bias, activation="relu")
    y = layer(x, training=True)
    assert layer.initialized.numpy()
    before = [v.numpy() for v in layer.variables]
    layer.layer.activation = keras.activations.linear
    z = layer(x)
    np.testing.assert_array_equal(np.maximum(z, 0), y)
    mean, variance = per_channel(z)
    np.testing.assert_allclose(variance, 1, rtol=1e-5)
    if use_bias:
        np.testing.assert_allclose(mean, 0, atol=1e-5)
    layer(x * 5, training=True)
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.usefixtures("channels_first_convolutions")
def test_channels_first(rng: np.random.Generator) -> None:
    layer = WeightNormalization(Layer.Conv2D(4, 1, data_format="channels_first"))
    y = layer(rng.standard_normal((6, 3, 5, 5)).astype("float32") + 2, training=True)
    mean, variance = per_channel(np.moveaxis(y, 1, -1))
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(variance, 1, rtol=1e-5)


def test_without_data_init_nothing_is_assigned(rng: np.random.Generator) -> None:
    x = batch("dense", rng)
    layer = wrapped("dense", x, data_init=False)
    before = [v.numpy() for v in layer.variables]
    np.testing.assert_array_equal(layer(x, training=True), layer(x))
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("freeze", ["wrapper", "layer"])
def test_a_frozen_layer_is_not_initialized(freeze: str, rng: np.random.Generator) -> None:
    x = batch("dense", rng)
    layer = wrapped("dense", x)
    assert [v.name for v in layer.trainable_variables] == ["g", "kernel", "bias"]
    (layer if freeze == "wrapper" else layer.layer).trainable = False
    assert [v.name for v in layer.trainable_variables] == ([] if freeze == "wrapper" else ["g"])
    layer(x, training=True)
    assert not layer.initialized.numpy()


@pytest.mark.parametrize("kind", ["empty", "one value", "constant", "nan"])
def test_a_batch_without_variance_does_not_initialize(kind: str, rng: np.random.Generator) -> None:
    x = batch("dense", rng)
    layer = wrapped("dense", x)
    before = [v.numpy() for v in layer.variables]
    odd = {"empty": x[:0], "one value": x[:1], "constant": np.tile(x[:1] + 0.1, (40, 1)), "nan": x * np.nan}[kind]
    layer(odd, training=True)
    for variable, value in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    np.testing.assert_allclose(per_channel(layer(x, training=True))[1], 1, rtol=1e-5)


def test_a_constant_channel_keeps_its_weights(rng: np.random.Generator) -> None:
    x = batch("depthwise2d", rng)
    x[..., 1] = 0.3
    layer = wrapped("depthwise2d", x, bias_initializer="ones")
    g = layer.g.numpy()
    layer(x, training=True)
    np.testing.assert_array_equal(layer.g.numpy()[1], g[1])
    np.testing.assert_array_equal(layer.layer.bias.numpy()[2:4], 1)
    assert (layer.g.numpy()[[0, 2]] != g[[0, 2]]).all()


def test_a_zero_column_gives_no_nan(rng: np.random.Generator) -> None:
    x = batch("dense", rng)
    layer = wrapped("dense", x, data_init=False)
    kernel = layer.v.numpy()
    kernel[:, 2] = 0
    layer.v.assign(kernel)
    with tf.GradientTape() as tape:
        y = layer(x)
    gradients = tape.gradient(y, layer.trainable_variables)
    assert all(np.isfinite(g).all() for g in (y, *gradients))
    assert not y.numpy()[:, 2].any()


def test_training_as_a_tensor_in_a_graph(rng: np.random.Generator) -> None:
    x = batch("conv2d", rng)
    eager, graph = wrapped("conv2d", x), wrapped("conv2d", x)
    graph.set_weights(eager.get_weights())
    run = tf.function(lambda x, training: graph(x, training=training))
    run(x, tf.constant(False))
    assert not graph.initialized.numpy()
    first, second = run(x, tf.constant(True)), run(x, tf.constant(True))
    assert graph.initialized.numpy()
    expected = eager(x, training=True)
    for y in (first, second):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_remove(name: str, rng: np.random.Generator) -> None:
    x = batch(name, rng)
    inner = CASES[name][0]()
    layer = WeightNormalization(inner)
    layer(x, training=True)
    layer.g.assign(layer.g * rng.choice([-1.0, 1.0], layer.g.shape))
    expected = layer(x)
    plain = layer.remove()
    assert plain is inner
    np.testing.assert_allclose(plain(x), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert len(plain.get_weights()) == 2
