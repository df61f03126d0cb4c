"""Where TensorFlow sees a GPU (a substituted device list): layers run TensorFlow's own ops, and XLA stays on."""

import logging
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import (
    BatchNormalization,
    GroupNormalization,
    InstanceNormalization,
    LayerNormalization,
    accelerate,
    patch,
    report,
    unpatch,
    uses_bnfast,
)
from bnfast.keras.models.patch import summary
from bnfast.tensorflow import op
from keras import layers as L
from keras_models import data, quiet, residual_net, same_steps, states

pytestmark = pytest.mark.usefixtures("gpu")
KERNEL_OPS = {"BnfastTrain", "BnfastInfer", "BnfastGrad", "PyFuncStateless"}
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"axis": 1},
    {"axis": [1, 2]},
    {"activation": "relu"},
    {"momentum": None, "correction": 1},
    {"renorm": True},
    {"virtual_batch_size": 2},
    {"use_batch_statistics": True, "update_statistics": False},
]


def operations(function: Any, *arguments: Any) -> set[str]:
    """The types of all ops of a traced function, its inner functions included."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    types = {operation.type for operation in graph.get_operations()}
    for inner in graph.as_graph_def().library.function:
        types |= {node.op for node in inner.node_def}
    return types


@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
def test_a_layer_trains_as_on_the_kernels_without_their_ops(kwargs: dict[str, Any], rng: np.random.Generator) -> None:
    x = rng.normal(1, 2, (6, 5, 4, 3)).astype("float32")
    results = []
    for bridge in ("auto", "op"):
        layer = BatchNormalization(**kwargs, bridge=bridge)
        layer.build(x.shape)
        assert layer.supports_jit == (bridge == "auto")

        def run(x: Any, layer: Any = layer) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
                loss = tf.reduce_sum(y * tf.reshape(tf.sin(tf.range(tf.size(y), dtype=y.dtype)), y.shape))
            return [y, *tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])]

        found = operations(run, tf.constant(x)) & KERNEL_OPS
        assert bool(found) == (bridge == "op")
        results.append([np.asarray(value) for value in [*run(tf.constant(x)), *layer.weights]])
    for ours, kernels in zip(*results, strict=True):
        np.testing.assert_allclose(ours, kernels, rtol=1e-4, atol=1e-4)


def test_xla_compiles_a_model_that_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bnfast"):
        model = keras.Sequential(
            [keras.Input((8, 8, 3)), L.Conv2D(4, 3), BatchNormalization(), GroupNormalization(2), LayerNormalization(),
             InstanceNormalization(), L.GlobalAveragePooling2D(), L.Dense(2)]
        )  # fmt: skip
        model.compile("sgd", "mse", jit_compile=True)
        x = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")
        before = model.layers[1].moving_mean.numpy()
        history = model.fit(x, np.ones((8, 2), "float32"), batch_size=4, epochs=3, verbose=0)
    assert model.jit_compile is True
    losses = history.history["loss"]
    assert losses[-1] < losses[0]
    assert np.abs(model.layers[1].moving_mean.numpy() - before).max() > 0
    assert [record.getMessage() for record in caplog.records if record.name == "bnfast"] == [
        f"bnfast.keras leaves batch norm to TensorFlow's own ops, because {op.GPU_REASON}"
    ]


def test_accelerate_leaves_the_layers_kerass_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = residual_net()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=True)
    with caplog.at_level(logging.INFO, "bnfast"):
        fast = quiet(model)
    assert set(states(fast).values()) == {"keras"}
    assert {row.reason for row in report(fast).rows} == {op.GPU_REASON}
    assert len(caplog.records) == 1
    assert fast.jit_compile is True
    assert all(layer.supports_jit for layer in fast.layers)
    with pytest.raises(ValueError, match="stays on Keras's layer: TensorFlow sees a GPU"):
        accelerate(model, strict=True)


@pytest.mark.parametrize("bridge", ["op", "numpy_function", "tensorflow"])
def test_a_bridge_that_is_asked_for_obeys(bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same_steps(quiet(residual_net("float64"), bridge=bridge), residual_net("float64"), data("float64")[0])
    fast = quiet(residual_net(), bridge=bridge)
    assert {(row.state, row.bridge) for row in report(fast).rows} == {("bnfast", bridge)}
    assert all(layer.supports_jit == (bridge == "tensorflow") for layer in fast.layers if uses_bnfast_norm(layer))
    monkeypatch.setenv("BNFAST_BRIDGE", bridge)
    assert {(row.state, row.bridge) for row in report(quiet(residual_net())).rows} == {("bnfast", bridge)}


def uses_bnfast_norm(layer: Any) -> bool:
    return isinstance(layer, L.BatchNormalization) and uses_bnfast(layer)


def test_layers_made_under_a_patch_run_tensorflows_ops() -> None:
    with patch():
        layer = keras.layers.BatchNormalization(name="on_tensorflow")
    try:
        layer.build((None, 3))
        assert layer.supports_jit
        x = tf.constant([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
        assert not operations(lambda x: layer(x, training=True), x) & KERNEL_OPS
        layer(x, training=True)
        assert "trained on TensorFlow's own ops" in summary()
    finally:
        unpatch()
