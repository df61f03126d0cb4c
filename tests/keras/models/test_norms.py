"""Layer, group and instance normalization in models: training, configs, files, exports, and back to Keras's layers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import GroupNormalization, InstanceNormalization, LayerNormalization, to_keras
from bnfast.tensorflow import group_norm
from keras import layers as L
from norms_cases import assert_close, force_implementation, theirs


@pytest.fixture(params=["ops", "kernels"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from force_implementation(request.param, monkeypatch)


def model_of(group: Any, instance: Any, layer: Any) -> Any:
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(8, 3, name="conv")(inputs)
    x = group(groups=4, name="group")(x)
    x = instance(name="instance")(x)
    x = layer(axis=[1, 2], name="layer", scale=False)(x)
    return keras.Model(inputs, L.Dense(2, name="head")(L.Flatten()(x)), name="model")


def models(dtype: str = "float64") -> tuple[Any, Any]:
    """Our model and Keras's, with equal weights."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        ours = model_of(GroupNormalization, InstanceNormalization, LayerNormalization)
        keras_model = model_of(
            L.GroupNormalization, lambda **kwargs: L.GroupNormalization(-1, **kwargs), L.LayerNormalization
        )
    finally:
        keras.config.set_dtype_policy(before)
    rng = np.random.default_rng(5)
    ours.set_weights([rng.uniform(0.05, 0.15, w.shape) for w in ours.get_weights()])  # SGD diverges with larger weights
    keras_model.set_weights(ours.get_weights())
    return ours, keras_model


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(6)
    return rng.normal(size=(10, 6, 6, 3)), rng.normal(size=(10, 2))


def test_fit(implementation: str) -> None:
    """Three batches, the last one smaller: losses and all weights equal Keras's."""
    trained = []
    for model in models():
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
        losses = model.fit(*data(), batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        trained.append([np.asarray(losses), *model.get_weights(), model.predict(data()[0], verbose=0)])
    assert_close(*trained, 1e-9)


def test_mixed_precision_fit(implementation: str) -> None:
    model, _ = models("mixed_float16")
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.001), initial_scale=64), "mse")
    losses = model.fit(*data(), epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert {weight.dtype for weight in model.weights} == {"float32"}


ARGUMENTS: dict[str, Any] = {
    "axis": 1,
    "epsilon": 1e-5,
    "center": True,
    "scale": False,
    "beta_initializer": keras.initializers.Constant(0.5),
    "gamma_initializer": "random_uniform",
    "beta_regularizer": "l1",
    "gamma_regularizer": keras.regularizers.L2(0.25),
    "beta_constraint": "non_neg",
    "gamma_constraint": keras.constraints.MaxNorm(3.0),
    "name": "norm",
    "dtype": "mixed_float16",
}


@pytest.mark.parametrize("kind", [LayerNormalization, GroupNormalization, InstanceNormalization])
def test_configs(kind: Any) -> None:
    kwargs = {**ARGUMENTS, **({"groups": 3} if kind is GroupNormalization else {})}
    ours, other = kind(**kwargs), theirs(kind, kwargs).get_config()
    wanted = {name: value for name, value in other.items() if kind is not InstanceNormalization or name != "groups"}
    assert ours.get_config() == wanted
    text = json.dumps(keras.saving.serialize_keras_object(ours))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is kind
    assert again.get_config() == wanted
    assert kind.from_config(other).get_config() == wanted  # TensorFlow Addons' InstanceNormalization also writes groups
    assert keras.saving.get_registered_name(kind) == f"bnfast>{kind.__name__}"


def test_files(tmp_path: Path) -> None:
    ours, keras_model = models()
    ours.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in ours.layers]
    assert [w.path for w in loaded.weights] == [w.path for w in keras_model.weights]
    np.testing.assert_array_equal(loaded(data()[0]), ours(data()[0]))


def test_files_of_keras(tmp_path: Path) -> None:
    """Weights load both ways. (Files name layers by class; for Keras an instance norm is a group norm.)"""
    ours, keras_model = (
        keras.Sequential([keras.Input((4, 6)), group(3, beta_initializer="ones"), layer(gamma_initializer="ones")])
        for group, layer in ((GroupNormalization, LayerNormalization), (L.GroupNormalization, L.LayerNormalization))
    )
    for source, target in ((ours, keras_model), (keras_model, ours)):
        source.set_weights([np.full(w.shape, i + 1.5) for i, w in enumerate(source.weights)])
        source.save_weights(tmp_path / "model.weights.h5")
        target.set_weights([0 * w for w in target.get_weights()])
        target.load_weights(tmp_path / "model.weights.h5")
        for one, other in zip(source.get_weights(), target.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_inference_is_made_of_tensorflows_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_norm, "SMALL_BYTES", 0)
    ours, keras_model = models("float32")
    x = tf.constant(data()[0], tf.float32)
    ours.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    graph = exported.signatures["serving_default"].graph.as_graph_def()
    kinds = {node.op for function in graph.library.function for node in function.node_def}
    assert "Rsqrt" in kinds
    assert not [kind for kind in kinds if "PyFunc" in kind]
    assert_close([exported.serve(x)], [keras_model(x)], 1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_to_keras(inplace: bool) -> None:
    ours, keras_model = models()
    ours.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    ours.fit(*data(), verbose=0)
    keras_model.set_weights(ours.get_weights())
    back = to_keras(ours, inplace=inplace)
    assert (back is ours) == inplace
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in keras_model.layers]
    assert [w.path for w in back.weights] == [w.path for w in keras_model.weights]
    assert "bnfast" not in back.to_json()
    np.testing.assert_array_equal(back(data()[0], training=True), keras_model(data()[0], training=True))
    assert back.get_layer("instance").groups == 8
    assert back.get_layer("layer").supports_jit
    keras_model.compile(keras.optimizers.SGD(0.01), "mse")
    back.compile(keras.optimizers.SGD(0.01), "mse")
    assert back.train_on_batch(*data()) == pytest.approx(keras_model.train_on_batch(*data()))


def test_to_keras_drops_the_training_argument() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, LayerNormalization(name="norm")(inputs, training=True))
    x = np.random.default_rng(1).normal(size=(3, 4)).astype("float32")
    np.testing.assert_allclose(to_keras(model)(x), model(x), rtol=1e-5, atol=1e-6)
