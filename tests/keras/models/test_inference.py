"""Inference of accelerated and patched models: folded while traced, exact gradients, exports that need no bnfast."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization, accelerate, patch
from bnfast.tensorflow import op
from graph_operations import live
from keras import layers as L
from keras_models import data, quiet, randomize, residual_net
from needs import need_module

IMAGE = (8, 8, 4)
PRODUCTS: dict[str, Callable[[], Any]] = {
    "conv": lambda: L.Conv2D(6, 3, padding="same"),
    "strides": lambda: L.Conv2D(6, 3, strides=2, use_bias=False),
    "dilation": lambda: L.Conv2D(6, 3, dilation_rate=2),
    "groups": lambda: L.Conv2D(6, 3, groups=2),
    "depthwise": lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
    "separable": lambda: L.SeparableConv2D(6, 3, use_bias=False),
    "transpose": lambda: L.Conv2DTranspose(6, 3),
    "dense": lambda: L.Dense(6),
    "activation": lambda: L.Conv2D(6, 3, activation="relu"),
    "regularizer": lambda: L.Conv2D(6, 3, activity_regularizer="l2"),
}
FOLDED = ("conv", "strides", "depthwise", "separable")  # the regularizer reads the product, too


def network(product: Any, shape: tuple[int, ...] = IMAGE, **norm: Any) -> Any:
    inputs = keras.Input(shape)
    x = L.BatchNormalization(**norm)(product(inputs))
    return randomize(keras.Model(inputs, L.ReLU()(x)))


def batch(model: Any) -> Any:
    return tf.constant(np.random.default_rng(3).normal(size=(3, *model.input_shape[1:])), model.inputs[0].dtype)


def graph_of(model: Any) -> Any:
    function = tf.function(lambda x: model(x, training=False))
    return function.get_concrete_function(tf.TensorSpec([None, *model.input_shape[1:]], model.inputs[0].dtype)).graph


def values_and_gradients(model: Any, product: Any) -> list[np.ndarray]:
    both = keras.Model(model.inputs, [product.output, model.output])
    norm = next(layer for layer in model.layers if isinstance(layer, L.BatchNormalization))
    weights = [variable.value for variable in (*product.trainable_variables, *norm.variables)]

    @tf.function
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, *weights])
            between, y = both(x, training=False)
            loss = tf.reduce_sum(tf.sin(y))
        return [between, y, *tape.gradient(loss, [x, between, *weights])]

    return [np.asarray(value) for value in run(batch(model))]


@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients_equal_keras(name: str, float64: None) -> None:
    product = PRODUCTS[name]()
    model = network(product)
    wanted = values_and_gradients(model, product)
    folded = accelerate(model, inplace=True, verbose=False)
    for a, b in zip(values_and_gradients(folded, product), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", PRODUCTS)
def test_which_products_are_folded(name: str) -> None:
    types = [op.type for op in graph_of(quiet(network(PRODUCTS[name]()))).get_operations()]
    kernels = sum(kind in ("Conv2D", "DepthwiseConv2dNative") for kind in types)
    once = {"separable": 2, "dense": 0, "transpose": 0, "groups": 0}.get(
        name, 1
    )  # groups: inside a function of Keras's
    assert kernels == once + (name in FOLDED)


@pytest.mark.parametrize("case", ["vector", "half", "other axis", "no scale", "no center", "mask"])
def test_other_forms(case: str) -> None:
    """Dense on vectors folds; a half type and another axis don't; all equal Keras's values."""
    shape, norm = {"vector": (4,), "other axis": (6, 6, 6)}.get(case, IMAGE), {}
    product: Any = L.Dense(6) if case == "vector" else L.Conv2D(6, 3, padding="same")
    if case == "half":
        product, norm = L.Conv2D(6, 3, dtype="mixed_float16"), {"dtype": "mixed_float16"}
    if case == "other axis":
        norm = {"axis": 1}
    if case in ("no scale", "no center"):
        norm = {case[3:]: False}
    model = network(product, shape, **norm)
    x, tolerance = batch(model), 5e-3 if case == "half" else 1e-5
    wanted, fast = model.predict(x, verbose=0), quiet(model)
    np.testing.assert_allclose(fast.predict(x, verbose=0), wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(fast(x), model(x), rtol=tolerance, atol=tolerance)


def test_new_weights_are_seen_without_a_new_trace() -> None:
    """The kernel is scaled when the graph runs: weights that change between two predictions count."""
    model = network(L.Conv2D(6, 3))
    fast, x = quiet(model), batch(model)
    fast.predict(x, verbose=0)
    for each in (model, fast):
        each.set_weights([weight * 1.5 for weight in model.get_weights()] if each is fast else each.get_weights())
    model.set_weights(fast.get_weights())
    np.testing.assert_allclose(fast.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_frozen_batch_norms_in_training() -> None:
    """Fine-tuning: the batch norms are frozen, the convolutions train."""
    x, y = data()
    models = residual_net(), quiet(residual_net())
    for model in models:
        for layer in model.layers:
            layer.trainable = not isinstance(layer, L.BatchNormalization)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = [[float(model.train_on_batch(x, y)) for _ in range(4)] for model in models]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_evaluate_equals_keras() -> None:
    x, y = data()
    keras_model = residual_net(compiled="sgd")
    fast = quiet(keras_model)
    np.testing.assert_allclose(fast.evaluate(x, y, verbose=0), keras_model.evaluate(x, y, verbose=0), rtol=1e-5)


def preactivated(norm: Any = L.BatchNormalization, add: bool = True, **kwargs: Any) -> Any:
    """A batch norm before its convolution: nothing to fold it into, as in DenseNet and ResNetV2."""
    inputs = keras.Input(IMAGE)
    x = norm(**kwargs)(L.MaxPooling2D(1)(inputs))
    x = L.ReLU()(L.Add()([inputs, x]) if add else x)
    return randomize(keras.Model(inputs, L.Dense(2)(L.Conv2D(3, 3, padding="same")(x))))


@pytest.mark.parametrize("add", [False, True])
def test_predict_is_one_pass_where_nothing_can_be_folded(add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalization, sum and ReLU are one op of bnfast's in predict and evaluate, and only on the op's bridge."""
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    model = preactivated(add=add)
    model.compile(loss="mse")
    fast, x = quiet(model), batch(model)
    emitted = []
    monkeypatch.setattr(op, "infer", lambda *args, own=op.infer: emitted.append(args) or own(*args))
    np.testing.assert_allclose(fast.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)
    found = live(*fast.predict_function._list_all_concrete_functions())
    assert found.count("BnfastInfer") == 1
    assert not {"Relu", "AddV2", "FusedBatchNormV3"} & set(found)
    y, before = np.zeros(model.compute_output_shape(x.shape)), len(emitted)
    np.testing.assert_allclose(fast.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0), rtol=1e-5)
    assert len(emitted) == 2 * before  # evaluate as predict; what follows must not emit any
    graph_of(fast)
    fast(x)
    fast.fit(x, y, verbose=0)
    monkeypatch.setenv("BNFAST_BRIDGE", "numpy_function")
    fast.make_predict_function(force=True)
    fast.predict(x, verbose=0)
    assert len(emitted) == 2 * before


def test_predict_of_a_patched_model_and_of_a_layer_with_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    reference = preactivated()
    with patch():
        patched = preactivated(norm=keras.layers.BatchNormalization)
    own = preactivated(norm=BatchNormalization, activation="relu", add=False)
    plain = preactivated(add=False)
    x = batch(reference)
    for model, wanted in ((patched, reference), (own, plain)):
        np.testing.assert_allclose(model.predict(x, verbose=0), wanted.predict(x, verbose=0), rtol=1e-5, atol=1e-5)
        assert live(*model.predict_function._list_all_concrete_functions()).count("BnfastInfer") == 1


def test_predict_with_steps_per_execution_eagerly_and_with_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    model = preactivated()
    x = np.concatenate([batch(model)] * 5)
    wanted = model.predict(x, verbose=0)
    for kwargs in ({"steps_per_execution": 3}, {"run_eagerly": True}, {"jit_compile": True}):
        fast = quiet(model)
        fast.compile(loss="mse", **kwargs)
        np.testing.assert_allclose(fast.predict(x, batch_size=2, verbose=0), wanted, rtol=1e-5, atol=1e-5)


class Either(L.Layer):
    """Runs its batch norm in a branch."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def call(self, x: Any) -> Any:
        return tf.cond(tf.reduce_sum(x) > 0, lambda: self.norm(x), lambda: -self.norm(-x))


def test_predict_with_a_batch_norm_in_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    inputs = keras.Input((6, 4))
    model = randomize(keras.Model(inputs, Either(BatchNormalization())(inputs)))
    x = np.random.default_rng(3).normal(size=(5, 6, 4)).astype("float32")
    for given in (x, -x):
        np.testing.assert_allclose(model.predict(given, verbose=0), model(given), rtol=1e-5, atol=1e-5)
    (concrete,) = model.predict_function._list_all_concrete_functions()
    branches = [
        [node.op for node in function.node_def]
        for function in concrete.graph.as_graph_def().library.function
        if "cond_" in function.signature.name
    ]
    assert [operations.count("BnfastInfer") for operations in branches] == [1, 1]


@pytest.mark.parametrize("kwargs", [{}, {"transpose_a": True}, {"transpose_b": True}], ids=str)
def test_a_product_with_a_transposed_matrix_is_not_folded(kwargs: dict[str, bool]) -> None:
    layer = BatchNormalization()
    layer.build((4, 4))
    randomize(layer)
    x, kernel = tf.constant(np.random.default_rng(3).normal(size=(2, 4, 4)), tf.float32)

    @tf.function
    def run(x: Any) -> Any:
        return layer(tf.linalg.matmul(x, kernel, **kwargs))

    np.testing.assert_allclose(run(x), layer(tf.linalg.matmul(x, kernel, **kwargs)), rtol=1e-5, atol=1e-5)
    assert ("BiasAdd" in live(run.get_concrete_function(x))) == (not kwargs)


def test_the_predict_function_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    model = quiet(preactivated())
    x = batch(model)
    wanted, own = model.predict(x, verbose=0), model.predict_function
    model.predict_function = copy.copy(own)
    assert model.predict_function is not own
    np.testing.assert_array_equal(model.predict(x, verbose=0), wanted)
    assert model.predict_function._list_all_concrete_functions() == own._list_all_concrete_functions()


def test_new_moving_statistics_are_seen_by_predict() -> None:
    model = preactivated()
    fast, x = quiet(model), batch(model)
    fast.predict(x, verbose=0)
    for each in (model, fast):
        each.layers[2].moving_mean.assign_add(tf.ones(4))
        each.layers[2].gamma.assign(-each.layers[2].gamma)
    np.testing.assert_allclose(fast.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_a_gradient_inside_of_test_step(float64: None) -> None:
    class Penalized(keras.Model):
        def test_step(self, given: Any) -> Any:
            x = keras.utils.unpack_x_y_sample_weight(given)[0]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = self(x, training=False)
            return {"penalty": tf.reduce_sum(tape.gradient(y, x) ** 2)}

    model = preactivated()
    penalized = Penalized(model.inputs, model.outputs)
    penalized.compile()
    fast, x = quiet(penalized), batch(model)
    wanted = penalized.evaluate(x, verbose=0, return_dict=True)
    actual = fast.evaluate(x, verbose=0, return_dict=True)
    np.testing.assert_allclose(actual["penalty"], wanted["penalty"], rtol=1e-9)


def test_no_gradient_of_the_moving_statistics_through_the_fused_op() -> None:
    """TensorFlow's fused op has none. Nobody trains them; docs/differences.md says so."""
    layer = BatchNormalization()
    layer.build((None, *IMAGE))
    with tf.GradientTape() as tape:
        tape.watch(layer.moving_mean.value)
        y = tf.reduce_sum(layer(tf.ones((2, *IMAGE))))
    assert tape.gradient(y, layer.moving_mean.value) is None


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("product", [None, "conv"])
def test_forward_mode(product: str | None, graph: bool) -> None:
    inputs = keras.Input(IMAGE)
    x = PRODUCTS[product]()(inputs) if product else inputs
    x = L.BatchNormalization()(x)
    model = randomize(keras.Model(inputs, x if product else L.Add()([x, inputs])))

    def jvp(model: Any) -> np.ndarray:
        x = batch(model)

        def run() -> Any:
            with tf.autodiff.ForwardAccumulator(x, tf.cos(x)) as accumulator:
                y = model(x, training=False)
            return accumulator.jvp(y)

        return np.asarray((tf.function(run) if graph else run)())

    np.testing.assert_allclose(jvp(quiet(model)), jvp(model), rtol=1e-4, atol=1e-5)


LOAD = """
import sys
sys.modules["bnfast"] = None  # an import of it fails
import keras, numpy, tensorflow
x = numpy.load("x.npy")
numpy.save("keras.npy", keras.models.load_model("model.keras")(x))
exported = tensorflow.saved_model.load("exported")
numpy.save("export.npy", exported.serve(x))
"""


def trained() -> Any:
    model = quiet(residual_net(compiled="adam"))
    model.fit(*data(), validation_data=data(), epochs=1, verbose=0)
    model.predict(data()[0], verbose=0)
    return model


def test_files_and_exports_of_a_trained_model_load_without_bnfast(tmp_path: Path) -> None:
    model, x = trained(), data()[0]
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "exported", verbose=False)
    np.save(tmp_path / "x.npy", x)
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    for name in ("keras.npy", "export.npy"):
        np.testing.assert_allclose(np.load(tmp_path / name), model(x), rtol=1e-4, atol=1e-5)


def test_tflite_of_a_trained_model() -> None:
    model, x = trained(), data()[0][:1]
    interpreter = tf.lite.Interpreter(model_content=tf.lite.TFLiteConverter.from_keras_model(model).convert())
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    y = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)


def test_onnx_of_a_trained_model(tmp_path: Path) -> None:
    onnx = need_module("onnx")
    need_module("tf2onnx")
    model, x = trained(), data()[0]
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    exported = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(exported)
    (y,) = need_module("onnx.reference").ReferenceEvaluator(exported).run(None, {exported.graph.input[0].name: x})
    np.testing.assert_allclose(y, model(x), rtol=1e-4, atol=1e-5)
