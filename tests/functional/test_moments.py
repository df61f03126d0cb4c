"""bnfast.moments and Moments.merge."""

import functools

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from bnfast import Moments
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.SHAPES)
def test_agrees_with_reference(shape, axis, dtype):
    rng = np.random.default_rng(1)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    result = bnfast.moments(x, axis=axis)
    assert isinstance(result, Moments)
    assert isinstance(result.count, float)
    count, mean, variance = numpy_reference.moments(x, axis=axis)
    assert result.count == count
    tolerances.check_statistics(
        x, result.mean, result.variance, numpy_reference.Train(None, mean, variance, *[None] * 4)
    )
    mask = rng.integers(0, 3, [1 if i == axis % x.ndim else e for i, e in enumerate(shape)])
    count, mean, variance = numpy_reference.moments(x, axis=axis, mask=mask)
    result = bnfast.moments(x, axis=axis, mask=mask)
    assert result.count == count
    tolerances.check_statistics(
        x, result.mean, result.variance, numpy_reference.Train(None, mean, variance, *[None] * 4)
    )


@pytest.mark.parametrize(("shape", "axis"), sample_data.EMPTY)
def test_empty(shape, axis):
    result = bnfast.moments(np.zeros(shape, np.float32), axis=axis)
    other = [e for i, e in enumerate(shape) if i != axis % len(shape)]
    assert result.count == np.prod(other) or not shape[axis]
    assert np.array_equal(result.mean, np.zeros(shape[axis]))
    assert np.array_equal(result.variance, np.zeros(shape[axis]))


def test_same_as_training():
    x = sample_data.batch((50, 7), 1, np.float32, np.random.default_rng(2))
    result = bnfast.moments(x)
    train = bnfast.batch_norm_train(x)
    assert np.array_equal(result.mean, train.mean)
    assert np.array_equal(result.variance, train.variance)


def test_constant_channel_has_no_variance():
    result = bnfast.moments(np.full((999, 3), 0.1, np.float32))
    assert np.array_equal(result.variance, np.zeros(3))


IDENTITY = Moments(0, 0, 0)


def test_identity():
    some = bnfast.moments(sample_data.batch((9, 4), 1, np.float64, np.random.default_rng(3)))
    empty = bnfast.moments(np.zeros((0, 4)))
    for merged in (IDENTITY.merge(some), some.merge(IDENTITY), some.merge(empty), empty.merge(some)):
        assert merged.count == some.count
        assert np.array_equal(merged.mean, some.mean)
        assert np.array_equal(merged.variance, some.variance)
    assert IDENTITY.merge(IDENTITY) == IDENTITY
    assert IDENTITY.merge(empty).mean.shape == empty.merge(IDENTITY).mean.shape == (4,)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.floats(-1e3, 1e3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_merging_parts_gives_the_moments_of_the_whole(sizes, offset, masked, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(sizes), 5)) + offset
    mask = rng.random(len(x)) if masked else np.ones(len(x))
    cuts = np.cumsum(sizes)[:-1]
    parts = [bnfast.moments(a, mask=w) for a, w in zip(np.split(x, cuts), np.split(mask, cuts), strict=True)]
    merged = functools.reduce(Moments.merge, parts, IDENTITY)
    count, mean, variance = numpy_reference.moments(x, mask=mask)
    assert merged.count == pytest.approx(count, rel=1e-12)
    np.testing.assert_allclose(merged.mean, mean.astype(float), rtol=1e-12, atol=1e-12 * (1 + abs(offset)))
    # the parts' means are rounded to float64: 1e-13 for a mean of 1e3, which is negligible squared
    np.testing.assert_allclose(merged.variance, variance.astype(float), rtol=1e-12, atol=1e-12)


def test_huge_counts_do_not_overflow():
    a = Moments(1e300, np.array([1.0]), np.array([1e10]))
    merged = a.merge(Moments(1e300, np.array([3.0]), np.array([1e10])))
    assert merged.mean == [2]
    np.testing.assert_allclose(merged.variance, 1e10 + 1)


def test_operands_are_not_changed():
    a, b = (bnfast.moments(sample_data.batch((9, 4), 1, np.float64, np.random.default_rng(s))) for s in (4, 5))
    before = [v.copy() for v in (a.mean, a.variance, b.mean, b.variance)]
    a.merge(b)
    for v, kept in zip((a.mean, a.variance, b.mean, b.variance), before, strict=True):
        assert np.array_equal(v, kept)


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        ((1, 2, 3), TypeError, "other must be a Moments. Received: tuple"),
        (Moments(2, np.zeros(3), np.zeros(3)), ValueError, r"other.mean must have shape \(4,\).*Received: \(3,\)"),
        (Moments(-1, np.zeros(4), np.zeros(4)), ValueError, "count must be finite and at least 0. Received: -1"),
        (Moments(np.nan, np.zeros(4), np.zeros(4)), ValueError, "count must be finite and at least 0. Received: nan"),
    ],
)
def test_bad_operands(other, error, text):
    with pytest.raises(error, match=text):
        Moments(2, np.zeros(4), np.zeros(4)).merge(other)


def test_counts_whose_sum_overflows():
    half = Moments(1e308, np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match=r"the sum of both counts must be finite. Received: 1e\+308 and 1e\+308"):
        half.merge(half)
