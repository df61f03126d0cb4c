"""fold and to_keras replace calls in a copy of the graph: what else reads it, holds it or shares it stays right."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, fold, to_keras
from keras import layers as L
from keras_models import KERAS, randomize

X = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")


def close(actual: Any, wanted: Any) -> None:
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def norm_between() -> Any:
    x = keras.Input((6,))
    h = L.ReLU(name="relu")(KERAS(name="norm")(L.Dense(5, name="dense")(x)))
    return randomize(keras.Model(x, L.Dense(2, name="head")(h), name="net"))


def test_other_models_on_the_same_tensors_in_attributes() -> None:
    model = norm_between()
    model.features = keras.Model(model.input, model.get_layer("relu").output)
    model.normalized = keras.Model(model.input, L.Dense(3, name="other")(model.get_layer("norm").output))
    folded = fold(model)
    for name in ("features", "normalized"):
        close(getattr(folded, name)(X), getattr(model, name)(X))
        assert [layer for layer in getattr(folded, name).layers if isinstance(layer, KERAS)] == []
    assert folded.features.layers[1] is folded.get_layer("dense")


def test_a_sequential_model_without_a_graph_in_an_attribute() -> None:
    model = norm_between()
    model.spare = keras.Sequential([L.Dense(2)])
    spare = fold(model).spare
    assert spare(X).shape == (4, 2)
    assert not model.spare.built


def test_new_models_on_layers_of_the_copy() -> None:
    model = norm_between()
    folded = fold(model)
    again = keras.Model(folded.input, folded.get_layer("relu").output)
    close(again(X), keras.Model(model.input, model.get_layer("relu").output)(X))
    dense = folded.get_layer("dense")
    assert [node.operation.name for node in dense._outbound_nodes] == ["relu"]


def test_attributes_lose_a_dropped_layer_in_every_format(tmp_path: Path) -> None:
    model = norm_between()
    model.norm = model.get_layer("norm")
    model.held = [model.norm, {"key": model.norm}]
    model.compile("adam", "mse")
    model.fit(X, np.zeros((4, 2)), verbose=0)
    folded = fold(model)
    assert (folded.norm, folded.held, folded.compiled) == (None, [None, {"key": None}], False)
    assert not {"optimizer", "history"} & vars(folded).keys()
    checkpoint = tf.train.Checkpoint(model=folded)
    path = checkpoint.save(tmp_path / "checkpoint")
    folded.save(tmp_path / "model.keras")
    folded.export(tmp_path / "exported", verbose=False)
    wanted = folded(X)
    close(keras.models.load_model(tmp_path / "model.keras")(X), wanted)
    exported = tf.saved_model.load(tmp_path / "exported")
    close(exported.serve(X), wanted)
    folded.set_weights([np.zeros(w.shape) for w in folded.weights])
    checkpoint.restore(path).assert_consumed()
    close(folded(X), wanted)
    folded.compile("adam", "mse")
    folded.fit(X, np.zeros((4, 2)), verbose=0)


class Tied(L.Layer):
    """Multiplies by the transposed kernel of another layer."""

    def __init__(self, dense: Any) -> None:
        super().__init__(name="tied")
        self.dense = dense

    def call(self, x: Any) -> Any:
        return x @ keras.ops.transpose(self.dense.kernel)


def test_a_kernel_that_another_layer_reads_is_not_folded_into(capsys: pytest.CaptureFixture[str]) -> None:
    x = keras.Input((6,))
    dense = L.Dense(5, name="dense")
    model = randomize(keras.Model(x, Tied(dense)(KERAS(name="norm")(dense(x)))))
    folded = fold(model)
    out = capsys.readouterr().out
    assert "1 stays, because a Dense is shared" in out
    assert folded.get_layer("tied").dense is folded.get_layer("dense")
    close(folded(X), model(X))


def test_fold_shares_a_function_that_captures_a_layer() -> None:
    outside = L.Dense(6)
    outside.build((None, 6))
    x = keras.Input((6,))
    model = randomize(keras.Model(x, KERAS()(L.Dense(4)(L.Lambda(lambda t: outside(t))(x)))))
    close(fold(model)(X), model(X))


def test_to_keras_splits_layers_with_one_activation_layer() -> None:
    """Each part has its own name; the weights stay one variable, which the optimizer knows."""
    prelu, x = L.PReLU(), keras.Input((6,))
    h = L.Dense(6, name="dense")(BatchNormalization(activation=prelu, name="a")(x))
    model = randomize(keras.Model(x, BatchNormalizationAdd(activation=prelu, name="b")([h, x])))
    model.compile("adam", "mse")
    model.fit(X, X, epochs=2, verbose=0)
    restored = to_keras(model)
    names = ["a", "a_activation", "dense", "b_bn", "b_add", "b"]
    assert [layer.name for layer in restored.layers if not isinstance(layer, L.InputLayer)] == names
    assert restored.get_layer("b").alpha is restored.get_layer("a_activation").alpha
    for each in (model, restored):
        each.fit(X, X, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(restored(X), model(X), rtol=1e-3, atol=1e-3)


def test_to_keras_keeps_an_attribute_that_holds_a_split_layer(tmp_path: Path) -> None:
    x = keras.Input((6,))
    model = randomize(keras.Model(x, BatchNormalizationAdd(activation="relu", name="ours")([L.Dense(6)(x), x])))
    model.norm = model.get_layer("ours")
    restored = to_keras(model)
    assert restored.norm is restored.get_layer("ours_bn")
    assert type(restored.norm) is KERAS
    assert [w.path for w in restored.norm.weights][:2] == ["ours_bn/gamma", "ours_bn/beta"]
    assert restored.norm.get_build_config() == {"input_shape": (None, 6)}
    restored.save(tmp_path / "model.keras")
    close(keras.models.load_model(tmp_path / "model.keras")(X), model(X))
