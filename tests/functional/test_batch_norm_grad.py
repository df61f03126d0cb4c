"""batch_norm_grad against the closed form, finite differences, and PyTorch's autograd."""

import bnfast
import numpy as np
import numpy_reference
import pytest
import sample_data
import tolerances
from hypothesis import given
from hypothesis import strategies as st
from numpy_reference import central_differences


def check_grad(x, dy, axis, gamma=None, beta=None, *, training=True, mask=None, moving=None, **options):
    """Forward, backward, and the result against the closed form; returns the result."""
    if training:
        _, mean, _, invstd = bnfast.batch_norm_train(x, axis=axis, mask=mask)
    else:
        mean, invstd = moving[0].astype(np.float64), 1 / np.sqrt(moving[1].astype(np.float64) + 1e-3)
    dy = tolerances.zero_near_kinks(
        dy, x, mean, invstd, gamma, beta, axis, options.get("residual"), options.get("activation")
    )
    before = x.tobytes(), dy.tobytes()
    result = bnfast.batch_norm_grad(
        dy, x, mean, invstd, gamma, beta, axis=axis, training=training, mask=mask, **options
    )
    assert isinstance(result, bnfast.GradResult)
    assert (x.tobytes(), dy.tobytes()) == before
    tolerances.check_gradient(dy, x, result, mean, invstd, gamma, beta, axis, training=training, mask=mask, **options)
    return result


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.SHAPES)
def test_agrees_with_closed_form(shape, axis, dtype):
    rng = np.random.default_rng(1)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    dy = sample_data.batch(shape, axis, x.dtype, rng)
    gamma, beta, *moving = sample_data.vectors(shape[axis], rng)
    check_grad(x, dy, axis, gamma, beta)
    check_grad(x, dy, axis)
    check_grad(x, dy, axis, gamma, beta, training=False, moving=moving)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((2, 5, 7, 3), 3), ((700, 3), 1)])
def test_activation_and_residual(shape, axis, training, activation, with_residual, dtype):
    rng = np.random.default_rng(2)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    dy = sample_data.batch(shape, axis, x.dtype, rng)
    residual = sample_data.batch(shape, axis, x.dtype, rng) if with_residual else None
    gamma, beta, *moving = sample_data.vectors(shape[axis], rng)
    options = {"activation": activation, "residual": residual, "negative_slope": 0.3}
    check_grad(x, dy, axis, gamma * 4, beta, training=training, moving=moving, **options)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((2, 5, 7, 70), 3), ((3, 4, 900), 1)])
def test_y_in_place_of_residual(shape, axis, activation, dtype):
    rng = np.random.default_rng(7)
    x, dy, residual = (sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng) for _ in range(3))
    gamma, beta, *_ = sample_data.vectors(shape[axis], rng)
    kwargs = {"axis": axis, "activation": activation, "negative_slope": 0.3}
    if dtype in ("float32", "float64"):
        gamma *= 4
    else:
        residual *= 0.1  # half types round 5.99 to 6, so z stays below
        gamma *= 0.25
    y, mean, _, invstd = bnfast.batch_norm_train(x, gamma, beta, residual=residual, **kwargs)
    args = dy, x, mean, invstd, gamma, beta
    by_residual = bnfast.batch_norm_grad(*args, residual=residual, **kwargs)
    by_y = bnfast.batch_norm_grad(*args, y=y, **kwargs)
    for name, expected in by_residual._asdict().items():
        np.testing.assert_array_equal(getattr(by_y, name), expected, err_msg=name)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((5, 9, 7, 3), 3), ((4, 6, 5), 0)])
def test_mask(shape, axis, training, activation, dtype):
    rng = np.random.default_rng(3)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    dy = sample_data.batch(shape, axis, x.dtype, rng)
    gamma, beta, *moving = sample_data.vectors(shape[axis], rng)
    full = tuple(e for i, e in enumerate(shape) if i != axis)
    mask = rng.integers(0, 4, full).astype(np.float32)
    check_grad(x, dy, axis, gamma, beta, mask=mask, training=training, moving=moving, activation=activation)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((5, 9, 7, 3), 3)])
def test_gradients_of_the_statistics(shape, axis, masked, dtype):
    rng = np.random.default_rng(4)
    x = sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng)
    dy = sample_data.batch(shape, axis, x.dtype, rng)
    gamma, beta, dmean, dvariance = sample_data.vectors(shape[axis], rng)
    full = [1 if i == axis else e for i, e in enumerate(shape)]
    mask = rng.integers(0, 3, full) if masked else None
    both = {"dmean": dmean, "dvariance": dvariance.astype(np.float64)}
    for names in (["dmean"], ["dvariance"], ["dmean", "dvariance"]):
        some = {name: both[name] for name in names}
        check_grad(x, dy, axis, gamma, beta, mask=mask, **some)
        check_grad(x, dy, axis, gamma, beta, mask=mask, activation="leaky_relu", **some)
    frozen = check_grad(x, dy, axis, gamma, beta, training=False, moving=(dmean, dvariance))
    with_both = check_grad(
        x, dy, axis, gamma, beta, training=False, moving=(dmean, dvariance), dmean=dmean, dvariance=dvariance
    )
    assert np.array_equal(frozen.dx, with_both.dx)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", sample_data.ACTIVATIONS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 3), 1), ((2, 3, 5), 1)])
def test_agrees_with_finite_differences(shape, axis, activation, masked, training):
    rng = np.random.default_rng(5)
    x, residual, c = (sample_data.batch(shape, axis, np.float64, rng) for _ in range(3))
    gamma, beta, cm, cv = sample_data.vectors(3, rng, np.float64)
    gamma *= 3
    mask = rng.integers(0, 3, [1 if i == axis else e for i, e in enumerate(shape)]) if masked else None
    fused = {"axis": axis, "activation": activation, "residual": residual}
    moving = np.array([0.3, -0.2, 0.1]), np.array([1.5, 0.7, 1.0])

    def loss():
        if not training:
            return float((c * bnfast.batch_norm_infer(x, *moving, gamma, beta, **fused)).sum())
        y, mean, variance, _ = bnfast.batch_norm_train(x, gamma, beta, mask=mask, **fused)
        return float((c * y).sum() + (cm * mean).sum() + (cv * variance).sum())

    _, mean, _, invstd = bnfast.batch_norm_train(x, axis=axis, mask=mask)
    extra = {"dmean": cm, "dvariance": cv, "mask": mask}
    if not training:
        mean, invstd, extra = moving[0], 1 / np.sqrt(moving[1] + 1e-3), {"mask": mask}
    z = numpy_reference.preactivation(x, mean, invstd, gamma, beta, axis=axis, residual=residual)
    assert min(np.abs(z).min(), np.abs(z - 6).min()) > 1e-4, (
        "choose another seed: a pre-activation is within h of a kink"
    )
    result = bnfast.batch_norm_grad(c, x, mean, invstd, gamma, beta, training=training, **fused, **extra)
    for name, a in (("dx", x), ("dgamma", gamma), ("dbeta", beta), ("dresidual", residual)):
        np.testing.assert_allclose(
            getattr(result, name), central_differences(loss, a), rtol=1e-6, atol=2e-7, err_msg=name
        )


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), sample_data.EMPTY)
def test_empty_batch(shape, axis, dtype):
    x = np.zeros(shape, sample_data.dtype_of(dtype))
    zero = np.zeros(shape[axis])
    result = bnfast.batch_norm_grad(x, x, zero, zero, axis=axis)
    assert result.dx.shape == shape
    assert np.array_equal(result.dgamma, zero)
    assert np.array_equal(result.dbeta, zero)


def test_one_value_per_channel_has_no_gradient_to_x():
    x = np.full((1, 5), 3, np.float32)
    check = check_grad(x, np.ones_like(x), 1)
    assert np.array_equal(check.dx, np.zeros_like(x))
    assert np.array_equal(check.dbeta, np.ones(5))


def test_fully_masked_batch():
    rng = np.random.default_rng(6)
    x, dy = (sample_data.batch((6, 4), 1, np.float32, rng) for _ in range(2))
    _, mean, _, invstd = bnfast.batch_norm_train(x, mask=np.zeros(6))
    result = bnfast.batch_norm_grad(dy, x, mean, invstd, mask=np.zeros(6), dmean=np.ones(4), dvariance=np.ones(4))
    assert np.isfinite(result.dx).all()
    tolerances.check_gradient(dy, x, result, mean, invstd, mask=np.zeros(6))


def test_infinite_dy_is_not_an_error():
    x = sample_data.batch((9, 3), 1, np.float32, np.random.default_rng(7))
    dy = np.ones_like(x)
    dy[4, 1] = np.inf
    _, mean, _, invstd = bnfast.batch_norm_train(x)
    result = bnfast.batch_norm_grad(dy, x, mean, invstd)
    assert not np.isfinite(result.dx[:, 1]).any()
    assert np.isfinite(result.dx[:, [0, 2]]).all()


def test_dtype_of_the_parameter_gradients():
    x = np.ones((4, 3), np.float32)
    single, double = np.ones(3, np.float32), np.ones(3)
    for gamma, beta, wanted in (
        (single, double, "f4"),
        (double, single, "f8"),
        (None, double, "f8"),
        (None, None, "f4"),
    ):
        result = bnfast.batch_norm_grad(x, x, double, double, gamma, beta)
        assert result.dgamma.dtype == result.dbeta.dtype == np.dtype(wanted)
    assert bnfast.batch_norm_grad(*(x.astype("f8"),) * 2, double, double).dgamma.dtype == np.float64


def test_dresidual_without_activation_is_dy():
    x, dy = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    result = bnfast.batch_norm_grad(dy, x, np.ones(3), np.ones(3), residual=x)
    assert np.shares_memory(result.dresidual, dy)
    fused = bnfast.batch_norm_grad(dy, x, np.ones(3), np.ones(3), residual=x, activation="relu")
    assert not np.shares_memory(fused.dresidual, dy)
    kept = dy.copy()
    in_place = bnfast.batch_norm_grad(dy, x, np.ones(3), np.ones(3), residual=x, out=dy)
    assert np.shares_memory(in_place.dx, dy)
    assert np.array_equal(in_place.dresidual, kept)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((37, 23), 1), ((3, 23, 7, 7), 1), ((0, 4), 1)])
@pytest.mark.parametrize("source", ["residual", "y"])
def test_out_dresidual(shape, axis, dtype, source):
    rng = np.random.default_rng(11)
    x, dy, other = (sample_data.batch(shape, axis, sample_data.dtype_of(dtype), rng) for _ in range(3))
    gamma, beta, mean, variance = sample_data.vectors(shape[axis], rng)
    kwargs = {"axis": axis, "activation": "relu", source: other}
    for mask in (None, np.ones(shape[:axis] + shape[axis + 1 :], np.float32)):
        kwargs["mask"] = mask
        wanted = bnfast.batch_norm_grad(dy, x, mean, variance, gamma, beta, **kwargs)
        out, apart = np.empty_like(x), np.empty_like(x)
        spent = x.copy()
        for x_given, place in ((x, apart), (spent, spent)):
            result = bnfast.batch_norm_grad(
                dy, x_given, mean, variance, gamma, beta, out=out, out_dresidual=place, **kwargs
            )
            assert result.dx is out
            assert result.dresidual is place
            for actual, expected in zip(result, wanted, strict=True):
                np.testing.assert_array_equal(actual, expected)


def test_bad_out_dresidual():
    x, dy, y = (np.ones((4, 3), np.float32) for _ in range(3))
    one, out = np.ones(3), np.zeros((4, 3), np.float32)
    fused = {"activation": "relu", "y": y}
    for kwargs, error, message in (
        (
            {"y": y, "out_dresidual": out},
            ValueError,
            "out_dresidual must be None without an activation.*activation=None",
        ),
        ({"activation": "relu", "out_dresidual": out}, ValueError, "Received: neither residual nor y"),
        ({**fused, "out_dresidual": dy}, ValueError, r"out_dresidual must not overlap dy \(or be exactly x\)"),
        ({**fused, "out_dresidual": y}, ValueError, "out_dresidual must not overlap y"),
        ({**fused, "out_dresidual": out, "out": out}, ValueError, "out_dresidual must not overlap out"),
        ({**fused, "out_dresidual": x, "out": x}, ValueError, "out_dresidual must not overlap out"),
        ({**fused, "out_dresidual": out[:, ::-1]}, ValueError, "out_dresidual must be C-contiguous"),
        ({**fused, "out_dresidual": np.zeros((4, 3))}, TypeError, "out_dresidual must have the dtype of x, float32"),
        ({**fused, "out_dresidual": [0.0]}, TypeError, "out_dresidual must be a NumPy array. Received: list"),
    ):
        with pytest.raises(error, match=message):
            bnfast.batch_norm_grad(dy, x, one, one, **kwargs)
        assert (x == 1).all()
        assert (dy == 1).all()
        assert (out == 0).all()


def test_statistics_may_be_float32():
    rng = np.random.default_rng(8)
    x, dy = (sample_data.batch((20, 3), 1, np.float32, rng) for _ in range(2))
    _, mean, _, invstd = bnfast.batch_norm_train(x)
    mean, invstd = mean.astype(np.float32), invstd.astype(np.float32)
    narrow = bnfast.batch_norm_grad(dy, x, mean, invstd)
    wide = bnfast.batch_norm_grad(dy, x, mean.astype(np.float64), invstd.astype(np.float64))
    assert np.array_equal(narrow.dx, wide.dx)


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.integers(0, 4),
    st.sampled_from(["float32", "float64", "float16"]),
    st.sampled_from(sample_data.ACTIVATIONS),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_any_shape(shape, axis, dtype, activation, with_residual, masked, seed):
    rng = np.random.default_rng(seed)
    axis %= len(shape)
    x, dy, residual = (sample_data.batch(shape, axis, dtype, rng) for _ in range(3))
    gamma, beta, *_ = sample_data.vectors(shape[axis], rng)
    mask = rng.integers(0, 3, [1 if i == axis else e for i, e in enumerate(shape)]) if masked else None
    residual = residual if with_residual else None
    check_grad(x, dy, axis, gamma, beta, activation=activation, mask=mask, residual=residual)
