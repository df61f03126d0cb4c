"""batch_norm_train and batch_norm_infer against the float64 reference."""

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


def check_train(x, axis, gamma=None, beta=None, moving=(None, None), chosen=False, **options):
    """One call against the reference; returns the result."""
    before = x.tobytes()
    expected = numpy_reference.train(x, gamma, beta, *moving, axis=axis, **options)
    after = tuple(None if a is None else a.copy() for a in moving)
    result = bnfast.batch_norm_train(x, gamma, beta, *after, axis=axis, **options)
    assert isinstance(result, bnfast.TrainResult)
    assert x.tobytes() == before
    tolerances.check_statistics(x, result.mean, result.variance, expected, chosen)
    epsilon = options.get("epsilon", 1e-3)
    if epsilon:
        tolerances.close(result.invstd, 1 / np.sqrt(result.variance + epsilon), result.invstd, 1e-14, what="invstd")
    residual = options.get("residual")
    tolerances.check_output(
        x, result.y, expected.y, expected.mean, expected.invstd, gamma, beta, axis, residual, chosen
    )
    if after[0] is not None:
        eps = tolerances.compute_eps(x.dtype)
        deviation = np.sqrt(expected.variance)
        tolerances.close(
            after[0], expected.moving_mean, np.abs(expected.mean) + deviation, 4 * eps, after[0].dtype, "moving_mean"
        )
        tolerances.close(
            after[1], expected.moving_variance, expected.variance, 40 * eps, after[1].dtype, "moving_variance"
        )
    return result


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.SHAPES)
def test_train_agrees_with_reference(shape, axis, dtype):
    rng = np.random.default_rng(1)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    gamma, beta, *moving = sample_data.vectors(shape[axis], rng)
    check_train(x, axis, gamma, beta, tuple(moving))
    check_train(x, axis)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.SHAPES)
def test_infer_agrees_with_reference(shape, axis, dtype):
    rng = np.random.default_rng(2)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng)
    invstd = numpy_reference.inverse_std(variance.astype(np.float64), 1e-3)
    for g, b in ((gamma, beta), (None, None), (None, beta)):
        y = bnfast.batch_norm_infer(x, mean, variance, g, b, axis=axis)
        expected = numpy_reference.infer(x, mean, variance, g, b, axis=axis)
        tolerances.check_output(x, y, expected, mean, invstd, g, b, axis)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((2, 5, 7, 3), 3), ((700, 3), 1)])
def test_activation_and_residual(shape, axis, activation, with_residual, dtype):
    rng = np.random.default_rng(3)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    residual = sample_data.batch(shape, axis, x.dtype, rng) if with_residual else None
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng)
    gamma *= 4  # relu6's upper bound is reached
    fused = {"activation": activation, "residual": residual, "negative_slope": 0.3}
    check_train(x, axis, gamma, beta, **fused)
    y = bnfast.batch_norm_infer(x, mean, variance, gamma, beta, axis=axis, **fused)
    invstd = numpy_reference.inverse_std(variance.astype(np.float64), 1e-3)
    expected = numpy_reference.infer(x, mean, variance, gamma, beta, axis=axis, **fused)
    tolerances.check_output(x, y, expected, mean, invstd, gamma, beta, axis, residual)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("weigh", ["bool", "uint8", "float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((5, 9, 7, 3), 3), ((4, 6, 5), 0)])
def test_mask(shape, axis, weigh, dtype):
    rng = np.random.default_rng(4)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    gamma, beta, *moving = sample_data.vectors(shape[axis], rng)
    full = tuple(e for i, e in enumerate(shape) if i != axis)
    mask = (rng.integers(0, 4, full) if weigh != "bool" else rng.random(full) < 0.5).astype(sample_data.dtype_of(weigh))
    check_train(x, axis, gamma, beta, tuple(moving), mask=mask, correction=1)
    keepdims = np.expand_dims(mask, axis)
    one = bnfast.batch_norm_train(x, axis=axis, mask=mask)
    assert np.array_equal(bnfast.batch_norm_train(x, axis=axis, mask=keepdims).y, one.y, equal_nan=True)
    first = keepdims[(slice(None), *(slice(0, 1),) * (x.ndim - 1))]  # (N, 1, 1, ...)
    check_train(x, axis, gamma, beta, mask=first)


def test_masked_values_are_ignored_even_if_not_finite():
    x = np.array([[1, 2], [3, 4], [np.nan, np.inf]], np.float32)
    result = bnfast.batch_norm_train(x, mask=np.array([1, 1, 0]))
    assert np.array_equal(result.mean, [2, 3])
    assert np.array_equal(result.variance, [1, 1])
    assert np.isfinite(result.y[:2]).all()
    assert np.isnan(result.y[2, 0])


@pytest.mark.parametrize("parameters", ["float32", "float64"])
@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_parameters_may_be_wider_or_narrower(dtype, parameters):
    rng = np.random.default_rng(5)
    x = sample_data.batch((50, 7), 1, sample_data.dtype_of(dtype), rng)
    gamma, beta, *moving = sample_data.vectors(7, rng, parameters)
    check_train(x, 1, gamma, beta, tuple(moving))
    check_train(x, 1, gamma.astype(np.float32), beta.astype(np.float64), (moving[0].astype(np.float64), moving[1]))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0, 0.5, 0.99, 1])
def test_moving_statistics(momentum, correction):
    rng = np.random.default_rng(6)
    x = sample_data.batch((9, 5), 1, np.float64, rng)
    mean, variance = np.full(5, 3.0), np.full(5, 2.0)
    bnfast.batch_norm_train(x, None, None, mean, variance, momentum=momentum, correction=correction)
    np.testing.assert_allclose(mean, 3 * momentum + x.mean(0) * (1 - momentum), rtol=1e-13)
    np.testing.assert_allclose(variance, 2 * momentum + x.var(0, ddof=correction) * (1 - momentum), rtol=1e-13)


@pytest.mark.parametrize("epsilon", [0, 1e-12, 1e-5, 1.0, 100])
def test_epsilon(epsilon):
    check_train(sample_data.batch((30, 5), 1, np.float32, np.random.default_rng(7)), 1, epsilon=epsilon)


def test_constant_channel_without_epsilon_gives_beta():
    x = np.full((8, 3), 7.25, np.float32)
    beta = np.array([1, -2, 0.5], np.float32)
    result = bnfast.batch_norm_train(x, np.ones(3, np.float32), beta, epsilon=0.0)
    assert np.array_equal(result.variance, np.zeros(3))
    assert np.array_equal(result.invstd, np.zeros(3))
    assert np.array_equal(result.y, np.broadcast_to(beta, x.shape))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
def test_one_value_per_channel_gives_beta(dtype):
    rng = np.random.default_rng(8)
    x = sample_data.batch((1, 23), 1, sample_data.dtype_of(dtype), rng, offset=1e3)
    gamma, beta, *moving = sample_data.vectors(23, rng)
    result = check_train(x, 1, gamma, beta, tuple(moving), correction=1)
    assert np.array_equal(result.y[0], beta.astype(x.dtype))


@pytest.mark.parametrize("policy", ["propagate", "skip_update", "raise"])
@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.EMPTY)
def test_empty_batch_changes_nothing(shape, axis, dtype, policy):
    x = np.zeros(shape, sample_data.dtype_of(dtype))
    channels = shape[axis]
    mean, variance = np.full(channels, 3, np.float32), np.full(channels, 2, np.float32)
    result = bnfast.batch_norm_train(x, None, None, mean, variance, axis=axis, nan_policy=policy)
    assert result.y.shape == shape
    assert result.y.dtype == x.dtype
    assert np.array_equal(result.mean, np.zeros(channels))
    assert np.array_equal(result.variance, np.zeros(channels))
    assert (mean == 3).all()
    assert (variance == 2).all()
    assert bnfast.batch_norm_infer(x, mean, variance, axis=axis).shape == shape


@pytest.mark.parametrize("policy", ["propagate", "skip_update", "raise"])
def test_fully_masked_batch_changes_nothing(policy):
    x = sample_data.batch((6, 4), 1, np.float32, np.random.default_rng(9))
    mean, variance = np.full(4, 3, np.float32), np.full(4, 2, np.float32)
    result = check_train(x, 1, None, None, (mean, variance), mask=np.zeros(6), nan_policy=policy)
    assert np.array_equal(result.mean, np.zeros(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("shape", "axis"), [((40, 5), 1), ((3, 5, 7, 7), 1), ((2, 7, 7, 5), 3)])
def test_nan_policy(shape, axis, bad):
    x = sample_data.batch(shape, axis, np.float32, np.random.default_rng(10))
    clean = bnfast.batch_norm_train(x, axis=axis)
    np.moveaxis(x, axis, 0)[2].flat[7] = bad
    for policy in ("propagate", "skip_update"):
        mean, variance = np.full(5, 3, np.float32), np.full(5, 2, np.float32)
        y = bnfast.batch_norm_train(x, None, None, mean, variance, axis=axis, nan_policy=policy).y
        others = [0, 1, 3, 4]
        assert np.array_equal(np.moveaxis(y, axis, 0)[others], np.moveaxis(clean.y, axis, 0)[others])
        assert np.isnan(np.moveaxis(y, axis, 0)[2].flat[7])
        assert np.isfinite(mean[others]).all()
        assert (mean[others] != 3).all()
        if policy == "skip_update":
            assert (mean[2], variance[2]) == (3, 2)
        else:
            assert np.isnan(variance[2])
    mean, variance, out = np.full(5, 3, np.float32), np.full(5, 2, np.float32), np.full(shape, 9, np.float32)
    with pytest.raises(FloatingPointError, match=r"\b2\b"):
        bnfast.batch_norm_train(x, None, None, mean, variance, axis=axis, nan_policy="raise", out=out)
    assert (mean == 3).all()
    assert (variance == 2).all()
    assert (out == 9).all()


def test_nan_passes_through_activations():
    x = np.array([[np.nan], [1], [-1]], np.float32)
    for activation in sample_data.ACTIVATIONS:
        y = bnfast.batch_norm_infer(x, np.zeros(1), np.ones(1), activation=activation)
        assert np.isnan(y[0, 0])
        assert np.isfinite(y[1:]).all()


@st.composite
def arrays(draw, dtypes=("float32", "float64", "float16")):
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=7))
    bound = {2: 100, 4: 1e4, 8: 1e6}[dtype.itemsize]
    values = st.floats(-bound, bound, width=dtype.itemsize * 8, allow_subnormal=False)
    x = draw(hnp.arrays(dtype, shape, elements=values))
    return x, draw(st.integers(-x.ndim, x.ndim - 1))


@given(arrays(), st.sampled_from(sample_data.ACTIVATIONS), st.booleans())
def test_any_shape_and_values(case, activation, masked):
    x, axis = case
    rng = np.random.default_rng(11)
    gamma, beta, *moving = sample_data.vectors(x.shape[axis], rng)
    mask = None
    if masked:
        full = [1 if i == axis % x.ndim else e for i, e in enumerate(x.shape)]
        mask = rng.integers(0, 3, full)
    check_train(x, axis, gamma, beta, tuple(moving), chosen=True, activation=activation, mask=mask, epsilon=1.0)
