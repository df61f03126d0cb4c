"""The TensorFlow op: its library, its attributes, its buffers, and what happens without it."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast
import tensorflow as tf
from bnfast import _core
from bnfast.keras import BatchNormalization
from bnfast.tensorflow import op, ops, reference
from bnfast.tensorflow import op_library as _tf_library
from bnfast.tensorflow.batch import Batch, Options

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the op is built on Linux only")

SHAPE = (16, 20, 20, 64)


@pytest.fixture(autouse=True)
def op_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "op")


def pointer(tensor: Any) -> Any:
    """The address of the tensor's buffer, as a later op sees it."""
    return tf.numpy_function(lambda array: np.int64(array.__array_interface__["data"][0]), [tensor], tf.int64)


def test_the_library_loads() -> None:
    available, reason = op.status()
    assert available, reason
    assert reason == f"_tf.so loaded by TensorFlow {tf.__version__}"
    assert _tf_library.probe() == (True, "_tf.so fits the installed TensorFlow")


def test_the_library_contains_no_kernels_and_links_without_tensorflow() -> None:
    """The op calls the kernels of _core, so a process has one thread pool, one scratch and one instruction set."""
    data = _tf_library.PATH.read_bytes()
    assert b"BnfastTrain" in data
    assert b"libgomp" not in data
    assert len(data) < 500_000
    code = f"import ctypes, sys; ctypes.CDLL({os.fspath(_tf_library.PATH)!r}); assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("isa", ["baseline", None])
def test_settings_of_the_core_reach_the_op(isa: str | None, rng: np.random.Generator) -> None:
    """Same bits as the NumPy functions for any thread count and for the instruction set chosen in Python."""
    x = rng.normal(3, 2, (64, 10, 10, 8)).astype("float32")
    wanted = bnfast.batch_norm_train(x)
    threads = bnfast.get_num_threads()
    _core._set_isa(isa)
    try:
        for n in (1, 3):
            bnfast.set_num_threads(n)
            y, mean, variance = ops.train(tf.constant(x))
            assert y.numpy().tobytes() == wanted.y.tobytes()
            assert mean.numpy().tobytes() == wanted.mean.astype("float32").tobytes()
            assert variance.numpy().tobytes() == wanted.variance.astype("float32").tobytes()
    finally:
        _core._set_isa(None)
        bnfast.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_both_bridges_give_the_same_bits(axis: int, dtype: str, rng: np.random.Generator) -> None:
    """Every dtype and activation, with masks and residuals: op in a graph, op in eager mode, and numpy_function."""
    shape = (6, 5, 4, 3)
    channels = shape[axis]
    x, dy, residual = (tf.cast(rng.normal(1, 2, shape), dtype) for _ in range(3))
    parameter = "float64" if dtype == "float64" else "float32"
    vectors = [tf.constant(rng.uniform(0.5, 2, channels), parameter) for _ in range(4)]
    mask = tf.expand_dims(tf.constant(rng.random(np.delete(shape, axis)) < 0.7), axis % 4)
    for activation in (None, "relu", "relu6", "leaky_relu"):
        for given in ({}, {"residual": residual}):
            for weights in (None, mask):

                def run(name: str, activation: Any = activation, given: Any = given, weights: Any = weights) -> Any:
                    sources = [x, *vectors[:2], *given.values()]
                    with tf.GradientTape() as tape:
                        tape.watch(sources)
                        options = Options(axis, 1e-2, activation, 0.3)
                        batch = Batch(x, *vectors[:2], weights, **given)
                        y, *moving = ops.train_step(batch, tuple(vectors[2:]), 0.9, options, name)
                    return [y, *moving, *tape.gradient(y, sources, output_gradients=dy)]

                results = [tf.function(run)("op"), run("op"), run("numpy_function")]
                for first, *others in zip(*results, strict=True):
                    assert all(other.dtype == first.dtype for other in others)
                    assert len({tf.io.serialize_tensor(t).numpy() for t in (first, *others)}) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [0, -1])
def test_inference_has_the_bits_of_the_numpy_function(axis: int, dtype: str, rng: np.random.Generator) -> None:
    shape = (6, 5, 4, 3)
    x, residual = (tf.cast(rng.normal(1, 2, shape), dtype) for _ in range(2))
    parameter = "float64" if dtype == "float64" else "float32"
    gamma, beta, *moving = (tf.constant(rng.uniform(0.5, 2, shape[axis]), parameter) for _ in range(4))
    for activation in (None, "relu", "relu6", "leaky_relu"):
        for added in (None, residual):
            options = Options(axis, 1 / 3, activation, 1 / 7)
            run = partial(op.infer, Batch(x, gamma, beta, residual=added), tuple(moving), options)
            wanted = bnfast.batch_norm_infer(
                *(t.numpy() for t in (x, *moving, gamma, beta)),
                axis=axis,
                epsilon=1 / 3,
                activation=activation,
                negative_slope=1 / 7,
                residual=None if added is None else added.numpy(),
            )
            assert run().numpy().tobytes() == tf.function(run)().numpy().tobytes() == wanted.tobytes()


def test_inference_with_a_variance_that_has_no_root() -> None:
    x, beta = tf.constant([[1.0, 2.0]]), tf.constant([3.0, 4.0])
    for variance, wanted in ((0.0, [[3.0, 4.0]]), (-1.0, [[np.nan, np.nan]])):
        y = op.infer(Batch(x, beta=beta), (tf.zeros(2), tf.fill([2], variance)), Options(-1, 0.0))
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("given", [("gamma", "beta", "residual"), ("beta",), ()])
def test_gradients_of_inference(given: tuple[str, ...], rng: np.random.Generator) -> None:
    """Against the gradients of the formula in TensorFlow's ops, second order too."""
    shape, options = (4, 5, 3), Options(-1, 0.1, "leaky_relu", 0.3)
    values = {name: tf.constant(rng.uniform(0.5, 2, 3)) for name in ("gamma", "beta", "mean", "variance")}
    values |= {name: tf.constant(rng.normal(size=shape)) for name in ("x", "residual")}
    names = ["x", "mean", "variance", *given]

    def gradients(infer: Any) -> list[Any]:
        sources = [values[name] for name in names]
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as tape:
                tape.watch(sources)
                batch = Batch(values["x"], **{name: values[name] for name in given})
                y = tf.sin(infer(batch, (values["mean"], values["variance"]), options))
            first = tape.gradient(y, sources)
            total = sum(tf.reduce_sum(tf.sin(gradient)) for gradient in first)
        return [*first, *outer.gradient(total, sources, unconnected_gradients="zero")]

    for actual, wanted in zip(gradients(op.infer), gradients(reference.infer), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)


def test_scalars_are_passed_in_float64(rng: np.random.Generator) -> None:
    """TensorFlow's float attributes are float32: epsilon, momentum and negative_slope would lose half their digits."""
    x = rng.normal(size=(50, 2)) * 1e-3
    mean, variance = np.zeros(2), np.ones(2)
    options = Options(-1, 1 / 3, "leaky_relu", 1 / 7)
    moving = tf.constant(mean), tf.constant(variance)
    y, new_mean, new_variance = ops.train_step(Batch(tf.constant(x)), moving, 1 - 1e-12, options)
    wanted = bnfast.batch_norm_train(
        x, None, None, mean, variance, momentum=1 - 1e-12, epsilon=1 / 3, activation="leaky_relu", negative_slope=1 / 7
    )
    for actual, right in zip((y, new_mean, new_variance), (wanted.y, mean, variance), strict=True):
        assert actual.numpy().tobytes() == right.tobytes()


def test_outputs_reuse_buffers_that_nobody_reads() -> None:
    """dx takes the buffer of dy, and y that of x, if no other op reads them. Only the addresses show it."""
    layer = BatchNormalization()
    layer.build(SHAPE)
    options = Options()

    @tf.function
    def backward(v: Any, w: Any) -> Any:
        x = v * 2.0
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _, _ = ops.train_step(Batch(x), (tf.zeros(64), tf.ones(64)), 0.9, options)
        with tf.control_dependencies([y]):
            dy = w + 1.0
        at = pointer(dy)
        with tf.control_dependencies([at]):
            dx = tape.gradient(y, x, output_gradients=tf.identity(dy))
        return at, pointer(dx), dx

    @tf.function
    def forward(v: Any) -> Any:
        x = v * 2.0
        at = pointer(x)
        with tf.control_dependencies([at]):
            y = ops.train_step(Batch(tf.identity(x)), (tf.zeros(64), tf.ones(64)), 0.9, options)[0]
        return at, pointer(y), y

    v, w = tf.random.normal(SHAPE, seed=1), tf.random.normal(SHAPE, seed=2)
    dy_at, dx_at, dx = backward(v, w)
    x_at, y_at, y = forward(v)
    assert dx_at == dy_at
    assert y_at == x_at
    train = bnfast.batch_norm_train(2 * v.numpy())
    assert y.numpy().tobytes() == train.y.tobytes()
    grad = bnfast.batch_norm_grad(w.numpy() + 1, 2 * v.numpy(), train.mean, train.invstd)
    assert dx.numpy().tobytes() == grad.dx.tobytes()


def test_buffers_that_are_still_read_are_not_overwritten(rng: np.random.Generator) -> None:
    x, dy = (tf.Variable(tf.constant(rng.normal(size=SHAPE), "float32")) for _ in range(2))
    before = [v.numpy().tobytes() for v in (x, dy)]

    @tf.function
    def run() -> Any:
        values = [x.value(), dy.value()]
        with tf.GradientTape() as tape:
            tape.watch(values[0])
            y = ops.train(values[0])[0]
        return tape.gradient(y, values[0], output_gradients=values[1])

    run()
    assert [v.numpy().tobytes() for v in (x, dy)] == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moving_mean": np.zeros(2)}, r"moving_mean must have shape \(3,\) to match axis -1 of x. Received: \(2,\)"),
        ({"moving_variance": np.zeros((3, 1))}, r"moving_variance must have shape \(3,\) .* Received: \(3, 1\)"),
        ({"beta": [np.zeros(())]}, r"beta must have shape \(3,\) to match axis -1 of x. Received: \(\)"),
        ({"residual": [np.zeros((4, 2))]}, r"residual must have the shape of x, \(4, 3\). Received: \(4, 2\)"),
        ({"mask": [np.zeros(3)]}, r"mask must have 4 values, one for all channels. Received: \(3,\)"),
        ({"mask": [np.zeros(4, "float32")]}, "mask must be float64 for float64 x, and float32 for any other x"),
        ({"mask": [np.array([1, np.nan, 0, 1])]}, "mask must hold finite weights of at least 0. Received: nan"),
        ({"mask": [np.array([1, 2, -1.0, 1])]}, "mask must hold finite weights of at least 0. Received: -1"),
        ({"axis": 5}, r"axis must lie in \[-2, 2\). Received: 5"),
        ({"axis": 2**32}, r"axis must lie in \[-2, 2\). Received: 4294967296"),
        ({"axis": -(2**63)}, r"axis must lie in \[-2, 2\). Received: -9223372036854775808"),
        ({"correction": 2**32}, "correction must be 0 or 1. Received: 4294967296"),
        ({"epsilon": -1.0}, "epsilon must be finite and >= 0. Received: -1"),
        ({"epsilon": float("inf")}, "epsilon must be finite and >= 0. Received: inf"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\]. Received: 1.5"),
        ({"momentum": float("nan")}, r"momentum must lie in \[0, 1\]. Received: nan"),
        ({"gamma": [np.ones(3)] * 2}, "num_gamma must be 0 or 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_wrong_inputs_are_invalid_arguments(graph: bool, wrong: dict[str, Any], message: str) -> None:
    ops = op._load().ops
    kwargs = dict(x=np.ones((4, 3)), moving_mean=np.zeros(3), moving_variance=np.zeros(3), gamma=[], beta=[])
    kwargs |= dict(momentum=0.5, epsilon=0.0, mask=[], residual=[], **op._attributes(Options())) | wrong

    def run() -> Any:
        return ops.bnfast_train(
            **{k: v if np.isscalar(v) else tf.nest.map_structure(tf.constant, v) for k, v in kwargs.items()}
        )

    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        (tf.function(run) if graph else run)()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moving_mean": np.zeros(2)}, r"moving_mean must have shape \(3,\) to match axis -1 of x. Received: \(2,\)"),
        ({"moving_variance": np.zeros((3, 1))}, r"moving_variance must have shape \(3,\) .* Received: \(3, 1\)"),
        ({"gamma": [np.zeros(4)]}, r"gamma must have shape \(3,\) to match axis -1 of x. Received: \(4,\)"),
        ({"residual": [np.zeros((4, 2))]}, r"residual must have the shape of x, \(4, 3\). Received: \(4, 2\)"),
        ({"epsilon": -1.0}, "epsilon must be finite and >= 0. Received: -1"),
        ({"beta": [np.ones(3)] * 2}, "num_beta must be 0 or 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_inputs_of_inference(wrong: dict[str, Any], message: str) -> None:
    kwargs = dict(x=np.ones((4, 3)), moving_mean=np.zeros(3), moving_variance=np.zeros(3), gamma=[], beta=[])
    kwargs |= dict(epsilon=0.0, residual=[], **op._attributes(Options())) | wrong
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        op._load().ops.bnfast_infer(
            **{k: v if np.isscalar(v) else tf.nest.map_structure(tf.constant, v) for k, v in kwargs.items()}
        )


def test_y_without_an_activation_is_an_invalid_argument() -> None:
    x, one = tf.ones((4, 3)), tf.ones(3)
    kwargs = dict(dy=x, x=x, saved=tf.ones((2, 3), tf.float64), gamma=[one], beta=[one], mask=[], y=[x], statistics=[])
    kwargs["epsilon"] = 0.0
    with pytest.raises(tf.errors.InvalidArgumentError, match="num_y must be 0 without an activation"):
        op._load().ops.bnfast_grad(parameter_type=tf.float32, **kwargs, **op._attributes(Options()))


def test_shapes_are_known_inside_the_graph() -> None:
    """The shape functions of the op, in C: a graph loaded from a file has only these."""
    ops = op._load().ops

    @tf.function(input_signature=[tf.TensorSpec([None, 7, 3]), tf.TensorSpec(None), tf.TensorSpec(None, "float64")])
    def run(x: Any, unknown: Any, saved: Any) -> None:
        one = tf.ones(3)
        kwargs = dict(epsilon=0.0, gamma=[one], beta=[one], mask=[], **op._attributes(Options()))
        forward_kwargs = dict(moving_variance=one, residual=[], momentum=0.5, **kwargs)
        forward = ops.bnfast_train(x=x, moving_mean=one, **forward_kwargs)
        assert [t.shape.as_list() for t in forward] == [[None, 7, 3], [3], [3], [2, 3]]
        with pytest.raises(ValueError, match="rank 1"):
            ops.bnfast_train(x=x, moving_mean=x, **forward_kwargs)
        with pytest.raises(ValueError, match="rank 0"):
            ops.bnfast_train(x=x, moving_mean=one, **{**forward_kwargs, "momentum": [0.5]})
        with pytest.raises(ValueError, match="rank 0"):
            ops.bnfast_train(x=x, moving_mean=one, **{**forward_kwargs, "epsilon": [0.5]})
        inference = {**forward_kwargs, "moving_mean": one, "x": x}
        del inference["mask"], inference["momentum"]
        assert ops.bnfast_infer(**inference).shape.as_list() == [None, 7, 3]
        for name, rank in (("moving_mean", 1), ("epsilon", 0)):
            with pytest.raises(ValueError, match=f"rank {rank}"):
                ops.bnfast_infer(**{**inference, name: x if rank else [0.5]})
        kwargs |= dict(statistics=[], parameter_type=tf.float32)
        backward = ops.bnfast_grad(dy=x, x=x, saved=forward.saved, y=[x], **kwargs)
        assert [t.shape.as_list() for t in tf.nest.flatten(backward)] == [[None, 7, 3], [3], [3], [None, 7, 3]]
        rest = ops.bnfast_grad(dy=unknown, x=unknown, saved=saved, y=[], **kwargs)
        assert [t.shape.rank for t in tf.nest.flatten(rest)] == [None, 1, 1]

    run.get_concrete_function()


def test_config_contains_the_bridge_unless_auto() -> None:
    assert "bridge" not in BatchNormalization().get_config()
    config = BatchNormalization(bridge="numpy_function").get_config()
    assert BatchNormalization.from_config(config).bridge == config["bridge"] == "numpy_function"


def test_environment_variable_applies_to_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNFAST_BRIDGE", "numpy_function")
    assert [op.choose(name) for name in op.BRIDGES] == ["numpy_function", "numpy_function", "op", "tensorflow"]
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    assert [op.choose(name) for name in op.BRIDGES] == ["op", "numpy_function", "op", "tensorflow"]
    monkeypatch.delenv("BNFAST_BRIDGE")
    assert op.choose("auto") == "op"
    monkeypatch.setenv("BNFAST_BRIDGE", "stone")
    with pytest.raises(ValueError, match=r"BNFAST_BRIDGE must be one of .* Received: 'stone'"):
        op.choose("auto")


def test_without_the_op_auto_falls_back_and_logs_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(op, "_library", op._Library(None, "it is raining"))
    monkeypatch.setattr(op, "_logged", False)
    monkeypatch.delenv("BNFAST_BRIDGE")
    x = tf.ones([4, 3])
    with caplog.at_level(logging.INFO, "bnfast"):
        for _ in range(2):
            BatchNormalization()(x, training=True)
        BatchNormalization(bridge="op")(x)  # inference needs no bridge
        with pytest.raises(RuntimeError, match="bnfast's TensorFlow op can't be used: it is raining"):
            BatchNormalization(bridge="op")(x, training=True)
    assert [record.getMessage() for record in caplog.records] == [
        "bnfast.keras goes through numpy_function, because its TensorFlow op can't be used: it is raining"
    ]


HOST = """
import json, logging, sys
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("bnfast").addHandler(handler)
import bnfast, tensorflow as tf
from bnfast.keras import BatchNormalization
from bnfast.tensorflow import op
y = BatchNormalization()(tf.constant([[1.0], [3.0]]), training=True)
print(json.dumps([float(y[1, 0]), *op.status(), lines]))
"""


def copy_of_the_package(folder: Path) -> Path:
    """Make a second bnfast in `folder`: links to the Python files, a copy of _tf.so. Return the path of the copy."""
    home = Path(bnfast.__file__).parent
    package = folder / "bnfast"
    package.mkdir()
    for path in home.iterdir():
        if path.name not in ("_tf.so", "__pycache__"):
            (package / path.name).symlink_to(path)
    shutil.copy(home / "_tf.so", package / "_tf.so")
    return package / "_tf.so"


def damage(path: Path, how: str) -> str:
    """Make the library unusable, and return a part of the reason that must be reported."""
    data = path.read_bytes()
    if how == "hidden":
        path.unlink()
        return "is not there"
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return "is truncated"
    if how == "symbol":  # a name of the same length, as if TensorFlow had no such function
        path.write_bytes(data.replace(b"\0TF_AllocateOutput\0", b"\0TF_AllocateOutbut\0"))
        return "libtensorflow_framework.so.2 has no TF_AllocateOutbut"
    if how == "undefined":  # a function of the C library
        path.write_bytes(data.replace(b"\0dlopen\0", b"\0dlopem\0"))
        return "undefined symbol: dlopem"
    path.write_bytes(data.replace(bnfast.__version__.encode() + b"\0", b"9.9.9\0"))
    return "it was built with another version of bnfast"


@pytest.mark.parametrize("how", ["hidden", "truncated", "symbol", "undefined", "version"])
def test_a_bad_library_is_reported_and_not_used(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bnfast and TensorFlow can still be imported, training works without the op, and one log line gives the reason."""
    path = copy_of_the_package(tmp_path)
    wanted = damage(path, how)
    monkeypatch.setattr(_tf_library, "PATH", path)
    fits, reason = _tf_library.probe()
    assert not fits
    assert wanted in reason
    environment = {name: value for name, value in os.environ.items() if name != "BNFAST_BRIDGE"}
    environment |= {"PYTHONPATH": os.fspath(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", HOST], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    y, available, reason, lines = json.loads(result.stdout)
    assert y == pytest.approx(1, abs=1e-3)
    assert not available
    assert wanted in reason
    assert len(lines) == 1
    assert reason in lines[0]


@pytest.mark.parametrize(("how", "reason"), [("hidden", "is not there"), ("undefined", "undefined symbol: dlopem")])
def test_a_library_that_cannot_be_loaded_in_this_process(
    how: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(_tf_library.PATH, tmp_path))
    assert damage(path, how) == reason
    monkeypatch.setattr(_tf_library, "PATH", path)
    for name in ("_registered", "_library"):
        monkeypatch.setattr(op, name, None)
    op.register()
    available, found = op.status()
    assert not available
    assert re.fullmatch(f"{re.escape(str(path))}.*{reason}.*", found)


def test_a_self_test_that_fails_is_the_reason() -> None:
    def fail(**_: Any) -> None:
        raise tf.errors.InternalError(None, None, "it is raining")

    library = op._tested(op._Library(SimpleNamespace(bnfast_train=fail), "loaded"))
    assert library == (None, f"{_tf_library.PATH}: it is raining")


def test_probe_without_tensorflows_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(submodule_search_locations=[os.fspath(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    assert _tf_library.probe() == (False, f"{tmp_path / 'libtensorflow_framework.so.2'} is not there")


def test_gpus_are_asked_for_where_a_driver_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tf_library, "_GPUS", "print('GPU:0, GPU:1')")
    monkeypatch.setattr(_tf_library, "_DRIVERS", (os.fspath(tmp_path / "driver"),))
    assert _tf_library.gpus() == ""
    (tmp_path / "driver").touch()
    assert _tf_library.gpus() == "GPU:0, GPU:1"
    monkeypatch.setattr(_tf_library, "_GPUS", "print('GPU:0'); sys.exit(1)")
    assert _tf_library.gpus() == ""
    monkeypatch.setattr(sys, "executable", "")
    assert _tf_library.gpus() == ""


def test_an_unknown_bridge_is_named() -> None:
    with pytest.raises(ValueError, match=r"bridge must be one of \('auto', .*\)\. Received: 'stone'"):
        _tf_library.wanted("stone")


def test_a_truncated_library_is_detected_before_loading(tmp_path: Path) -> None:
    """At any length: dlopen would map the file, and the process would die on reading past its end."""
    path = tmp_path / "_tf.so"
    data = _tf_library.PATH.read_bytes()
    assert _tf_library.defect() == ""
    for end in np.linspace(0, 0.5, 20) * len(data):
        path.write_bytes(data[: int(end)])
        assert _tf_library.defect(path) == f"{path} is {'truncated' if end >= 64 else 'not a 64-bit ELF library'}"
    for end in (64, 200):  # within the table of program headers
        path.write_bytes(data[:end])
        assert _tf_library.defect(path) == f"{path} is truncated"
    path.write_text("not a library" * 100)
    assert _tf_library.defect(path) == f"{path} is not a 64-bit ELF library"
    assert _tf_library.defect(tmp_path) == f"{tmp_path} can't be read: Is a directory"
