"""Configs, weights and files, in both directions between Keras's layer and ours; exports load without bnfast."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import BatchNormalization

ARGUMENTS: dict[str, Any] = {
    "axis": 1,
    "momentum": 0.9,
    "epsilon": 1e-5,
    "center": True,
    "scale": True,
    "beta_initializer": keras.initializers.Constant(0.5),
    "gamma_initializer": "random_uniform",
    "moving_mean_initializer": "ones",
    "moving_variance_initializer": keras.initializers.Constant(2.0),
    "beta_regularizer": "l1",
    "gamma_regularizer": keras.regularizers.L2(0.25),
    "beta_constraint": "non_neg",
    "gamma_constraint": keras.constraints.MaxNorm(3.0),
    "name": "norm",
    "dtype": "float64",
}


def model_of(kind: Any, **kwargs: Any) -> Any:
    layers = [
        keras.layers.Input((6, 6, 3)),
        keras.layers.Conv2D(4, 3, name="conv"),
        kind(name="norm", **kwargs),
        keras.layers.Flatten(),
        keras.layers.Dense(2, name="head"),
    ]
    model = keras.Sequential(layers, name="model")
    rng = np.random.default_rng(5)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


def test_every_keras_argument_round_trips() -> None:
    ours, theirs = BatchNormalization(**ARGUMENTS), keras.layers.BatchNormalization(**ARGUMENTS)
    assert ours.get_config() == {**theirs.get_config(), "activation": "linear"}
    text = json.dumps(keras.saving.serialize_keras_object(ours))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is BatchNormalization
    assert again.get_config() == ours.get_config()


def test_registered_under_its_package() -> None:
    assert keras.saving.get_registered_name(BatchNormalization) == "bnfast>BatchNormalization"


def test_a_config_of_keras_loads() -> None:
    config = keras.layers.BatchNormalization(**ARGUMENTS).get_config()
    assert BatchNormalization.from_config(config).get_config() == {**config, "activation": "linear"}
    old = {k: v for k, v in config.items() if not k.startswith("renorm")} | {"axis": [1]}  # Keras 2 wrote a list
    assert BatchNormalization.from_config(old).axis == 1


@keras.saving.register_keras_serializable(package="bnfast_tests")
def doubled(x: Any) -> Any:
    return 2 * x


@pytest.mark.parametrize(
    "activation",
    [
        None,
        "relu",
        "relu6",
        "leaky_relu",
        "swish",
        keras.activations.relu,
        keras.activations.gelu,
        doubled,
        keras.layers.ReLU(),
        keras.layers.ReLU(max_value=3.0, negative_slope=0.1),
        keras.layers.LeakyReLU(0.3),
        keras.layers.Activation("tanh"),
        keras.layers.PReLU(),
    ],
    ids=lambda a: getattr(a, "__name__", None) or getattr(a, "name", None) or str(a),
)
def test_activations_round_trip(activation: Any, tmp_path: Path, rng: np.random.Generator) -> None:
    model = model_of(BatchNormalization, activation=activation)
    x = rng.normal(size=(5, 6, 6, 3)).astype("float32")
    again = keras.models.model_from_json(model.to_json())
    again.set_weights(model.get_weights())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    wanted = model(x, training=False).numpy()
    for copy in (again, loaded):
        assert type(copy.get_layer("norm")) is BatchNormalization
        configs = [json.dumps(each.get_layer("norm").get_config()) for each in (copy, model)]  # JSON has no tuples
        assert configs[0] == configs[1]
        assert np.array_equal(copy(x, training=False).numpy(), wanted)


@pytest.mark.parametrize("kwargs", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}])
@pytest.mark.parametrize("source", ["ours", "keras"])
def test_weights_load_both_ways(source: str, kwargs: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    kinds = {"ours": BatchNormalization, "keras": keras.layers.BatchNormalization}
    first = model_of(kinds.pop(source), **kwargs)
    second = model_of(next(iter(kinds.values())), **kwargs)
    assert [w.path for w in first.weights] == [w.path for w in second.weights]
    assert [w.dtype for w in first.weights] == [w.dtype for w in second.weights]
    second.set_weights([np.zeros(w.shape) for w in second.weights])
    first.save_weights(tmp_path / "model.weights.h5")
    second.load_weights(tmp_path / "model.weights.h5")
    x = rng.normal(size=(5, 6, 6, 3)).astype("float32")
    np.testing.assert_allclose(first.predict(x, verbose=0), second.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_a_model_of_keras_loads_with_our_layer(rng: np.random.Generator) -> None:
    theirs = model_of(keras.layers.BatchNormalization, momentum=0.8)
    config = json.loads(theirs.to_json())
    with keras.saving.custom_object_scope({"BatchNormalization": BatchNormalization}):
        clone = keras.models.clone_model(theirs, clone_function=_ours)
    assert config["class_name"] == "Sequential"
    clone.set_weights(theirs.get_weights())
    x = rng.normal(size=(5, 6, 6, 3)).astype("float32")
    assert type(clone.get_layer("norm")) is BatchNormalization
    np.testing.assert_allclose(clone.predict(x, verbose=0), theirs.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def _ours(layer: Any) -> Any:
    kind = BatchNormalization if type(layer) is keras.layers.BatchNormalization else type(layer)
    return kind.from_config(layer.get_config())


@pytest.mark.usefixtures("each_bridge")
def test_optimizer_state_and_training_continue_after_loading(tmp_path: Path, rng: np.random.Generator) -> None:
    x, t = rng.normal(size=(16, 6, 6, 3)).astype("float32"), rng.normal(size=(16, 2)).astype("float32")
    model = model_of(BatchNormalization, activation="relu")
    model.compile("adam", "mse")
    model.train_on_batch(x, t)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.train_on_batch(x, t)
    for actual, wanted in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-7)


RELOAD = """
import sys
sys.modules["bnfast"] = None  # any import of it fails
import numpy as np, tensorflow as tf
folder = sys.argv[1]
model = tf.saved_model.load(folder + "/model")
np.save(folder + "/y.npy", model.serve(np.load(folder + "/x.npy")).numpy())
"""


@pytest.mark.usefixtures("each_bridge")
def test_an_exported_model_serves_without_bnfast(tmp_path: Path, rng: np.random.Generator) -> None:
    """4-D channels_last (TensorFlow's fused op), another axis and rank (plain ops), fused and separate activations."""
    inputs = keras.layers.Input((8, 8, 3))
    y = BatchNormalization(activation="relu")(keras.layers.Conv2D(4, 3)(inputs))
    y = BatchNormalization(axis=1, activation="leaky_relu")(y)
    y = BatchNormalization(dtype="mixed_float16", activation="relu6")(y)
    y = BatchNormalization(activation="gelu")(keras.layers.Flatten()(y))
    model = keras.Model(inputs, keras.layers.Dense(2)(y))
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((16, 2)), verbose=0)
    model.export(tmp_path / "model", verbose=False)
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
