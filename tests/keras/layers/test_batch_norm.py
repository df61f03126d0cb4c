"""bnfast.keras.BatchNormalization against Keras's layer: values, flags, dtypes, activations; argument errors."""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import keras
import tensorflow as tf
from bnfast.keras import BatchNormalization

SHAPES = [(8, 5), (4, 6, 5), (3, 4, 2, 5), (2, 3, 2, 2, 5)]


def pair(shape: tuple[int, ...], **kwargs: Any) -> tuple[Any, Any]:
    """Our layer and Keras's with the same random weights. Only ours has an `activation`."""
    ours = BatchNormalization(**kwargs)
    kwargs.pop("activation", None)
    theirs = keras.layers.BatchNormalization(**kwargs)
    rng = np.random.default_rng(7)
    for layer in (ours, theirs):
        layer.build(shape)
    ours.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in ours.weights])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def close(actual: Any, wanted: Any, tolerance: float = 2e-6) -> None:
    actual, wanted = (np.asarray(tf.cast(t, tf.float64)) for t in (actual, wanted))
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


def same_state(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    for actual, wanted in zip(ours.weights, theirs.weights, strict=True):
        assert (actual.name, actual.dtype, actual.shape) == (wanted.name, wanted.dtype, wanted.shape)
        close(actual, wanted, tolerance)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_training_and_inference_equal_keras(
    shape: tuple[int, ...], scale: bool, center: bool, rng: np.random.Generator
) -> None:
    for axis in {1, -1, len(shape) - 2} - {0}:
        ours, theirs = pair(shape, axis=axis, scale=scale, center=center, momentum=0.7, epsilon=1e-2)
        for _ in range(3):
            x = tf.constant(rng.normal(3, 2, shape), "float32")
            close(ours(x, training=True), theirs(x, training=True))
            same_state(ours, theirs)
            close(ours(x, training=False), theirs(x, training=False))
        same_state(ours, theirs)


FLAGS = {
    "absent": ({}, False),
    "None": ({"training": None}, False),
    "False": ({"training": False}, False),
    "True": ({"training": True}, True),
    "0": ({"training": 0}, False),
    "1": ({"training": 1}, True),
    "numpy": ({"training": np.bool_(True)}, True),
}


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("flag", FLAGS)
def test_training_flags(flag: str, graph: bool, rng: np.random.Generator) -> None:
    kwargs, trains = FLAGS[flag]
    x = tf.constant(rng.normal(3, 2, (6, 4)), "float32")
    ours, theirs = pair((6, 4))
    run = tf.function(lambda x: ours(x, **kwargs)) if graph else lambda x: ours(x, **kwargs)
    close(run(x), theirs(x, training=trains))
    same_state(ours, theirs)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("value", [False, True])
def test_training_as_a_tensor(value: bool, graph: bool, rng: np.random.Generator) -> None:
    """One graph with both branches, including gradients and a mask."""
    x = tf.constant(rng.normal(3, 2, (6, 3, 4)), "float32")
    mask = tf.constant(rng.random((6, 3)) < 0.5)
    masked = keras.layers.Masking()  # only the mask it attaches is used

    def step(layer: Any, x: Any, training: Any, mask: Any = None) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=training, mask=mask)
            loss = tf.reduce_sum(tf.sin(y))
        assert y.shape == (6, 3, 4)
        return [y, *tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])]

    for given in (None, mask):
        ours, theirs = pair((6, 3, 4))
        run = tf.function(step) if graph else step
        for actual, wanted in zip(run(ours, x, tf.constant(value), given), step(theirs, x, value, given), strict=True):
            close(actual, wanted, 5e-6)
        same_state(ours, theirs)
    hole = tf.concat([x[:, :1], tf.zeros_like(x[:, :1]), x[:, 2:]], 1)  # with an implicit mask
    ours, theirs = pair((6, 3, 4))
    run = tf.function(lambda x, t: ours(masked(x), training=t))
    close(run(hole, tf.constant(value)), theirs(masked(hole), training=value))
    same_state(ours, theirs)


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_not_trainable_is_inference(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(3, 2, shape), "float32")
    ours, theirs = pair(shape)
    before = ours.get_weights()
    ours.trainable = theirs.trainable = False
    assert len(ours.trainable_weights) == 0
    assert len(ours.non_trainable_weights) == 4
    for training in (True, False, tf.constant(True)):
        close(ours(x, training=training), theirs(x, training=False))
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))
    ours.trainable = theirs.trainable = True
    close(ours(x, training=True), theirs(x, training=True))
    same_state(ours, theirs)


def keras_takes_integers() -> bool:
    """Not Keras 3.5's layer, which computes their mean in integers and fails."""
    try:
        keras.layers.BatchNormalization()(tf.ones((2, 3), "int32"), training=True)
    except TypeError:
        return False
    return True


KERAS_TAKES_INTEGERS = keras_takes_integers()


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool", "float64"])
@pytest.mark.parametrize("policy", ["float32", "float64", "mixed_float16"])
def test_other_input_dtypes_equal_keras(dtype: str, policy: str, rng: np.random.Generator) -> None:
    x = tf.cast(rng.integers(0, 2 if dtype == "bool" else 9, (8, 4)), dtype)
    ours, theirs = pair((8, 4), dtype=policy)
    taken = x if KERAS_TAKES_INTEGERS else tf.cast(x, theirs.compute_dtype)
    for training in (True, False):
        y, wanted = ours(x, training=training), theirs(taken, training=training)
        assert y.dtype == wanted.dtype
        close(y, wanted, 2e-3 if policy == "mixed_float16" else 2e-6)
    same_state(ours, theirs, 2e-3 if policy == "mixed_float16" else 2e-6)


POLICIES = {
    "mixed_float16": 2e-3,
    "mixed_bfloat16": 2e-2,
    "float16": 4e-3,
    "bfloat16": 3e-2,
    "float64": 1e-13,
}


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("shape", [(8, 4), (3, 5, 5, 4)], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_dtype_policies(policy: str, shape: tuple[int, ...], graph: bool, rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(1, 2, shape), "float64")
    dy = rng.normal(size=shape)
    ours, theirs = pair(shape, dtype=policy)

    def step(layer: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return [y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value], output_gradients=tf.cast(dy, y.dtype))]

    wanted = step(theirs)
    for actual, right in zip((tf.function(step) if graph else step)(ours), wanted, strict=True):
        assert actual.dtype == right.dtype
        scale = float(np.abs(np.asarray(tf.cast(right, tf.float64))).max())
        close(tf.cast(actual, tf.float64) / scale, tf.cast(right, tf.float64) / scale, POLICIES[policy])
    same_state(ours, theirs, POLICIES[policy])
    close(ours(x, training=False), theirs(x, training=False), POLICIES[policy])


@pytest.mark.usefixtures("each_bridge")
def test_empty_batches_change_nothing() -> None:
    ours, _ = pair((4, 5))
    before = ours.get_weights()
    for run in (ours, tf.function(ours)):
        with tf.GradientTape() as tape:
            y = run(tf.zeros([0, 5]), training=True)
        gradients = tape.gradient(y, ours.trainable_variables)
        assert y.shape == (0, 5)
        assert all(np.array_equal(g, np.zeros(5)) for g in gradients)
    assert ours(tf.zeros([0, 5])).shape == (0, 5)
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))


@pytest.mark.usefixtures("each_bridge")
def test_stateless_call_does_not_change_the_layer(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(3, 2, (6, 4)), "float32")
    ours, theirs = pair((6, 4))
    before = ours.get_weights()
    for layer in (ours, theirs):
        y, state = layer.stateless_call(layer.trainable_variables, layer.non_trainable_variables, x, training=True)
        close(y, theirs(x, training=True))
        theirs.set_weights(before)
        close(state[0], x.numpy().mean(0) * 0.01 + before[2] * 0.99)
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("kind", ["numpy", "list"])
def test_array_inputs(kind: str, rng: np.random.Generator) -> None:
    x = rng.normal(3, 2, (6, 4))
    ours, theirs = pair((6, 4))
    close(ours(x if kind == "numpy" else tf.constant(x), training=True), theirs(x, training=True))


HAS_RENORM = "renorm" in keras.layers.BatchNormalization().get_config()  # Keras 3.14 and later
RENORM_ERROR = "Received: synchronized=True, renorm=True" if HAS_RENORM else "renorm needs Keras 3.14 or newer"

BAD_ARGUMENTS = [
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\]. Received: 1.5"),
    ({"momentum": -0.1}, ValueError, "momentum must be in"),
    ({"momentum": float("nan")}, ValueError, "momentum must be in"),
    ({"epsilon": -1e-3}, ValueError, "epsilon must be finite and >= 0. Received: -0.001"),
    ({"epsilon": float("inf")}, ValueError, "epsilon must be finite"),
    ({"axis": [1, 2.5]}, TypeError, "axis must be an integer. Received: 2.5"),
    ({"axis": 1.5}, TypeError, "axis must be an integer. Received: 1.5"),
    ({"axis": []}, TypeError, "axis must be an integer"),
    ({"axis": None}, TypeError, "axis must be an integer"),
    ({"synchronized": True, "renorm": True}, ValueError, RENORM_ERROR),
    ({"synchronized": True, "virtual_batch_size": 4}, ValueError, "synchronized must be False with renorm, virtual"),
    ({"synchronized": True, "adjustment": len}, ValueError, "Received: synchronized=True, adjustment=<built-in"),
    ({"activation": "no_such"}, ValueError, "no_such"),
    ({"activation": keras.layers.ReLU}, TypeError, r"the class ReLU \(write ReLU\(\)\)"),
    ({"activation": 3}, ValueError, "3"),
    (
        {"bridge": "stone"},
        ValueError,
        r"bridge must be one of \('auto', 'numpy_function', 'op', 'tensorflow'\). Received: 'stone'",
    ),
    ({"momentun": 0.9}, ValueError, "momentun"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD_ARGUMENTS, ids=lambda v: str(v)[:40])
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormalization(**kwargs)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"axis must be in \[-2, 2\) for inputs of rank 2. Received: 3"):
        BatchNormalization(axis=3)(tf.ones([2, 3]))
    with pytest.raises(ValueError, match=r"axis -1 of inputs must have a known extent. Received: \(None, None\)"):
        BatchNormalization()(keras.Input((None,)))
    ours, _ = pair((4, 5))
    before = ours.get_weights()
    for wrong in (tf.ones([4, 6]), tf.ones([4, 3, 5])):
        with pytest.raises(ValueError, match="incompatible with the layer"):
            ours(wrong, training=True)
    assert all(np.array_equal(a, b) for a, b in zip(ours.get_weights(), before, strict=True))


@pytest.mark.parametrize("axis", [[-1], (1,), np.int64(1), -1])
def test_equivalent_forms_of_one_axis(axis: Any, rng: np.random.Generator) -> None:
    layer = BatchNormalization(axis=axis)
    assert type(layer.axis) is int
    x = tf.constant(rng.normal(3, 2, (6, 4)), "float32")
    close(tf.reduce_mean(layer(x, training=True), 0), np.zeros(4))


def run_python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_another_backend_is_refused(need: Callable[[str], Any]) -> None:
    need("jax")  # without which Keras's NumPy backend can't be imported
    last = run_python("import bnfast.keras", KERAS_BACKEND="numpy").stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: bnfast.keras needs Keras on one of the backends tensorflow, torch, jax (KERAS_BACKEND). "
        "Received: numpy"
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_rank_that_the_graph_does_not_know_is_that_of_the_build(training: bool) -> None:
    """Keras refuses such a tensor in __call__; a script may pass it to call."""
    layer, x = BatchNormalization(), tf.random.normal((4, 6, 5), seed=1)
    layer.build((None, 6, 5))
    run = tf.function(lambda x: layer.call(x, training=training), input_signature=[tf.TensorSpec(None)])
    close(run(x), layer(x, training=training))
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        run(x[0])


def test_what_keras_lacks_and_keras_2_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(bnfast.keras.__file__)
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(__version__="2.15.0"))
    with pytest.raises(ImportError, match=r"^bnfast\.keras needs Keras 3\. Received: Keras 2\.15\.0$"):
        runpy.run_path(os.fspath(path))
    (tmp_path / "keras.py").write_text("import absent_for_certain")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keras")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'absent_for_certain'$"):
        runpy.run_path(os.fspath(path))


@pytest.mark.parametrize("missing", ["tensorflow", "keras", "torch", "jax"])
def test_a_missing_package_is_named(missing: str) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError('No module named ' + name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import bnfast.keras"
    )
    backend = missing if missing in ("torch", "jax") else "tensorflow"
    last = run_python(code, KERAS_BACKEND=backend).stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: bnfast.keras needs Keras 3 and the framework that it runs on (KERAS_BACKEND")
    assert f"{missing} is not installed: pip install" in last
