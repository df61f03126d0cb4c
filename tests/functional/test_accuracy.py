"""Invariant 2: no digits are lost, at any offset of the values. References are computed in float64 (long double for
float64 input) from the stored input, so the rounding of the input itself does not count.

Bounds are in epsilons of the kernels' compute type (float32 for half types). Each bound has its reason beside it.
"""

import math

import bnfast
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from bnfast import _core

# (shape, axis): columns (few, some, many channels), rows (short, pairs, long), a dense layer, one channel.
LAYOUTS = [
    ((6000, 3), -1),
    ((9, 13, 17, 24), -1),
    ((3000, 130), -1),
    ((64, 300), -1),
    ((6, 23, 14, 14), 1),
    ((2000, 5, 2), 1),
    ((3000, 4, 7), 1),
    ((3, 4, 9001), 1),
    ((50000, 1), 1),
]
ids = [str(shape) for shape, _ in LAYOUTS]


def normal(shape, axis, dtype, ratio, seed=0):
    """Channels of different standard deviation, each with |mean|/std = ratio."""
    rng = np.random.default_rng(seed)
    channels = [1] * len(shape)
    channels[axis] = shape[axis]
    deviation = rng.uniform(0.5, 2, channels)
    if np.dtype(dtype).name == "float16":
        deviation = deviation * min(1.0, 2e4 / max(ratio, 1))  # the largest float16 is 65504
    sign = rng.choice([-1, 1], channels)
    return (deviation * (rng.standard_normal(shape) + ratio * sign)).astype(dtype)


def variance_error(x, axis):
    """The largest relative error of the variance of a channel."""
    _, _, expected = numpy_reference.moments(x, axis=axis)
    variance = bnfast.moments(x, axis=axis).variance
    assert (expected > 0).all()
    return float(np.abs(variance / expected - 1).max())


# At 1e6 float32's bound is looser: its values are 0.06 standard deviations apart, and a block's center is one of them.
@pytest.mark.parametrize(
    ("dtype", "ratio", "bound"),
    [
        ("float32", 0, 1e-6),
        ("float32", 1e2, 1e-6),
        ("float32", 1e4, 1e-6),
        ("float32", 1e6, 1e-5),
        *[("float64", ratio, 1e-12) for ratio in (0, 1e2, 1e4, 1e6)],
        ("float16", 0, 1e-6),
        ("float16", 1e2, 1e-6),
        ("bfloat16", 0, 1e-6),
        ("bfloat16", 1e2, 1e-6),
    ],
)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=ids)
def test_variance_of_an_offset(shape, axis, dtype, ratio, bound):
    assert variance_error(normal(shape, axis, sample_data.dtype_of(dtype), ratio), axis) <= bound


def sample_steps(step, shape, axis):
    """The units in which a block's center sample may be taken, by name: the index of each value's unit.

    `step` is the position of a value in its channel."""
    inner = math.prod(shape[axis % len(shape) + 1 :])
    return {"row": step, "64": step // 64, "sample": step // inner, "64 of a row": step % inner // 64}


def adversaries(shape, axis, dtype):
    """Inputs designed to break a variance, by name. Each channel is a column of r, in reading order."""
    rng = np.random.default_rng(5)
    channels = shape[axis]
    count = math.prod(shape) // channels
    r = rng.standard_normal((count, channels))
    step = np.arange(count)[:, None]

    def made(values):
        moved = [shape[i] for i in range(len(shape)) if i != axis % len(shape)]
        return np.ascontiguousarray(np.moveaxis(values.reshape(*moved, channels), -1, axis)).astype(dtype)

    first = r.copy()
    first[0] = 1e4  # the value that all others are shifted by
    yield "first value 1e4 sigma away", made(first)
    each = r.copy()
    each[::512] = -1e4
    yield "such values here and there", made(each)
    yield "sorted", made(np.sort(r, axis=0) + 1e3)
    yield "trend", made(1e3 + 0.1 * step + r)
    yield "two clusters", made(np.where(step % 2, 1e4, -1e4) + r)
    yield "two clusters, one after the other", made(np.where(step < count // 2, 1e4, -1e4) + r)
    others = np.arange(channels) % 2 == 1  # channels whose centers are good and need not move
    for name, place in sample_steps(step, shape, axis).items():
        apart = np.where(place % 4, 1e4, 1e4 + 1.7) + 1e-3 * r
        yield f"every fourth {name} apart", made(np.where(others, r - 1e4, apart))
    yield "one huge value", made(np.where(step == count // 2, 1e15, r))
    yield "two neighbouring values", made(np.where(rng.random(r.shape) < 0.3, 1000.0, 1000.0 + 2.0**-10))
    yield "a few values on a coarse grid", made(np.round(r * 4) / 4 * 1.1 + 100)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=ids)
def test_variance_of_adversaries(shape, axis, dtype):
    errors = {name: variance_error(x, axis) for name, x in adversaries(shape, axis, dtype)}
    bound = 5e-7 if dtype == "float32" else 1e-12  # half of the promised bound, because a bad center is moved
    assert {name: error for name, error in errors.items() if not error <= bound} == {}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=ids)
def test_variance_with_distant_low_weight_values(shape, axis, dtype):
    """Every fourth unit of a block's center sample has almost no weight and is 1e4 deviations away."""
    x = normal(shape, axis, dtype, 0)
    last = np.moveaxis(x, axis, -1)
    step = np.arange(last[..., 0].size).reshape(last.shape[:-1])
    for place in sample_steps(step, shape, axis).values():
        far = place % 4 == 0
        if far.all():
            continue
        shifted = np.moveaxis(last + 1e4 * far[..., None].astype(dtype), -1, axis)
        mask = np.where(far, 1e-9, 1.0)
        _, _, expected = numpy_reference.moments(shifted, axis=axis, mask=mask.astype(dtype))
        variance = bnfast.moments(np.ascontiguousarray(shifted), axis=axis, mask=mask).variance
        assert np.abs(variance / expected - 1).max() <= (1e-6 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=ids)
def test_a_constant_channel_has_variance_zero(shape, axis, dtype):
    dtype = sample_data.dtype_of(dtype)
    channels = [1] * len(shape)
    channels[axis] = shape[axis]
    values = np.resize([0.1, -3.3e4, 1e-5, 0.0, 1 / 3, 1e-40, 6e4], channels).astype(dtype)
    x = np.ascontiguousarray(np.broadcast_to(values, shape))
    mask = np.resize([0.3, 0.0, 1.7], [n for i, n in enumerate(shape) if i != axis % len(shape)])
    for weights in (None, mask):
        moments = bnfast.moments(x, axis=axis, mask=weights)
        assert np.array_equal(moments.variance, np.zeros(shape[axis]))
        assert np.array_equal(moments.mean, values.reshape(-1).astype(np.float64))
    y = bnfast.batch_norm_train(x, axis=axis, epsilon=0.0).y
    assert np.array_equal(y.astype(np.float64), np.zeros(shape))


# Half types have 3 digits: at 1e4 all values would round to one or two numbers.
@pytest.mark.parametrize(
    ("dtype", "ratio"), [(d, r) for d in sample_data.DTYPES for r in (0, 1e2, 1e4) if r < 1e4 or "16" not in d]
)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS, ids=ids)
def test_forward_and_backward_at_an_offset(shape, axis, dtype, ratio):
    """Bounds, relative to the size of the terms:

    mean: 2 eps of a standard deviation, the size of the summed x - c.
    y: 4 eps of |gamma|*(|xhat| + 1) + |beta|: half an eps for each of two roundings of the difference and product, one
       each of scale, shift and sum, and half of the variance's relative error.
    dbeta, dgamma: 2 eps of sum|dy| and sum|dy|*(|xhat| + 1): lanes of at most 64 additions, then float64.
    dx: 4 eps of |gamma|*invstd*(|dy| + mean|dy| + (|xhat| + 1)*mean|dy*(|xhat| + 1)|).
    """
    dtype = sample_data.dtype_of(dtype)
    rng = np.random.default_rng(3)
    x = normal(shape, axis, dtype, ratio, 3)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta, _, _ = sample_data.vectors(shape[axis], rng, np.float64 if dtype == np.float64 else np.float32)
    epsilon = 1e-3
    wide = numpy_reference.wide_dtype(x)
    expected = numpy_reference.train(x, gamma, beta, axis=axis, epsilon=epsilon)
    result = bnfast.batch_norm_train(x, gamma, beta, axis=axis, epsilon=epsilon)
    eps = tolerances.compute_eps(dtype)
    # float64 input: a mean of 1e4 deviations is itself rounded by 1e4*2**-53 deviations
    slack = eps + float(np.finfo(np.float64).eps) * ratio * 4
    assert np.max(np.abs(result.mean - expected.mean) / np.sqrt(expected.variance)) <= 2 * slack

    xhat = np.abs(numpy_reference.preactivation(x, expected.mean, expected.invstd, axis=axis))
    g, b = (np.abs(tolerances.per_channel(v, x, axis)).astype(wide) for v in (gamma, beta))
    size = g * (xhat + 1) + b
    stored = tolerances.storage_eps(dtype) / 2 if dtype.itemsize == 2 else 0.0
    error = np.abs(result.y.astype(wide) - expected.y) - stored * np.abs(expected.y) - tolerances.tiny(dtype)
    assert np.max(error / size) <= 4 * slack

    closed = numpy_reference.grad(dy, x, expected.mean, expected.invstd, gamma, beta, axis=axis)
    grad = bnfast.batch_norm_grad(dy, x, result.mean, result.invstd, gamma, beta, axis=axis)
    other = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    d = np.abs(dy.astype(wide))
    sum_d, sum_dx = d.sum(other), (d * (xhat + 1)).sum(other)
    assert np.max(np.abs(grad.dbeta.astype(wide) - closed.dbeta) / sum_d) <= 2 * eps
    assert np.max(np.abs(grad.dgamma.astype(wide) - closed.dgamma) / sum_dx) <= 2 * slack
    count = x.size / shape[axis]
    scale = g * tolerances.per_channel(expected.invstd, x, axis)
    mean_d, mean_dx = (tolerances.per_channel(v, x, axis) / count for v in (sum_d, sum_dx))
    size = scale * (d + mean_d + (xhat + 1) * mean_dx)
    error = np.abs(grad.dx.astype(wide) - closed.dx) - stored * np.abs(closed.dx) - tolerances.tiny(dtype)
    assert np.max(error / size) <= 4 * slack


# Up to 2**50: squares of differences must stay below float32's 3.4e38 (a value 1e19 away makes the variance infinite).
finite = st.floats(-(2.0**50), 2.0**50, width=32)
close = st.builds(lambda base, ulps: base * (1 + ulps * 2.0**-23), st.just(1234.5), st.integers(-3, 3))
arrays = hypothesis.extra.numpy.arrays(
    np.float32,
    hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=4, max_side=9),
    elements=st.one_of(finite, close, st.sampled_from([0.0, -0.0, 1.0, 1e-45, 1e-38])),
)


@hypothesis.given(arrays, st.data())
def test_variance_is_never_negative_and_always_near(x, data):
    axis = data.draw(st.integers(0, x.ndim - 1))
    weights = None
    if data.draw(st.booleans()):
        shape = [n for i, n in enumerate(x.shape) if i != axis]
        elements = st.sampled_from([0.0, 0.25, 1.0, 3.0])
        weights = data.draw(hypothesis.extra.numpy.arrays(np.float32, tuple(shape), elements=elements))
    moments = bnfast.moments(x, axis=axis, mask=weights)
    count, _, expected = numpy_reference.moments(x, axis=axis, mask=weights)
    assert moments.count == count
    assert (moments.variance >= 0).all()
    # 2e-6: 64 additions that all round the same way by half an eps; 1e-37: squares below float32's smallest normal
    assert (np.abs(moments.variance - expected) <= 2e-6 * expected + 1e-37).all()
    result = bnfast.batch_norm_train(x, axis=axis)
    assert np.isfinite(result.y).all()


def test_teams_and_instruction_sets_share_these_bounds():
    """The bounds above are checked with this machine's default. The others have the same bits, so they hold there."""
    x = normal((6000, 3), -1, "float32", 1e4)
    expected = bnfast.moments(x)
    for isa in bnfast.build_info()["isas"]:
        _core._set_isa(isa)
        try:
            assert np.array_equal(bnfast.moments(x).variance, expected.variance)
        finally:
            _core._set_isa(None)
