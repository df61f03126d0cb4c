"""_core.Callback, the object that numpy_function calls: same results as bnfast.functional, and its slow path."""

import gc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast
import tensorflow as tf
from bnfast import _core
from bnfast.tensorflow import ops
from bnfast.tensorflow.batch import Batch, Options

KWARGS = {"axis": -1, "epsilon": 1e-3, "activation": "relu", "negative_slope": 0.2}
UPDATE = {"momentum": 0.9, "correction": 1, "nan_policy": "propagate"}


def refuse(*arrays: Any) -> Any:
    pytest.fail("the callback declined its arrays")


def same(actual: Any, expected: Any) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_training(rng: np.random.Generator) -> None:
    x = rng.normal(size=(7, 5)).astype("float32")
    gamma, beta, mean, variance = (rng.uniform(0.5, 2, 5).astype("float32") for _ in range(4))
    names = ["x", "beta", "moving_variance", "gamma", "moving_mean"]
    result = _core.Callback("train", names, {**KWARGS, **UPDATE}, refuse)(x, beta, variance, gamma, mean)
    moved = mean.copy(), variance.copy()
    expected = bnfast.batch_norm_train(x, gamma, beta, *moved, **KWARGS, **UPDATE)
    same(result, [expected.y, expected.mean, expected.invstd, *moved])
    assert not np.array_equal(mean, moved[0])  # the inputs are not written
    alone = _core.Callback("train", ["x"], {**KWARGS, **UPDATE}, refuse)(x)
    expected = bnfast.batch_norm_train(x, **KWARGS)
    same(alone, [expected.y, expected.mean, expected.invstd, expected.variance])


def test_gradient(rng: np.random.Generator) -> None:
    x, dy, residual = (rng.normal(size=(7, 5)).astype("float32") for _ in range(3))
    gamma, beta = np.ones(5), np.zeros(5, "float32")  # two dtypes: each gradient has that of its parameter
    forward = bnfast.batch_norm_train(x, gamma, beta, residual=residual, **KWARGS)
    kwargs = {name: value for name, value in KWARGS.items() if name != "epsilon"} | {"training": True}
    common = {"dy": dy, "x": x, "mean": forward.mean, "invstd": forward.invstd}
    expected = bnfast.batch_norm_grad(*common.values(), gamma, beta, y=forward.y, **kwargs)
    given = {**common, "gamma": gamma, "beta": beta, "y": forward.y}
    result = _core.Callback("grad", list(given), kwargs, refuse)(*given.values())
    same(result, [expected.dx, expected.dgamma, expected.dbeta.astype("float32"), expected.dresidual])
    plain = {name: value for name, value in kwargs.items() if name != "activation"}
    # int32: the memory of an output needs the right item size, not the right dtype
    memory = {"out": np.empty((7, 5), "int32"), "out_dresidual": np.empty((7, 5), "int32")}
    given |= memory
    again = _core.Callback("grad", list(given), kwargs, refuse)(*given.values())
    same(again, result)
    for array, taken in zip((again[0], again[3]), memory.values(), strict=True):
        assert np.shares_memory(array, taken)
    (dx,) = _core.Callback("grad", list(common), plain, refuse)(*common.values())
    same([dx], [bnfast.batch_norm_grad(*common.values(), **plain).dx])


def test_declined_arrays_are_passed_to_the_slow_path(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 7)).astype("float32").T
    seen = []
    callback = _core.Callback("train", ["x"], {**KWARGS, **UPDATE}, lambda *arrays: seen.append(arrays) or [1])
    assert callback(x) == [1]
    ((array,),) = seen
    assert array is x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("infer", ["x"], {}), "kernel must be train or grad. Received: infer"),
        (("train", ["dy"], {}), "no argument of this name. Received: dy"),
        (("grad", ["x"], {"epsilon": 1}), "no argument of this name. Received: epsilon"),
    ],
)
def test_unknown_names(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.Callback(*arguments, refuse)


def test_wrong_number_of_arrays() -> None:
    with pytest.raises(TypeError, match=r"the number of arrays must be 1, one per name\. Received: 0"):
        _core.Callback("train", ["x"], KWARGS, refuse)()


@pytest.mark.parametrize("masked", [False, True])
def test_graph_outputs_are_allocated_by_tensorflow(masked: bool) -> None:
    x, residual = (tf.random.normal((512, 64)) for _ in range(2))
    mask = tf.ones((512, 1)) if masked else None
    state, options = (tf.zeros(64), tf.ones(64)), Options(activation="relu")

    @tf.function
    def run(x: Any, residual: Any) -> Any:
        batch = Batch(x, tf.ones(64), tf.zeros(64), mask, residual)
        with tf.GradientTape() as tape:
            tape.watch((x, residual))
            y, *_ = ops.train_step(batch, state, 0.9, options, "numpy_function")
        return y, *tape.gradient(y, (x, residual))

    run(x, residual)
    gc.collect()
    bnfast.clear_memory()
    others = bnfast.memory_statistics()["in_use_bytes"]  # memory that earlier tests of this process still hold
    y, dx, dresidual = run(x, residual)
    memory = bnfast.memory_statistics()
    assert memory["held_bytes"] + memory["in_use_bytes"] - others < x.shape[0] * x.shape[1] * 4
    forward = bnfast.batch_norm_train(x, np.ones(64), np.zeros(64), residual=residual, activation="relu")
    backward = bnfast.batch_norm_grad(
        *(np.ones((512, 64), "f"), x, forward.mean, forward.invstd, np.ones(64), np.zeros(64)),
        **{"y": forward.y, "activation": "relu"},
    )
    same([y, dx, dresidual], [forward.y, backward.dx, backward.dresidual])


@pytest.mark.parametrize("masked", [False, True])
def test_graphs_use_the_callback_except_with_a_mask(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    callback = _core.Callback

    def spy(kernel: str, *arguments: Any) -> Any:
        made.append(kernel)
        return callback(kernel, *arguments)

    monkeypatch.setattr(_core, "Callback", spy)
    x, mask = tf.random.normal((6, 3)), tf.ones((6, 1)) if masked else None
    state = tf.zeros(3), tf.ones(3)

    @tf.function
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, *_ = ops.train_step(Batch(x, mask=mask), state, 0.9, Options(), "numpy_function")
        return tape.gradient(y, x)

    assert np.isfinite(run(x)).all()
    assert made == ([] if masked else ["train", "grad"])
