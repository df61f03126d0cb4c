"""Both bridges between TensorFlow and the kernels: no copies, no written inputs, static shapes, many threads.

For numpy_function the tests compare addresses: those of the arrays that a kernel call reads and returns, recorded
around its callback, and those of TensorFlow's tensors, seen by a later op. test_op.py does the same for the op.
"""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import bnfast
import tensorflow as tf
from bnfast import _core
from bnfast.keras import BatchNormalization
from bnfast.tensorflow import numpy_callback, ops, reference
from bnfast.tensorflow.batch import Batch, Options

pytestmark = pytest.mark.usefixtures("each_bridge")

DTYPES = ["float32", "float64", "float16", "bfloat16"]
# 0.8 MiB in half precision: above every limit for small data, and not 64-byte aligned by chance, as small blocks may be
SHAPE = (16, 20, 20, 64)


def pointer(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Addresses per kernel call: x (and dy) as received, y or dx as returned."""
    record: list[dict[str, int]] = []
    made = _core.Callback

    def spy(kernel: str, names: list[str], kwargs: dict[str, Any], slow: Any) -> Any:
        callback = made(kernel, names, kwargs, lambda *arrays: pytest.fail("the callback declined its arrays"))

        def call(*arrays: Any) -> Any:
            result = callback(*arrays)
            given = zip(names, arrays, strict=True)
            tensors = {name: pointer(array) for name, array in given if name in ("x", "dy")}
            record.append({**tensors, "y" if kernel == "train" else "dx": pointer(result[0])})
            return result

        return call

    monkeypatch.setattr(_core, "Callback", spy)
    return record


def seen(tensor: Any) -> Any:
    """The address of the tensor's buffer, as a later op sees it."""
    if tf.executing_eagerly():
        return np.int64(pointer(numpy_callback.to_array(tensor)))
    return tf.numpy_function(lambda array: np.int64(pointer(array)), [tensor], tf.int64)


def forward_and_backward(x: Any, dy: Any) -> tuple[dict[str, Any], Any]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = ops.train(x, options=Options(activation="relu"))[0]
    dx = tape.gradient(y, x, output_gradients=dy)
    return {
        "x": seen(x),
        "y": seen(y),
        "dy": seen(dy),
        "dx": seen(dx),
    }, y  # y: else dx may take its buffer


@pytest.mark.parametrize("each_bridge", ["numpy_function"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_inputs_are_read_in_place_and_outputs_adopted(
    graph: bool, dtype: str, calls: list[dict[str, int]], rng: np.random.Generator
) -> None:
    x, dy = (tf.cast(rng.normal(size=SHAPE), dtype) for _ in range(2))
    pointers, _ = (tf.function(forward_and_backward) if graph else forward_and_backward)(x, dy)
    forward, backward = calls
    held = {name: int(value) for name, value in pointers.items()}
    assert {**forward, **backward} == held
    assert forward["x"] == backward["x"]
    assert len(set(held.values())) == 4
    assert all(value % 64 == 0 for value in held.values())


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_input_is_written(dtype: str, graph: bool, rng: np.random.Generator) -> None:
    """TensorFlow passes writeable aliases of its variables: writing to an input would change the weights."""
    inputs = [tf.Variable(tf.cast(rng.normal(size=SHAPE), dtype)) for _ in range(2)]
    parameter = "float64" if dtype == "float64" else "float32"
    statistics = [tf.Variable(tf.cast(rng.uniform(1, 2, SHAPE[-1]), parameter)) for _ in range(4)]
    before = [variable.numpy().tobytes() for variable in (*inputs, *statistics)]

    def run() -> Any:
        x, dy = (variable.value() for variable in inputs)
        gamma, beta, mean, variance = (variable.value() for variable in statistics)
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, new_mean, new_variance = ops.train_step(Batch(x, gamma, beta), (mean, variance), 0.9, Options())
        return new_mean, new_variance, tape.gradient(y, [x, gamma, beta], output_gradients=dy)

    new_mean, new_variance, _ = (tf.function(run) if graph else run)()
    assert [variable.numpy().tobytes() for variable in (*inputs, *statistics)] == before
    assert new_mean.numpy().tobytes() != before[4]
    assert new_variance.numpy().tobytes() != before[5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_and_graph_give_the_same_bits(dtype: str, rng: np.random.Generator) -> None:
    x, dy = (tf.cast(rng.normal(3, 2, (5, 7, 7, 12)), dtype) for _ in range(2))
    gamma = tf.constant(rng.normal(size=12), "float32")

    def run(x: Any, gamma: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, gamma])
            y, mean, variance = ops.train(x, gamma, options=Options(activation="leaky_relu"))
        return [y, mean, variance, *tape.gradient(y, [x, gamma], output_gradients=dy)]

    for eager, graph in zip(run(x, gamma), tf.function(run)(x, gamma), strict=True):
        assert eager.dtype == graph.dtype
        assert numpy_callback.to_array(eager).tobytes() == numpy_callback.to_array(graph).tobytes()


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_tensors_outlive_the_call(graph: bool, rng: np.random.Generator) -> None:
    """Adopted buffers belong to the tensors: later calls, which allocate and free memory, do not change them."""

    def run(x: Any) -> Any:
        return ops.train(x, options=Options(epsilon=0.0))[0]

    each = tf.function(run) if graph else run
    x = tf.constant(rng.normal(size=SHAPE), "float32")
    results = [each(x * (i + 1)) for i in range(4)]
    del x
    for y in results:
        close = np.abs(y.numpy() - results[0].numpy()).max()
        assert close < 1e-5


@pytest.mark.parametrize("each_bridge", ["numpy_function"], indirect=True)
def test_graph_outputs_are_allocated_by_tensorflow(rng: np.random.Generator) -> None:
    """TensorFlow reuses its memory for any tensor; memory of bnfast's pool would serve batch norms only."""
    x, dy = (tf.constant(rng.normal(size=(256, 512)), "float32") for _ in range(2))

    @tf.function
    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.train(x)[0]
        return y, tape.gradient(y, x, output_gradients=dy)

    before = bnfast.memory_statistics()["in_use_bytes"]
    y, dx = run(x)
    assert bnfast.memory_statistics()["in_use_bytes"] - before < 256 * 512 * 4 / 4
    assert y.shape == dx.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("each_bridge", ["numpy_function"], indirect=True)
def test_enable_check_numerics_sees_no_uninitialized_memory(dtype: str, rng: np.random.Generator) -> None:
    """Unwritten output memory may hold NaN; TensorFlow's check after every op must not see it."""
    x = tf.cast(rng.normal(size=SHAPE), dtype)

    @tf.function
    def poison() -> Any:
        return [tf.fill(SHAPE, tf.cast(np.nan, dtype)) + tf.cast(tf.random.uniform([]), dtype) for _ in range(4)]

    poison()
    tf.debugging.enable_check_numerics()
    try:
        dx = tf.function(forward_and_backward)(x, x)[1]
    finally:
        tf.debugging.disable_check_numerics()
    assert np.isfinite(tf.cast(dx, "float32")).all()


def test_result_dtypes_and_static_shapes() -> None:
    for dtype, statistic in (("float16", "float32"), ("float32", "float32"), ("float64", "float64")):

        @tf.function(input_signature=[tf.TensorSpec([None, 6, None, 3], dtype)])
        def run(x: Any, dtype: str = dtype, statistic: str = statistic) -> Any:
            gamma = tf.ones(3)
            with tf.GradientTape() as tape:
                tape.watch([x, gamma])
                y, mean, variance = ops.train(x, gamma)
            dx, dgamma = tape.gradient(y, [x, gamma])
            assert y.shape.as_list() == dx.shape.as_list() == [None, 6, None, 3]
            assert mean.shape == variance.shape == dgamma.shape == (3,)
            assert (y.dtype, dx.dtype, mean.dtype) == (dtype, dtype, statistic)
            return y, dx

        for batch in (2, 0):
            y, dx = run(tf.ones([batch, 6, 5, 3], dtype))
            assert y.shape == dx.shape == (batch, 6, 5, 3)


def test_one_trace_serves_every_batch_and_size() -> None:
    layer, traces = BatchNormalization(), []
    layer.build((None, None, None, 3))

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def step(x: Any) -> Any:
        traces.append(x)
        y = layer(x, training=True)
        assert y.shape.as_list() == [None, None, None, 3]
        return tf.reduce_mean(y)

    for shape in ((2, 4, 4, 3), (3, 5, 6, 3), (1, 1, 1, 3), (0, 4, 4, 3)):
        step(tf.random.normal(shape))
    assert len(traces) == 1


def test_the_graph_has_one_op_forward_and_one_backward(each_bridge: str) -> None:
    layer = BatchNormalization(activation="relu")
    layer.build((None, 8))

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x, training=True) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    def ours(f: Callable[..., Any]) -> list[str]:
        graph = tf.function(f).get_concrete_function(tf.TensorSpec([None, 8])).graph
        return [op.type for op in graph.get_operations() if "PyFunc" in op.type or "Bnfast" in op.type]

    wanted = {"numpy_function": ["PyFuncStateless"] * 2, "op": ["BnfastTrain", "BnfastGrad"]}
    assert ours(step.python_function) == wanted[each_bridge]
    assert ours(lambda x: layer(x, training=False)) == []
    assert ours(lambda x: layer(x)) == []


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_many_host_threads(graph: bool, rng: np.random.Generator) -> None:
    inputs = [tf.constant(rng.normal(size=(8, 6, 6, 16)), "float32") for _ in range(8)]

    def run(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = ops.train(x)[0]
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x)

    f = tf.function(run) if graph else run
    wanted = [[t.numpy().tobytes() for t in f(x)] for x in inputs]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            wrong.extend(i for _ in range(20) if [t.numpy().tobytes() for t in f(inputs[i])] != wanted[i])
        except Exception as error:  # an exception in a thread would be lost
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_a_kernel_error_keeps_its_message(each_bridge: str) -> None:
    x, wrong = tf.ones([4, 3]), tf.ones([2])
    eager = ValueError if each_bridge == "numpy_function" else tf.errors.InvalidArgumentError
    with pytest.raises(eager, match=r"gamma must have shape \(3,\)"):
        ops.train(x, wrong)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"gamma must have shape \(3,\)"):
        tf.function(ops.train)(x, wrong)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_reference_equals_the_kernels(dtype: str, rng: np.random.Generator) -> None:
    """`reference` (second-order gradients, per-channel masks) computes the same with TensorFlow's ops."""
    values, mask = rng.normal(2, 3, (6, 5, 4)), rng.random((6, 5, 1)) < 0.5
    values[~mask[..., 0], 1] = np.nan  # masked, so it must not reach the statistics
    x, mask = tf.cast(values, dtype), tf.constant(mask)
    parameters = [tf.constant(rng.uniform(0.5, 2, 4)) for _ in range(4)]
    options = Options(activation="relu6")
    given = Batch(x, *parameters[:2], mask), tuple(parameters[2:]), 0.9, options
    ours = ops.train_step(*given)
    tolerance = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3}[dtype]
    for actual, wanted in zip(reference.train_step(*given), ours, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)
