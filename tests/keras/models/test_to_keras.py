"""to_keras: back to Keras's layers, with equal values, and files and exports that load without bnfast."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import (
    BatchNormalization,
    BatchNormalizationAdd,
    LayerNormalization,
    WeightNormalization,
    report,
    save,
    to_keras,
)
from keras import layers as L
from keras_models import KERAS, Block, data, dense_net, quiet, randomize, residual_net, same_predictions, subclassed
from needs import need_module


@pytest.mark.parametrize("make", [residual_net, subclassed])
def test_round_trip_restores_the_original(make: Any) -> None:
    """Classes, names, wiring, bits of the weights, optimizer and results equal those of the original model."""
    model = make()
    x, y = data() if make is residual_net else (np.ones((4, 4), "float32"), np.ones((4, 2)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if make is residual_net else "mse"
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, KERAS)]
    norms[1].trainable = False
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    model.fit(x, y, verbose=0)
    restored = to_keras(quiet(model))
    for before, after in zip(model._flatten_layers(), restored._flatten_layers(), strict=True):
        assert type(before) is type(after)
        assert vars(before).keys() == vars(after).keys()
        if make is residual_net:
            assert before.get_config() == after.get_config()
    assert [w.path for w in restored.trainable_weights] == [w.path for w in model.trainable_weights]
    if make is residual_net:
        assert restored.to_json() == model.to_json()
    before = model.variables + model.optimizer.variables
    after = restored.variables + restored.optimizer.variables
    assert [v.numpy().tobytes() for v in after] == [v.numpy().tobytes() for v in before]
    np.testing.assert_array_equal(restored(x), model(x))
    assert restored.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)


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


def test_hand_built_layers_among_accelerated_ones() -> None:
    """The model is rebuilt: also the layers that accelerate changed become exactly Keras's."""
    inputs = keras.Input((4,))
    x = KERAS(name="bn", momentum=0.5)(L.Dense(4)(inputs))
    model = randomize(keras.Model(inputs, L.Dense(2)(BatchNormalization(activation="relu")(x))))
    fast = quiet(model)
    restored = to_keras(fast)
    kinds = [L.InputLayer, L.Dense, KERAS, KERAS, L.Activation, L.Dense]
    assert [type(layer) for layer in restored.layers] == kinds
    assert restored.get_layer("bn").get_config() == model.get_layer("bn").get_config()
    assert type(fast.get_layer("bn")) is not KERAS, "the given model is not changed"
    same_predictions(model, restored)


def test_in_place_on_models_built_with_our_layers() -> None:
    model = keras.Sequential([keras.Input((6,)), BatchNormalization(fused=False), BatchNormalization()])
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


def test_built_in_activations_and_adds_stay_in_place_and_in_subclasses() -> None:
    norm = BatchNormalization(activation="relu", name="ours")
    model = keras.Sequential([keras.Input((4,)), L.Dense(4), KERAS(), norm], name="net")
    quiet(model, inplace=True)
    kinds = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=r"layer .*ours has an activation or an Add .* not convertible in place"):
        to_keras(model, inplace=True)
    assert [type(layer) for layer in model.layers] == kinds, "nothing was changed"

    class Own(Block):
        def __init__(self) -> None:
            super().__init__()
            self.last = norm

        def call(self, x: Any, training: Any = None) -> Any:
            return self.last(super().call(x, training=training), training=training)

    norm = BatchNormalization(activation="relu", name="ours")
    model = Own()
    model(np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"block \(Own\) is neither Functional nor Sequential.*built into ours"):
        to_keras(model)


def test_errors() -> None:
    with pytest.raises(ValueError, match="model net has no layer of bnfast's"):
        to_keras(dense_net())
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


def test_a_file_of_save_opens_without_bnfast(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = keras.Input((6, 6, 3))
    y = BatchNormalizationAdd(activation="relu")([BatchNormalization()(L.Conv2D(3, 3, padding="same")(inputs)), inputs])
    model = randomize(keras.Model(inputs, LayerNormalization()(y)))
    x = np.ones((2, 6, 6, 3), "float32")
    save(model, tmp_path / "model.keras")
    assert "bnfast" not in caplog.text
    np.save(tmp_path / "x.npy", x)
    code = (
        "import keras, numpy as np, sys; m = keras.models.load_model('model.keras'); "
        "np.save('y.npy', m(np.load('x.npy'))); assert not any('bnfast' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(x), rtol=1e-5, atol=1e-5)
    assert type(model.layers[2]) is BatchNormalization, "the model stays as it is"


def test_save_refuses_what_keras_lacks(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((4,)), WeightNormalization(L.Dense(3), name="weights")])
    with pytest.raises(ValueError, match=r"without a counterpart in Keras: weights \(WeightNormalization\)"):
        save(model, tmp_path / "model.keras")
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(momentum=None)])
    with pytest.raises(ValueError, match="momentum"):
        save(model, tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def test_model_save_says_once_what_a_reader_needs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bnfast.keras.layers.reader._said", False)
    fast = quiet(residual_net())
    fast.save(tmp_path / "fast.keras")
    save(fast, tmp_path / "same.keras")
    model = keras.Sequential([keras.Input((4,)), BatchNormalization(), LayerNormalization()])
    model.save_weights(tmp_path / "model.weights.h5")
    assert not caplog.records
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.keras")
    (record,) = caplog.records
    assert "bnfast's layers (BatchNormalization): who opens it must import bnfast.keras" in record.getMessage()
    assert not any("assets" in name for name in zipfile.ZipFile(tmp_path / "model.keras").namelist())
    same_predictions(model, keras.models.load_model(tmp_path / "model.keras"))
