"""bnfast.keras.WeightNormalization in models: fit, files, dtype policies, losses, replicas, errors."""

import subprocess
import sys
from pathlib import Path
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


def dense(rng: np.random.Generator, data_init: bool = True, **kwargs: Any) -> tuple[Any, Any]:
    """A wrapped Dense layer and an input batch."""
    layer = WeightNormalization(Layer.Dense(4, **kwargs), data_init=data_init)
    layer.build((40, 7))
    return layer, (rng.standard_normal((40, 7)) * 2 + 3).astype("float32")


def model_of(rng: np.random.Generator, **kwargs: Any) -> tuple[Any, Any, Any]:
    model = keras.Sequential([
        Layer.Input((8, 8, 2)),
        WeightNormalization(Layer.Conv2D(6, 3, activation="relu"), name="conv", **kwargs),
        Layer.Flatten(),
        WeightNormalization(Layer.Dense(3), name="head", **kwargs),
    ])  # fmt: skip
    y = rng.integers(0, 3, 96)
    x = rng.standard_normal((96, 8, 8, 2)) * 0.5 + y.reshape(-1, 1, 1, 1)
    return model, x.astype("float32"), y


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("data_init", [False, True])
def test_fit(data_init: bool, jit: bool, rng: np.random.Generator) -> None:
    model, x, y = model_of(rng, data_init=data_init)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, jit_compile=jit)
    losses = model.fit(x, y, batch_size=32, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    flags = [bool(model.get_layer(name).initialized.numpy()) for name in ("conv", "head")]
    assert flags == [data_init] * 2


@pytest.mark.parametrize("trained", [False, True])
def test_files(trained: bool, rng: np.random.Generator, tmp_path: Path) -> None:
    model, x, _ = model_of(rng)
    model(x, training=trained)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again(x), model(x))
    assert bool(again.get_layer("conv").initialized.numpy()) is trained
    g = again.get_layer("conv").g.numpy()
    again(x * 3, training=True)
    assert np.array_equal(again.get_layer("conv").g.numpy(), g) is trained
    model.save_weights(tmp_path / "model.weights.h5")
    other = model_of(rng)[0]
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(x), model(x))


def test_config() -> None:
    assert keras.saving.get_registered_name(WeightNormalization) == "bnfast>WeightNormalization"
    layer = WeightNormalization(Layer.Dense(3, activation="relu", name="inner"), data_init=False, name="outer")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is WeightNormalization
    assert again.get_config() == layer.get_config()
    assert (again.name, again.layer.name, again.data_init) == ("outer", "inner", False)
    assert WeightNormalization(Layer.Dense(3)).get_config()["data_init"] is True


@pytest.mark.parametrize("policy", ["float64", "mixed_float16", "mixed_bfloat16", "float16"])
def test_dtype_policies(policy: str, rng: np.random.Generator) -> None:
    layer, x = dense(rng, dtype=policy)
    assert layer.dtype_policy.name == policy
    y = layer(x, training=True)
    assert y.dtype.name == layer.compute_dtype
    assert layer.g.dtype == layer.v.dtype == layer.variable_dtype
    np.testing.assert_allclose(np.var(y.numpy().astype("float64"), axis=0), 1, rtol=0.02)
    plain = Layer.Dense(4, dtype=policy)
    plain.build(x.shape)
    v, g = (a.numpy().astype("float64") for a in (layer.v, layer.g))
    plain.set_weights([g * v / np.sqrt((v * v).sum(0)), layer.layer.bias.numpy()])
    eps = {"float64": 1e-13, "mixed_bfloat16": 0.01}.get(policy, 0.002)
    np.testing.assert_allclose(y.numpy().astype("float64"), plain(x).numpy().astype("float64"), atol=20 * eps)


def test_mixed_policies_compute_lengths_in_float32(rng: np.random.Generator) -> None:
    """Neither the values of v nor their squares fit float16."""
    layer, x = dense(rng, data_init=False, dtype="mixed_float16")
    outer = keras.Sequential([layer], name="outer")
    expected = layer(x)
    layer.v.assign(layer.v * 1e8)
    for y in (layer(x), outer(x)):
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y, expected)


def test_losses_masks_and_state_of_the_inner_layer(rng: np.random.Generator) -> None:
    class Counting(Layer.Dense):
        def build(self, input_shape: Any) -> None:
            super().build(input_shape)
            self.calls = self.add_weight(name="calls", shape=(), initializer="zeros", trainable=False)

        def call(self, inputs: Any, training: Any = None) -> Any:
            self.calls.assign(self.calls + 1)
            return super().call(inputs, training)

    x = np.zeros((2, 4, 3), np.float32)
    x[:, :2] = rng.standard_normal((2, 2, 3))
    inner = Counting(5, kernel_regularizer=keras.regularizers.L2(0.1), activity_regularizer=keras.regularizers.L1(0.01))
    layer = WeightNormalization(inner, data_init=False)
    y = layer(Layer.Masking()(x))
    assert np.array_equal(y._keras_mask, [[True, True, False, False]] * 2)
    wanted = [0.01 * np.abs(y).sum() / len(y), 0.1 * np.square(layer.v).sum()]
    np.testing.assert_allclose(sorted(layer.losses), sorted(wanted), rtol=1e-5)
    assert inner.calls.numpy() == 1


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: WeightNormalization(Layer.ReLU()), TypeError, r"layer must be one of \['Dense'.*Received: ReLU"),
        (lambda: WeightNormalization("dense"), TypeError, "layer must be one of .*Received: str"),
        (lambda: WeightNormalization(Layer.SeparableConv2D(3, 3)), TypeError, "Received: SeparableConv2D"),
        (lambda: WeightNormalization(Layer.Dense(3), 1), TypeError, "data_init must be True or False. Received: 1"),
        (lambda: WeightNormalization(Layer.Dense(3, lora_rank=2)), ValueError, "must not have LoRA .*lora_rank=2"),
        (
            lambda: WeightNormalization(Layer.Dense(3, dtype="int8_from_float32", name="d")),
            ValueError,
            "layer d must not be quantized under weight normalization. Received: int8",
        ),
        (lambda: WeightNormalization(Layer.Dense(3), name="w").remove(), ValueError, "layer w must be built before"),
    ],
)
def test_errors(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_lora_or_quantization_after_wrapping_is_an_error(rng: np.random.Generator) -> None:
    layer, x = dense(rng)
    layer.layer.enable_lora(2)
    with pytest.raises(ValueError, match="must not have LoRA"):
        layer(x)
    layer, x = dense(rng)
    layer.layer.quantize("int8")
    with pytest.raises(ValueError, match="must not be quantized"):
        layer(x)


def test_in_an_accelerated_and_an_exported_model(rng: np.random.Generator, tmp_path: Path) -> None:
    from bnfast.keras import accelerate

    inner = WeightNormalization(Layer.Conv2D(4, 3, use_bias=False))
    model = keras.Sequential([Layer.Input((6, 6, 3)), inner, Layer.BatchNormalization(), Layer.ReLU()])
    x = rng.standard_normal((4, 6, 6, 3)).astype("float32")
    model(x, training=True)
    again = accelerate(model, verbose=False)
    np.testing.assert_allclose(again(x), model(x), rtol=1e-6, atol=1e-6)
    assert again.layers[0].initialized.numpy()
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-6, atol=1e-6)


REPLICAS = """
import keras, numpy as np, tensorflow as tf
from bnfast.keras import WeightNormalization
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x = np.random.default_rng(0).standard_normal((16, 5)).astype("float32")
for data_init in (False, True):
    with strategy.scope():
        model = keras.Sequential([keras.layers.Input((5,)), WeightNormalization(keras.layers.Dense(3), data_init)])
        model.compile("sgd", "mse")
    if data_init:
        try:
            model.fit(x, x[:, :3], verbose=0)
        except NotImplementedError as error:
            assert "data_init=True initializes from one batch" in str(error)
        else:
            raise AssertionError("nothing raised")
        with strategy.scope():
            model(x, training=True)
    before = model.layers[0].g.numpy()
    losses = model.fit(x, x[:, :3], epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and np.all(model.layers[0].g.numpy() != before)
"""


def test_replicas() -> None:
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
