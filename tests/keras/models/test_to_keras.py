"""to_keras: back to Keras's layers, with equal values, and files and exports that load without bnfast."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, BatchNormalizationAdd, accelerate, report, to_keras
from keras import layers as L
from keras_models import KERAS, data, dense_net, quiet, randomize, residual_net, same_predictions, subclassed
from needs import need_module


def wiring(model: Any) -> list[tuple[Any, str, list[str]]]:
    """Class, name and inputs of every operation."""
    return [
        (type(op), op.name, [t._keras_history.operation.name for n in op._inbound_nodes for t in n.input_tensors])
        for op in model.operations
    ]


@pytest.mark.parametrize("loaded", [False, True], ids=["direct", "from a file"])
def test_round_trip_restores_the_original(loaded: bool, tmp_path: Path) -> None:
    """Classes, names, wiring, bits of the weights, optimizer and results equal those of the original model."""
    model = residual_net(compiled=keras.optimizers.SGD(0.01, momentum=0.9))
    model.get_layer("bn2").trainable = False
    model.compile(model.optimizer, model.loss, metrics=["accuracy"])
    model.fit(*data(), verbose=0)
    fast = quiet(model)
    if loaded:
        fast.save(tmp_path / "fast.keras")
        fast = keras.models.load_model(tmp_path / "fast.keras")
    restored = to_keras(fast)
    assert wiring(restored) == wiring(model)
    assert [w.path for w in restored.trainable_weights] == [w.path for w in model.trainable_weights]
    before = model.variables + model.optimizer.variables
    after = restored.variables + restored.optimizer.variables
    assert [v.numpy().tobytes() for v in after] == [v.numpy().tobytes() for v in before]
    np.testing.assert_array_equal(restored(data()[0]), model(data()[0]))
    assert restored.evaluate(*data(), verbose=0) == model.evaluate(*data(), verbose=0)


def test_sequential_and_nested_models() -> None:
    inner = keras.Sequential([keras.Input((4,)), KERAS(name="bn"), L.LeakyReLU(0.3, name="leaky")], name="inner")
    model = randomize(keras.Sequential([keras.Input((4,)), inner, KERAS(name="bn"), L.Dense(2)], name="outer"))
    restored = to_keras(quiet(model))
    assert isinstance(restored, keras.Sequential)
    assert [type(layer) for layer in restored.layers[0].layers] == [KERAS, L.LeakyReLU]
    assert restored.layers[0].get_layer("leaky").negative_slope == pytest.approx(0.3)
    assert [w.path for w in restored.weights] == [w.path for w in model.weights]
    same_predictions(model, restored)


def test_models_built_with_our_layers() -> None:
    """No original names are known: the batch norm keeps the name, unless the layer is an output of the model."""
    inputs = keras.Input((4,))
    x = BatchNormalization(activation="relu6", name="first")(inputs)
    x = BatchNormalizationAdd(activation="tanh", name="second")([x, inputs])
    x = BatchNormalizationAdd(name="third")([x, inputs])
    model = randomize(keras.Model(inputs, BatchNormalization(activation=L.PReLU(), name="out")(x)))
    restored = to_keras(model)
    assert [layer.name for layer in restored.layers[1:]] == [
        *("first", "first_activation"),
        *("second", "second_add", "second_activation"),
        *("third", "third_add"),
        *("out_bn", "out"),
    ]
    assert restored.output_names == model.output_names == ["out"]
    assert not any(row.state != "keras" for row in report(restored).rows)
    same_predictions(model, restored)


def test_masks_reach_the_batch_norm() -> None:
    inputs = keras.Input((5, 3))
    masked = L.Masking()(inputs)
    x = L.ReLU()(L.Add()([masked, KERAS(momentum=0.5)(masked)]))
    model = randomize(keras.Model(inputs, L.LSTM(4)(x)))
    fast = quiet(model)
    assert report(fast).rows[0].state == "bnfast + add + relu"
    restored = to_keras(fast)
    x = np.random.default_rng(1).normal(size=(6, 5, 3)).astype("float32")
    x[:, 3:] = 0
    for other in (fast, restored):
        np.testing.assert_allclose(other(x, training=True), model(x, training=True), rtol=1e-4, atol=1e-5)


def test_in_place() -> None:
    model, twin = subclassed(), subclassed()
    before = [id(v) for v in model.variables]
    quiet(model, inplace=True)
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0)
    model.set_weights(twin.get_weights())
    assert to_keras(model, inplace=True) is model
    assert {type(norm) for norm in (*model.norms, *model.more.values())} == {KERAS}
    assert [id(v) for v in model.variables] == before
    assert model.norms[0].get_config() == twin.norms[0].get_config()
    x = np.ones((3, 4), "float32")
    np.testing.assert_array_equal(model(x), twin(x))
    for m in (model, twin):
        m.compile("sgd", "mse")
    assert model.train_on_batch(x, x[:, :2]) == twin.train_on_batch(x, x[:, :2])


def test_in_place_on_models_built_with_our_layers() -> None:
    model = keras.Sequential([keras.Input((6,)), BatchNormalization(fused=True), BatchNormalization()])
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    wanted = model(x)
    copied = to_keras(model)
    assert to_keras(model, inplace=True) is model
    for restored in (copied, model):
        assert [type(layer) for layer in restored.layers] == [KERAS, KERAS]
        np.testing.assert_array_equal(restored(x), copied(x))
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_in_place_changes_nothing_on_error() -> None:
    model = keras.Sequential([keras.Input((6,)), BatchNormalization(), BatchNormalization(correction=1)])
    with pytest.raises(ValueError, match="can't be copied"):
        to_keras(model, inplace=True)
    assert [type(layer) for layer in model.layers] == [BatchNormalization, BatchNormalization]


def test_fused_layers_cannot_be_restored_in_place() -> None:
    fast = quiet(residual_net())
    with pytest.raises(ValueError, match="layer relu0 has an activation or an Add fused into it"):
        to_keras(fast, inplace=True)
    assert report(fast).removed, "nothing was changed"


def test_errors() -> None:
    with pytest.raises(ValueError, match="model net has no layer of bnfast's"):
        to_keras(dense_net())
    with pytest.raises(ValueError, match=r"model block \(Block\) is neither Functional nor Sequential.*inplace=True"):
        to_keras(accelerate(subclassed(), inplace=True, verbose=False))
    with pytest.raises(TypeError, match=r"model must be a keras\.Model"):
        to_keras(BatchNormalization())


LOAD = """
import sys
sys.modules["bnfast"] = None  # an import of it fails
import keras, numpy, tensorflow
x = numpy.load("x.npy")
numpy.save("file.npy", keras.models.load_model("model.keras")(x))
exported = tensorflow.saved_model.load("exported")
numpy.save("export.npy", exported.serve(x))
"""


def test_files_and_exports_load_without_bnfast(tmp_path: Path) -> None:
    restored = to_keras(quiet(residual_net(compiled="adam")))
    x = data()[0]
    restored.save(tmp_path / "model.keras")
    restored.export(tmp_path / "exported")
    np.save(tmp_path / "x.npy", x)
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("file.npy", "export.npy"):
        np.testing.assert_allclose(np.load(tmp_path / name), restored(x), rtol=1e-5, atol=1e-6)


def test_tflite(tmp_path: Path) -> None:
    restored = to_keras(quiet(residual_net()))
    content = tf.lite.TFLiteConverter.from_keras_model(restored).convert()
    interpreter = tf.lite.Interpreter(model_content=content)
    x = data()[0][:1]
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, restored(x), rtol=1e-4, atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    onnx = need_module("onnx")
    need_module("tf2onnx")
    model = residual_net()
    model(data()[0])
    restored = to_keras(quiet(model))
    restored.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    exported = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(exported)
    x = data()[0]
    (y,) = need_module("onnx.reference").ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x})
    np.testing.assert_allclose(y, restored(x), rtol=1e-4, atol=1e-5)
