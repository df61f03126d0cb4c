"""The bridge "tensorflow": TensorFlow's own ops against the kernels, and when they are taken."""

import logging
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.tensorflow import group_norm, op, ops, own_ops
from bnfast.tensorflow.batch import Batch, GradientInputs, Options

SHAPES = [(6, 5, 4, 3), (50, 3), (9, 3, 7)]
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def tensors(rng: np.random.Generator, shape: tuple[int, ...], axis: int, dtype: str, masked: bool) -> dict[str, Any]:
    """x, dy, residual, the vectors and the mask of one case."""
    C = shape[axis]
    x, dy, residual = (tf.cast(tf.constant(rng.normal(0.5, 2, shape)), dtype) for _ in range(3))
    gamma, beta, mean, variance = (tf.constant(rng.uniform(0.5, 2, C)) for _ in range(4))
    mask = None
    if masked:
        extents = [1 if i == axis % len(shape) else extent for i, extent in enumerate(shape)]
        mask = tf.constant(rng.random(extents) > 0.3)
    return {"x": x, "dy": dy, "residual": residual, "vectors": (gamma, beta), "moving": (mean, variance), "mask": mask}


def steps(given: dict[str, Any], options: Options, bridge: str, **kwargs: Any) -> list[Any]:
    """y, the moving statistics and the gradients of one training step."""
    gamma, beta = given["vectors"]
    sources = [given["x"], gamma, beta, *([given["residual"]] if kwargs.pop("with_residual", False) else [])]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        batch = Batch(sources[0], gamma, beta, given["mask"], *sources[3:])
        y, *moved = ops.train_step(batch, given["moving"], 0.75, options, bridge, **kwargs)
    return [y, *moved, *tape.gradient(y, sources, given["dy"])]


def assert_close(actual: list[Any], desired: list[Any], dtype: str) -> None:
    for a, b in zip(actual, desired, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            a, b = (tf.cast(t, tf.float64).numpy() for t in (a, b))
            np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [(s, a) for s in SHAPES for a in (1, -1)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_results_and_gradients_are_those_of_the_kernels(
    shape: tuple[int, ...], axis: int, dtype: str, masked: bool, rng: np.random.Generator
) -> None:
    given = tensors(rng, shape, axis, dtype, masked)
    for activation in (None, "relu", "leaky_relu", "silu"):
        for residual in (False, True):
            options = Options(axis, 1e-3, activation)
            kwargs = {"with_residual": residual, "correction": 1}
            ours, kernels = (steps(given, options, bridge, **kwargs) for bridge in ("tensorflow", "op"))
            assert_close(ours, kernels, dtype)
    results = [
        [
            *ops.train(given["x"], *given["vectors"], mask=given["mask"], options=Options(axis), bridge=bridge),
            *ops.moments(given["x"], mask=given["mask"], options=Options(axis), bridge=bridge),
        ]
        for bridge in ("tensorflow", "op")
    ]
    assert_close(*results, dtype)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_the_gradient_for_given_statistics_is_the_kernels(
    activation: str | None, residual: bool, masked: bool, rng: np.random.Generator
) -> None:
    given = tensors(rng, (6, 5, 4, 3), -1, "float64", masked)
    options = Options(-1, 1e-3, activation)
    kept = None
    if residual and activation is not None:
        y = ops.train(given["x"], *given["vectors"], options=options)[0]
        kept = given["residual"] if activation == "silu" else tf.nn.relu(y + given["residual"])
    mean, invstd, dmean, dvariance = (tf.constant(rng.uniform(0.5, 2, 3)) for _ in range(4))
    inputs = GradientInputs(
        given["dy"], given["x"], mean, invstd, *given["vectors"], dmean, dvariance, given["mask"], kept
    )
    assert_close(*([*ops.gradient(inputs, options, bridge)] for bridge in ("tensorflow", "op")), "float64")


def test_masked_values_and_batches_without_values(rng: np.random.Generator) -> None:
    x = np.where(rng.random((40, 3)) > 0.5, np.nan, rng.normal(size=(40, 3)))
    x[:, :] = np.where(np.isnan(x).any(1, keepdims=True), np.nan, x)
    mask = tf.constant(~np.isnan(x).any(1, keepdims=True))
    moving = (tf.constant([1.0, 2.0, 3.0]), tf.constant([4.0, 5.0, 6.0]))
    batch = Batch(tf.constant(x, tf.float32), mask=mask)
    for bridge in ("tensorflow", "op"):
        _, mean, variance = ops.train_step(batch, moving, 0.5, Options(), bridge)
        valid = x[~np.isnan(x).any(1)]
        np.testing.assert_allclose(2 * mean - moving[0], valid.mean(0), rtol=1e-6)
        np.testing.assert_allclose(2 * variance - moving[1], valid.var(0), rtol=1e-6)
        for empty in (batch._replace(mask=tf.zeros_like(mask)), Batch(tf.zeros((0, 3))), Batch(tf.zeros((0, 2, 4, 3)))):
            _, *kept = ops.train_step(empty, moving, 0.5, Options(), bridge)
            for now, before in zip(kept, moving, strict=True):
                np.testing.assert_array_equal(now, before)


def test_skip_update_keeps_the_statistics_of_channels_that_are_not_finite() -> None:
    x = tf.constant(np.ones((4, 2, 2, 2), np.float32) * [1, np.nan])
    moving = (tf.constant([3.0, 3.0]), tf.constant([5.0, 5.0]))
    _, mean, variance = ops.train_step(
        Batch(tf.cast(x, tf.float32)), moving, 0.5, Options(), "tensorflow", nan_policy="skip_update"
    )
    np.testing.assert_array_equal(mean, [2, 3])
    np.testing.assert_array_equal(variance, [2.5, 5])


def operations(shape: Any, axis: int = -1, dtype: str = "float32", mask: bool = False, epsilon: Any = 1e-3) -> set[str]:
    """The types of the ops that one training step puts into a graph."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(dtype, shape)
        options = Options(axis, tf.constant(1e-3, tf.float64) if epsilon == "tensor" else epsilon)
        C = shape[axis]
        given = Batch(x, mask=tf.ones([1] * len(shape)) if mask else None)
        ops.train_step(given, (tf.zeros(C), tf.zeros(C)), 0.9, options, "tensorflow")
        return {operation.type for operation in graph.get_operations()}


@pytest.mark.parametrize(
    ("fused", "kwargs"),
    [
        (True, {"shape": (None, 4, 4, 3)}),
        (True, {"shape": (None, None, 2, 3), "dtype": "bfloat16"}),
        (True, {"shape": (2, 3, None, None), "axis": 1, "dtype": "float16"}),
        (True, {"shape": (2, 1, 1, 3), "epsilon": 1.001e-5}),
        (False, {"shape": (None, None, None, 3)}),  # M may be 1
        (False, {"shape": (1, 1, 1, 3)}),
        (False, {"shape": (2, 3, 4, 5), "axis": 2}),
        (False, {"shape": (None, 4, 3)}),
        (False, {"shape": (2, 4, 4, 3), "dtype": "float64"}),
        (False, {"shape": (2, 4, 4, 3), "mask": True}),
        (False, {"shape": (2, 4, 4, 3), "epsilon": 1e-5}),  # cuDNN takes none so small
        (False, {"shape": (2, 4, 4, 3), "epsilon": "tensor"}),
    ],
)
def test_the_fused_op_is_taken_where_it_fits(fused: bool, kwargs: dict[str, Any]) -> None:
    types = operations(**kwargs)
    assert ("FusedBatchNormV3" in types) == fused
    assert not {"BnfastTrain", "PyFuncStateless"} & types


def test_second_derivatives_are_those_of_the_formula(rng: np.random.Generator) -> None:
    """The fused op's own, too: TensorFlow differentiates its gradient."""
    given = tensors(rng, (6, 5, 4, 3), -1, "float32", masked=False)
    direction = tf.constant(rng.normal(size=(6, 5, 4, 3)), tf.float32)

    def second(bridge: str) -> list[Any]:
        x, (gamma, beta) = given["x"], given["vectors"]
        with tf.GradientTape() as outer:
            outer.watch([x, gamma])
            with tf.GradientTape() as inner:
                inner.watch(x)
                y, *_ = ops.train_step(Batch(x, gamma, beta), given["moving"], 0.5, Options(), bridge)
            (dx,) = inner.gradient(y, [x], given["dy"])
        return outer.gradient(dx, [x, gamma], direction)

    assert_close(second("tensorflow"), second("op"), "float32")


# ---- a machine with a GPU --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_auto_takes_tensorflows_ops_and_logs_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "bnfast"):
        assert [op.choose("auto") for _ in range(3)] == ["tensorflow"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"bnfast.keras leaves batch norm to TensorFlow's own ops, because {op.GPU_REASON}"
    ]
    assert ops.choose("auto") is own_ops
    assert [op.choose(name) for name in ("op", "numpy_function", "tensorflow")] == [
        "op",
        "numpy_function",
        "tensorflow",
    ]
    for name in ("op", "numpy_function"):
        monkeypatch.setenv("BNFAST_BRIDGE", name)
        assert op.choose("auto") == name


def test_the_environment_chooses_them_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not op.sees_gpu()
    monkeypatch.setenv("BNFAST_BRIDGE", "tensorflow")
    with caplog.at_level(logging.INFO, "bnfast"):
        assert op.choose("auto") == "tensorflow"
    assert caplog.records == []  # who asks by name needs no word about it
    assert op.choose("op") == "op"


@pytest.mark.usefixtures("gpu")
def test_group_norm_runs_no_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    def types() -> set[str]:
        @tf.function
        def run(x: tf.Tensor) -> tf.Tensor:
            return group_norm.normalize(x, None, None, group_norm.Norm((3,), 2, 1e-3), True, "float32")

        return {each.type for each in run.get_concrete_function(tf.zeros((64, 32, 32, 4))).graph.get_operations()}

    assert "PyFuncStateless" not in types()
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    assert "PyFuncStateless" in types()
