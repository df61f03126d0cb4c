"""momentum and epsilon as tensors: the results of floats on both bridges, derivatives, errors, memory per value."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.tensorflow import ops, scalars
from bnfast.tensorflow.batch import Batch, Options

EACH_BRIDGE = pytest.mark.usefixtures("each_bridge")


def step(x: Any, vectors: Any, momentum: Any, epsilon: Any, mask: Any = None) -> Any:
    """y, the moving statistics, the gradients, and the gradients of a gradient."""
    gamma, beta, mean, variance = vectors
    sources = [x, gamma, beta]
    with tf.GradientTape() as outer:
        outer.watch(sources)
        with tf.GradientTape() as inner:
            inner.watch(sources)
            batch = Batch(x, gamma, beta, mask)
            y, *moving = ops.train_step(batch, (mean, variance), momentum, Options(1, epsilon, "leaky_relu"))
        gradients = inner.gradient(y, sources, output_gradients=tf.cos(x))
    return [y, *moving, *gradients, *outer.gradient(gradients[0], sources, output_gradients=tf.sin(x))]


@EACH_BRIDGE
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_tensors_give_the_bits_of_floats(dtype: str, masked: bool, rng: np.random.Generator) -> None:
    x = tf.cast(rng.normal(1, 2, (6, 4, 3)), dtype)
    vectors = [tf.constant(rng.uniform(0.5, 2, 4), "float64" if dtype == "float64" else "float32") for _ in range(4)]
    mask = tf.constant(rng.random((6, 1, 3)) < 0.7) if masked else None
    traced = tf.function(step)
    for momentum, epsilon in ((1 / 3, 0.1), (0.0, 0.0), (1.0, 2.0)):
        wanted = step(x, vectors, momentum, epsilon, mask)
        pair = tf.constant(momentum, tf.float64), tf.constant(epsilon, tf.float64)
        for actual in (step(x, vectors, *pair, mask), traced(x, vectors, *pair, mask)):
            for a, b in zip(actual[:6], wanted[:6], strict=True):
                assert tf.io.serialize_tensor(a).numpy() == tf.io.serialize_tensor(b).numpy()
            for a, b in zip(actual[6:], wanted[6:], strict=True):
                np.testing.assert_allclose(tf.cast(a, "float64"), tf.cast(b, "float64"), rtol=1e-5, atol=1e-5)
    assert traced.experimental_get_tracing_count() == 1


@EACH_BRIDGE
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_the_second_derivative_reads_epsilon(graph: bool) -> None:
    """The same second derivative from TensorFlow's own ops, with an epsilon that is far from the default."""
    x, gamma = tf.constant([[1.0, 2.0], [3.0, 5.0], [-1.0, 0.5]], tf.float64), tf.constant([1.5, -0.5], tf.float64)
    zeros, epsilon = tf.zeros(2, tf.float64), tf.Variable(0.7, dtype=tf.float64)

    def second(normalize: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = normalize()
            dx = inner.gradient(y, x, output_gradients=tf.cos(x))
        return outer.gradient(dx, x, output_gradients=tf.sin(x))

    def ours() -> Any:
        return ops.train_step(Batch(x, gamma), (zeros, zeros), 0.5, Options(-1, epsilon.read_value()))[0]

    def theirs() -> Any:
        centered = x - tf.reduce_mean(x, 0)
        return gamma * centered / tf.sqrt(tf.reduce_mean(centered**2, 0) + epsilon)

    actual = (tf.function(second) if graph else second)(ours)
    np.testing.assert_allclose(actual, second(theirs), rtol=1e-10, atol=1e-12)


@EACH_BRIDGE
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("momentum", "epsilon", "message"),
    [
        (1.5, 0.1, r"momentum must (be|lie) in \[0, 1\]. Received: 1.5"),
        (0.5, -1.0, "epsilon must be finite and (>= 0|at least 0). Received: -1"),
        (0.5, float("nan"), "epsilon must be finite and (>= 0|at least 0). Received: nan"),
        ([0.5], 0.1, r"momentum must be a scalar. Received: shape \(1,\)"),
        (0.5, [[0.1]], r"epsilon must be a scalar. Received: shape \(1, 1\)"),
    ],
)
def test_values_are_checked_when_the_kernel_runs(graph: bool, momentum: Any, epsilon: Any, message: str) -> None:
    x, one = tf.ones((4, 3)), tf.ones(3)

    def run(momentum: Any, epsilon: Any) -> Any:
        return ops.train_step(Batch(x, one, one), (one, one), momentum, Options(-1, epsilon))

    unknown = tf.TensorSpec(None, tf.float64)
    function = tf.function(run, input_signature=[unknown, unknown]) if graph else run
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        function(tf.constant(momentum, tf.float64), tf.constant(epsilon, tf.float64))


def test_a_config_holds_numbers() -> None:
    assert scalars.current("momentum", 1) == 1.0
    assert scalars.current("momentum", tf.Variable(0.25)) == 0.25
    assert scalars.current("epsilon", tf.constant(0.5)) == 0.5
    with tf.Graph().as_default(), pytest.raises(ValueError, match="momentum must have a value where it is written"):
        scalars.current("momentum", tf.compat.v1.placeholder(tf.float32, []))


MEMORY = """
import gc, resource
import tensorflow as tf
from bnfast.tensorflow import ops
from bnfast.tensorflow.batch import Batch, Options

x, one = tf.ones((64, 32)), tf.ones(32)

def grown(momentums):
    gc.collect()
    before = int(open("/proc/self/statm").read().split()[1])
    for momentum in momentums:
        ops.train_step(Batch(x, one, one), (one, one), momentum, Options(epsilon=1 - momentum), "op")
    gc.collect()
    return (int(open("/proc/self/statm").read().split()[1]) - before) * resource.getpagesize() / 2**20

grown([0.5] * 500)
print(grown([0.5] * 500), grown([i / 500 for i in range(500)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_distinct_values_in_eager_mode_add_no_memory() -> None:
    """As attributes of the op, 500 values kept 25 MiB, a kernel in TensorFlow's cache for each."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    same, distinct = map(float, found.stdout.split())
    assert distinct < same + 4
