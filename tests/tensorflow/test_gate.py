"""The gradient of y = activation(bn(x) + residual): values, tensors kept for it, and buffers it may overwrite.

The gate is the slope of the activation: dresidual = dy * gate. It is computed from y, so the residual is not kept.
"""

from collections.abc import Callable
from typing import Any

import bnfast
import numpy as np
import pytest

pytest.importorskip("tensorflow")
import tensorflow as tf
from bnfast.keras import BatchNormalizationAdd, LayerNormalization
from bnfast.tensorflow import ops, reference
from bnfast.tensorflow.batch import Batch, Options
from taped import made

pytestmark = pytest.mark.usefixtures("each_bridge")

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": tf.nn.relu,
    "relu6": tf.nn.relu6,
    "leaky_relu": lambda z: tf.where(z > 0, z, 0.3 * z),
}


def forward_tensors_read(graph: Any, dy: Any, like: tuple[int, ...]) -> set[str]:
    """Names of the forward tensors of this shape that the backward pass reads: inputs of ops that depend on dy."""
    backward, found = {dy.op}, set()
    for op in graph.get_operations():  # in topological order
        if not backward.isdisjoint([*(tensor.op for tensor in op.inputs), *op.control_inputs]):
            backward.add(op)
            found |= {source(t) for t in op.inputs if t.op not in backward and t.shape == like}
    return found


def source(tensor: Any) -> str:
    """The name of the tensor behind Identity and similar ops."""
    while tensor.op.type in ("Identity", "IdentityN", "StopGradient"):
        tensor = tensor.op.inputs[tensor.value_index]
    return str(tensor.name)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_keeps_y_and_not_the_residual(activation: Any) -> None:
    shape = (4, 6, 5)
    layer = made([shape, shape], BatchNormalizationAdd, activation=activation)
    names = {}

    @tf.function(input_signature=[tf.TensorSpec(shape)] * 3)
    def step(x: Any, residual: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = layer([x, residual], training=True)
        names.update(x=source(x), y=source(y), residual=source(residual), dy=dy.name)
        return tape.gradient(y, [x, residual, layer.gamma.value], output_gradients=dy)

    graph = step.get_concrete_function().graph
    found = forward_tensors_read(graph, graph.get_tensor_by_name(names["dy"]), shape)
    assert found == ({names["x"]} if activation is None else {names["x"], names["y"]})
    assert names["residual"] not in found


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_order_gradients(activation: str, rng: np.random.Generator) -> None:
    """With respect to x, gamma, beta and residual, with a mask: of a loss, and of the sum of its squared gradients."""
    x, residual, weights = (tf.constant(rng.normal(1, 3, (23, 4))) for _ in range(3))
    mask = tf.constant(rng.uniform(size=(23, 1)) > 0.2)
    sources = [x, *(tf.constant(rng.uniform(0.5, 2, 4)) for _ in range(2)), residual]
    zeros = tf.zeros(4, tf.float64)

    def ours(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        batch = Batch(x, gamma, beta, mask, residual)
        return ops.train_step(batch, (zeros, zeros), 0.9, Options(-1, 1e-3, activation, 0.3))[0]

    def plain(x: Any, gamma: Any, beta: Any, residual: Any) -> Any:
        some = tf.boolean_mask(x, mask[:, 0])
        mean = tf.reduce_mean(some, 0)
        variance = tf.reduce_mean((some - mean) ** 2, 0)
        return ACTIVATIONS[activation](gamma * (x - mean) / tf.sqrt(variance + 1e-3) + beta + residual)

    def both(step: Any) -> Any:
        with tf.GradientTape() as outer:
            outer.watch(sources)
            with tf.GradientTape() as inner:
                inner.watch(sources)
                loss = tf.reduce_sum(weights * step(*sources) ** 2)
            first = inner.gradient(loss, sources)
            penalty = tf.add_n([tf.reduce_sum(gradient**2) for gradient in first])
        return first + outer.gradient(penalty, sources)

    wanted = both(plain)
    y = plain(*sources).numpy()
    assert (y <= 0).any()  # somewhere the gate must be closed
    assert (y == 6).any() == (activation == "relu6")
    for run in (both, tf.function(both)):
        for actual, right in zip(run(ours), wanted, strict=True):
            np.testing.assert_allclose(actual, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_equals_the_kernels_at_nan_infinity_and_bounds(activation: str, value: float) -> None:
    """NaN, infinity or a bound in the residual: dresidual and its derivative with respect to dy have the same gate."""
    x, dy = tf.constant([[-1.0], [1.0], [1.0], [-1.0]]), tf.ones([4, 1])
    # x + residual: 1 + 5 is the upper bound of relu6, -1 + 1 the lower one
    residual = tf.constant([[value], [2.0], [5.0 if value == 0 else 7.0], [1.0]])
    options = Options(-1, 0.0, activation, 0.25)
    with tf.GradientTape() as outer:
        outer.watch(dy)
        with tf.GradientTape() as inner:
            inner.watch(residual)
            y = ops.train_step(Batch(x, residual=residual), (tf.zeros(1), tf.ones(1)), 0.9, options)[0]
        dresidual = inner.gradient(y, residual, output_gradients=dy)
    wanted = bnfast.batch_norm_grad(
        *(dy.numpy(), x.numpy(), np.zeros(1), np.ones(1)),
        activation=activation,
        negative_slope=0.25,
        residual=residual.numpy(),
    )
    np.testing.assert_array_equal(dresidual, wanted.dresidual)
    np.testing.assert_array_equal(outer.gradient(dresidual, dy), wanted.dresidual)


@pytest.mark.parametrize("held", [False, True])
def test_only_buffers_nobody_reads_are_reused(held: bool, each_bridge: str, rng: np.random.Generator) -> None:
    """dx takes the buffer of dy and dresidual that of x, unless the program still reads them. Same bits either way."""
    shape, zeros = (8, 9, 9, 20), tf.zeros(20)
    v, w, u = (rng.normal(1, 2, shape).astype("float32") for _ in range(3))

    def pointer(tensor: Any) -> Any:
        return tf.numpy_function(lambda array: np.int64(array.__array_interface__["data"][0]), [tensor], tf.int64)

    @tf.function
    def run(v: Any, w: Any, u: Any) -> Any:
        x, residual = v * 2.0, w + 1.0
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = ops.train_step(Batch(x, residual=residual), (zeros, zeros), 0.9, Options(activation="relu"))[0]
        with tf.control_dependencies([y]):
            dy = u - 1.0
        places = [pointer(dy), pointer(x)]
        with tf.control_dependencies(places):
            dx, dresidual = tape.gradient(y, [x, residual], output_gradients=tf.identity(dy))
        places += [pointer(dx), pointer(dresidual)]
        return places, [dx, dresidual], [x, residual, y, dy] if held else []

    given = [tf.constant(array) for array in (v, w, u)]
    places, gradients, others = run(*given)
    x, residual, dy = v * 2, w + 1, u - 1
    train = bnfast.batch_norm_train(x, activation="relu", residual=residual)
    grad = bnfast.batch_norm_grad(dy, x, train.mean, train.invstd, activation="relu", y=train.y)
    for actual, right in zip(gradients, (grad.dx, grad.dresidual), strict=True):
        assert actual.numpy().tobytes() == right.tobytes()
    for actual, right in zip(others, (x, residual, train.y, dy), strict=False):
        assert actual.numpy().tobytes() == right.tobytes()
    for tensor, array in zip(given, (v, w, u), strict=True):
        assert tensor.numpy().tobytes() == array.tobytes()
    dy_at, x_at, dx_at, dresidual_at = (int(place) for place in places)
    assert ((dx_at, dresidual_at) == (dy_at, x_at)) == (each_bridge == "op" and not held)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_dy_may_be_sparse(activation: Any, rng: np.random.Generator) -> None:
    """The gradient of tf.gather is an IndexedSlices, and eager tapes pass it on unconverted."""
    x, residual = (tf.constant(rng.normal(size=(7, 3))) for _ in range(2))
    zeros, options = tf.zeros(3, tf.float64), Options(activation=activation)

    def run(step: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            y = step(Batch(x, residual=residual), (zeros, zeros), 0.9, options)[0]
            rows = tf.gather(y, [0, 2, 2])
        return [tf.convert_to_tensor(gradient) for gradient in tape.gradient(rows, [x, residual])]

    for actual, wanted in zip(run(ops.train_step), run(reference.train_step), strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-12)


def test_dy_of_a_layer_norm_may_be_sparse(rng: np.random.Generator) -> None:
    x = tf.constant(rng.normal(size=(512, 1024)), tf.float32)  # large enough for the kernels
    first = []
    for layer in (LayerNormalization(), tf.keras.layers.LayerNormalization()):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.gather(layer(x, training=True), [0, 2]) ** 3)
        first.append(tape.gradient(loss, x))
    np.testing.assert_allclose(*first, atol=1e-4)
