"""Group, instance and layer norm against their formulas in float64, against torch and against Keras."""

import math

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from group_norm_calls import GROUP_CASES, LAYER_CASES, group_call, inputs, layer_call
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import need_module


def check(x, dy, gamma, forward, backward, expected):
    """Every result against `expected`. Sizes are those of the terms that are added in a row or a column."""
    y, mean, invstd, dx, dgamma, dbeta = expected
    eps = tolerances.compute_eps(x.dtype)
    assert forward.mean.dtype == forward.invstd.dtype == np.float64
    tolerances.close(forward.mean, mean, np.abs(mean) + 1 / np.where(invstd > 0, invstd, 1), 4 * eps, what="mean")
    tolerances.close(forward.invstd, invstd, invstd, 1e-12 if x.dtype == np.float64 else 1e-6, what="invstd")
    top = 1 if gamma is None or not gamma.size else np.abs(gamma).max()
    tolerances.close(forward.y, y, np.abs(y) + 1 + 2 * top, 16 * eps, x.dtype, "y")
    size = np.abs(dx) + top * np.max(invstd, initial=0) * (np.abs(dy).max(initial=0) + 1) * 4
    tolerances.close(backward.dx, dx, size, 16 * eps, x.dtype, "dx")
    parameter = gamma.dtype if gamma is not None else np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    for name, actual, wanted in (("dgamma", backward.dgamma, dgamma), ("dbeta", backward.dbeta, dbeta)):
        assert actual.dtype == parameter
        size = 8 * np.sqrt(x.size / max(wanted.size, 1)) + np.abs(wanted)
        tolerances.close(actual, wanted, size, 16 * eps, parameter, name)
    for result in (forward.y, backward.dx):
        assert result.dtype == x.dtype


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis", "groups"), GROUP_CASES, ids=str)
def test_group_norm_agrees_with_reference(shape, axis, groups, dtype):
    for affine in (True, False):
        x, dy, gamma, beta = inputs(shape, shape[axis], dtype, affine)
        before = x.tobytes(), dy.tobytes()
        expected = numpy_reference.group_norm(x, groups, gamma, beta, axis=axis, dy=dy)
        check(x, dy, gamma, *group_call(x, dy, gamma, beta, axis, groups), expected)
        assert (x.tobytes(), dy.tobytes()) == before


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axes"), LAYER_CASES, ids=str)
def test_layer_norm_agrees_with_reference(shape, axes, dtype):
    for affine in (True, False):
        vector = [shape[a] for a in sorted(a % len(shape) for a in axes)]
        x, dy, gamma, beta = inputs(shape, vector, dtype, affine)
        expected = numpy_reference.layer_norm(x, gamma, beta, axes=axes, dy=dy)
        check(x, dy, gamma, *layer_call(x, dy, gamma, beta, axes), expected)


@given(st.data())
@settings(max_examples=80)
def test_any_shape(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=5)))
    axis = data.draw(st.integers(1, len(shape) - 1))
    channels = shape[axis]
    groups = data.draw(st.sampled_from([g for g in range(1, 10) if channels % g == 0]))
    dtype = data.draw(st.sampled_from(["float32", "float64", "float16"]))
    x, dy, gamma, beta = inputs(shape, channels, dtype, data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    expected = numpy_reference.group_norm(x, groups, gamma, beta, axis=axis, dy=dy)
    check(x, dy, gamma, *group_call(x, dy, gamma, beta, axis, groups), expected)
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    x, dy, gamma, beta = inputs(shape, [shape[a] for a in sorted(axes)], dtype)
    expected = numpy_reference.layer_norm(x, gamma, beta, axes=axes, dy=dy)
    check(x, dy, gamma, *layer_call(x, dy, gamma, beta, axes), expected)


@pytest.mark.parametrize(("offset", "bound"), [(1e4, 1e-6), (1e6, 1e-5)])
def test_large_offsets_cost_no_digits(offset, bound):
    """Invariant 2 for the variance. y keeps its digits because the mean is subtracted in two parts."""
    for shape, axis, groups in GROUP_CASES:
        x, _, gamma, beta = inputs(shape, shape[axis], "float32", offset=offset * 2)
        y, mean, invstd = numpy_reference.group_norm(x, groups, gamma, beta, axis=axis)
        result = bnfast.group_norm(x, groups, gamma, beta, axis=axis)
        tolerances.close(result.mean, mean, np.abs(mean), 1e-9, what="mean")
        tolerances.close(result.invstd, invstd, invstd, bound, what="invstd")
        tolerances.close(result.y, y, np.abs(y) + 4, 16 * bound, what="y")
    for shape, axes in LAYER_CASES:
        x, *_ = inputs(shape, (), "float32", False, offset=offset * 2)
        _, mean, invstd = numpy_reference.layer_norm(x, axes=axes)
        result = bnfast.layer_norm(x, axis=axes)
        tolerances.close(result.invstd, invstd, invstd, bound, what="invstd")


def test_a_constant_row_is_beta():
    beta = np.arange(6, dtype=np.float32)
    y, mean, invstd = bnfast.layer_norm(np.full((4, 6), 3.3, np.float32), None, beta, epsilon=0.0)
    assert (y == beta).all()
    assert (mean == np.float64(np.float32(3.3))).all()
    assert (invstd == 0).all()


# ---- other frameworks ------------------------------------------------------------------------------------------------


def from_torch(function, x, dy, gamma, beta):
    """y, dx, dgamma, dbeta by torch's autograd."""
    torch = need_module("torch")
    tensors = [torch.tensor(np.ascontiguousarray(a), requires_grad=True) for a in (x, gamma, beta)]
    y = function(torch.nn.functional, *tensors)
    y.backward(torch.from_numpy(np.ascontiguousarray(dy)))
    return [y.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * (1 + np.abs(b).max(initial=0)))


@pytest.mark.parametrize(("shape", "axis", "groups"), [c for c in GROUP_CASES if math.prod(c[0]) < 1e5], ids=str)
def test_torch_group_and_instance_norm(shape, axis, groups):
    x, dy, gamma, beta = inputs(shape, shape[axis], "float32")

    def first(a):
        return np.moveaxis(a, axis, 1)

    cases = [(groups, lambda f, t, g, b: f.group_norm(t, groups, g, b, 1e-3))]
    if math.prod(shape) > shape[0] * shape[axis] and len(shape) > 2:
        cases.append((shape[axis], lambda f, t, g, b: f.instance_norm(t, weight=g, bias=b, eps=1e-3)))
    for count, function in cases:
        forward, backward = group_call(x, dy, gamma, beta, axis, count)
        expected = from_torch(function, first(x), first(dy), gamma, beta)
        close([first(forward.y), first(backward.dx), *backward[1:]], expected)


@pytest.mark.parametrize(("shape", "axes"), LAYER_CASES[:6], ids=str)
def test_torch_layer_norm(shape, axes):
    vector = [shape[a] for a in axes]
    x, dy, gamma, beta = inputs(shape, vector, "float32")
    expected = from_torch(lambda f, t, g, b: f.layer_norm(t, vector, g, b, 1e-3), x, dy, gamma, beta)
    forward, backward = layer_call(x, dy, gamma, beta, axes)
    close([forward.y, *backward], expected)


def test_keras_group_and_layer_norm():
    keras = need_module("keras")
    tf = need_module("tensorflow")
    for layer, call, shape, axis, count in (
        (keras.layers.GroupNormalization(3, axis=-1), group_call, (4, 5, 7, 6), -1, [3]),
        (keras.layers.GroupNormalization(-1, axis=1), group_call, (4, 6, 5), 1, [6]),
        (keras.layers.LayerNormalization(axis=-1), layer_call, (4, 5, 6), -1, []),
        (keras.layers.LayerNormalization(axis=[1, 2]), layer_call, (4, 5, 6), (1, 2), []),
    ):
        layer.build(shape)
        x, dy, gamma, beta = inputs(shape, layer.gamma.shape, "float32")
        layer.set_weights([gamma, beta])
        with tf.GradientTape() as tape:
            tensor = tf.constant(x)
            tape.watch(tensor)
            y = layer(tensor)
        gradients = tape.gradient(y, [tensor, *layer.trainable_variables], output_gradients=tf.constant(dy))
        forward, backward = call(x, dy, gamma, beta, axis, *count, epsilon=layer.epsilon)
        close([forward.y, *backward], [y.numpy(), *(np.asarray(g) for g in gradients)])
