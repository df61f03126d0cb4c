"""Group, instance and layer norm: same bits (instruction sets, teams, layouts, out, identities), edge cases, errors."""

import subprocess
import sys

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import _core
from exact import LAYOUTS, bits, force_isa_and_threads, restored_settings  # noqa: F401  # the fixture restores the settings
from group_norm_calls import GROUP_CASES, LAYER_CASES, group_call, inputs, layer_call


def all_bits(case, dtype, change=lambda a: a):
    """The bits of every result of one case: (shape, axis, groups) or (shape, axes)."""
    shape, axis, *groups = case
    vector = shape[axis] if groups else [shape[a] for a in sorted(a % len(shape) for a in axis)]
    x, dy, gamma, beta = inputs(shape, vector, dtype)
    call = (group_call if groups else layer_call)(change(x), change(dy), gamma, beta, axis, *groups)
    return [bits(a) for result in call for a in result]


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("case", [*GROUP_CASES, *LAYER_CASES], ids=str)
def test_the_same_bits_on_every_instruction_set_team_and_layout(case, dtype):
    isas = bnfast.build_info()["isas"]
    force_isa_and_threads(isas[-1], 1)
    expected = all_bits(case, dtype)
    for isa in isas:
        for threads in (1, 2, 3, 8):
            check = force_isa_and_threads(isa, threads)
            actual = all_bits(case, dtype)
            check()
            assert all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True)), (isa, threads)
    for change in LAYOUTS.values():
        actual = all_bits(case, dtype, change)
        assert all(np.array_equal(a, b) for a, b in zip(actual, expected, strict=True)), change


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("case", [*GROUP_CASES, ((5, 11, 13, 6), -1, 1), *LAYER_CASES], ids=str)
def test_parameters_change_no_bit_of_the_statistics(case, dtype):
    shape, axis, *groups = case
    vector = shape[axis] if groups else [shape[a] for a in sorted(a % len(shape) for a in axis)]
    x, _, gamma, beta = inputs(shape, vector, dtype)
    forward = bnfast.group_norm if groups else bnfast.layer_norm
    for threads in (1, 2):
        force_isa_and_threads(bnfast.build_info()["isas"][-1], threads)
        expected = forward(x, *groups, axis=axis)[1:]
        for parameters in ({"gamma": gamma, "beta": beta}, {"gamma": gamma}, {"beta": beta}):
            assert same(forward(x, *groups, **parameters, axis=axis)[1:], expected)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in bytes elsewhere, or absent")
@pytest.mark.parametrize(("shape", "axis"), [((40000, 2, 64), 2), ((40000, 64, 2), 1)], ids=str)
def test_many_samples_take_little_scratch(shape, axis):
    """One sum per sample and channel, 41 MB here, would stay allocated for the calling thread."""
    code = f"""if True:
        import resource, bnfast, numpy as np
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bnfast.set_num_threads(2)
        x, dy = np.ones({shape}, np.float16), np.ones({shape}, np.float16)
        ones = np.ones((len(x), 1))
        bnfast.group_norm_grad(dy[:9], x[:9], ones[:9], ones[:9], 1, axis={axis})
        before = peak()
        bnfast.group_norm_grad(dy, x, ones, ones, 1, axis={axis}, out=dy)
        print(peak() - before)
    """
    grown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(grown) < 6 << 10  # KiB


def same(a, b):
    return all(np.array_equal(bits(p), bits(q).reshape(bits(p).shape)) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [(c[0], c[1]) for c in GROUP_CASES], ids=str)
def test_identities(shape, axis, dtype):
    """One channel per group is instance norm; one group is layer norm; instance norm of one sample is batch norm."""
    x, dy, gamma, beta = inputs(shape, shape[axis], dtype)
    instance = bnfast.instance_norm(x, gamma, beta, axis=axis)
    assert same(instance, bnfast.group_norm(x, shape[axis], gamma, beta, axis=axis))
    grad = bnfast.instance_norm_grad(dy, x, instance.mean, instance.invstd, gamma, axis=axis)
    assert same(grad, bnfast.group_norm_grad(dy, x, *instance[1:], shape[axis], gamma, axis=axis))
    if axis in (1, -1, len(shape) - 1):
        group = bnfast.group_norm(x, 1, axis=axis)
        layer = bnfast.layer_norm(x, axis=tuple(range(1, len(shape))))
        assert same(group, layer)
        batch = bnfast.batch_norm_train(x[:1], gamma, beta, axis=axis)
        first = bnfast.instance_norm(x[:1], gamma, beta, axis=axis)
        assert same(first, (batch.y, batch.mean, batch.invstd))
        gradient = bnfast.batch_norm_grad(dy[:1], x[:1], batch.mean, batch.invstd, gamma, axis=axis)
        assert same(bnfast.instance_norm_grad(dy[:1], x[:1], *first[1:], gamma, axis=axis), gradient[:3])


@pytest.mark.parametrize("case", [*GROUP_CASES, *LAYER_CASES], ids=str)
def test_out_changes_no_bit(case):
    expected = all_bits(case, "float32")
    shape, axis, *groups = case
    vector = shape[axis] if groups else [shape[a] for a in sorted(a % len(shape) for a in axis)]
    x, dy, gamma, beta = inputs(shape, vector, "float32")
    forward = bnfast.group_norm if groups else bnfast.layer_norm
    backward = bnfast.group_norm_grad if groups else bnfast.layer_norm_grad
    mean, invstd = forward(x, *groups, gamma, beta, axis=axis)[1:]
    for out in (x.copy(), np.empty_like(x), None):
        given_x = out if out is not None and np.array_equal(out, x) else x
        y = forward(given_x, *groups, gamma, beta, axis=axis, out=out).y
        assert out is None or y is out
        assert np.array_equal(bits(y), expected[0])
    for which in ("dy", "x", "apart"):
        arrays = {"dy": dy.copy(), "x": x.copy(), "apart": np.empty_like(x)}
        out = arrays[which]
        result = backward(arrays["dy"], arrays["x"], mean, invstd, *groups, gamma, axis=axis, out=out)
        assert result.dx is out
        assert all(np.array_equal(bits(a), b) for a, b in zip(result, expected[3:], strict=True))


def test_out_and_residual_of_arguments_that_are_converted():
    """Channels in the middle are transposed, a memoryview is read; out gets the same bits."""
    for axis, read in ((2, np.asarray), (1, memoryview), (2, memoryview)):
        x, dy, gamma, _ = inputs((2, 3, 6, 5), (2, 3, 6, 5)[axis], "float32")
        y, mean, invstd = bnfast.group_norm(x, 3, gamma, axis=axis, residual=dy)
        gradient = bnfast.group_norm_grad(dy, x, mean, invstd, 3, gamma, axis=axis)
        out = np.empty_like(x)
        assert bnfast.group_norm(read(x), 3, gamma, axis=axis, residual=dy, out=out).y is out
        assert np.array_equal(bits(out), bits(y))
        for out in (np.empty_like(x), dy.copy()):
            given = out if np.array_equal(out, dy) else dy
            result = bnfast.group_norm_grad(given, read(x), mean, invstd, 3, gamma, axis=axis, residual=x, out=out)
            assert result.dx is out
            assert np.array_equal(bits(out), bits(gradient.dx))
            assert np.array_equal(result.dresidual, dy), "also where dx overwrites dy"


# ---- edge cases and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (2, 0, 3), (0, 0)])
def test_empty_input_has_zero_gradients(shape):
    x = np.empty(shape, np.float32)
    groups = 2 if shape[1] else 1
    y, mean, invstd = bnfast.group_norm(x, groups, axis=1)
    assert y.shape == shape
    assert mean.shape == invstd.shape == (shape[0], groups)
    assert (mean == 0).all()
    np.testing.assert_allclose(invstd, 1 / np.sqrt(1e-3))
    instance = bnfast.instance_norm(x, axis=1)
    assert instance.mean.shape == instance.invstd.shape == shape[:2]
    for grad in (
        bnfast.group_norm_grad(x, x, mean, invstd, groups, axis=1),
        bnfast.instance_norm_grad(x, x, *instance[1:], axis=1),
        bnfast.layer_norm_grad(x, x, *bnfast.layer_norm(x)[1:]),
    ):
        assert grad.dx.shape == shape
        assert not grad.dgamma.any()
        assert not grad.dbeta.any()


def test_nan_stays_in_its_row():
    x, dy, gamma, beta = inputs((4, 6, 5), 6, "float32")
    x[1, 3, 2], dy[2, 0, 0] = np.nan, np.inf
    forward, backward = group_call(x, dy, gamma, beta, 1, 3)
    bad = np.zeros((4, 6), bool)
    bad[1, 2:4] = True  # the group of channel 3
    assert (np.isnan(forward.y).all(2) == bad).all()
    assert (np.isnan(forward.y).any(2) == bad).all()
    bad[2, :2] = True
    assert (~np.isfinite(backward.dx).all(2) == bad).all()
    assert (np.isfinite(backward.dgamma) == [False, True, False, False, True, True]).all()


X = np.zeros((4, 6, 5), np.float32)
STATISTICS = np.zeros((4, 3)), np.ones((4, 3))
ERRORS = [
    (
        lambda: bnfast.group_norm(X, 4, axis=1),
        ValueError,
        r"groups must divide the 6 channels on axis 1 .* Received: 4",
    ),
    (lambda: bnfast.group_norm(X, 0, axis=1), ValueError, r"groups must divide .* Received: 0"),
    (lambda: bnfast.group_norm(X, -1, axis=1), ValueError, r"groups must divide .* Received: -1"),
    (lambda: bnfast.group_norm(X, 2.0, axis=1), TypeError, r"groups must be an integer. Received: 2.0 \(float\)"),
    (lambda: bnfast.group_norm(X, True, axis=1), TypeError, r"groups must be an integer"),
    (lambda: bnfast.group_norm(X, None, axis=1), TypeError, r"groups must be an integer"),
    (lambda: bnfast.group_norm(X, 3, axis=0), ValueError, r"axis must not be 0, which is the batch axis"),
    (lambda: bnfast.group_norm(X, 3, axis=3), ValueError, r"axis must be in \[-3, 3\) .* Received: 3"),
    (lambda: bnfast.group_norm(X, 3, axis=(1, 2)), ValueError, r"axis must name one axis. Received: \(1, 2\)"),
    (lambda: bnfast.group_norm(X[0, 0], 1), ValueError, r"x must have a batch axis and a channel axis"),
    (lambda: bnfast.instance_norm(X.astype(int)), TypeError, r"x must have dtype .* Received: int64"),
    (lambda: bnfast.group_norm(X, 3, np.ones(5), axis=1), ValueError, r"gamma must have shape \(6,\) to match axis 1"),
    (lambda: bnfast.layer_norm(X, beta=np.ones(6)), ValueError, r"beta must have shape \(5,\) to match axis -1"),
    (
        lambda: bnfast.layer_norm(X, np.ones(30), axis=(1, 2)),
        ValueError,
        r"gamma must have shape \(6, 5\) to match axes",
    ),
    (lambda: bnfast.layer_norm(X, np.ones(5, int)), TypeError, r"gamma must have dtype float32 or float64"),
    (lambda: bnfast.layer_norm(X, axis=()), ValueError, r"axis must name at least one axis"),
    (lambda: bnfast.layer_norm(X, axis=(1, -2)), ValueError, r"axis must name each axis once"),
    (lambda: bnfast.layer_norm(X, epsilon=-1e-3), ValueError, r"epsilon must be finite and at least 0"),
    (lambda: bnfast.layer_norm(X, epsilon="0"), TypeError, r"epsilon must be a real number"),
    (lambda: bnfast.layer_norm(X, out=X.reshape(-1)), ValueError, r"out must have the shape of x"),
    (lambda: bnfast.layer_norm(X, out=np.zeros_like(X)[::-1]), ValueError, r"out must be C-contiguous"),
    (lambda: bnfast.layer_norm(X[:2], out=X[1:3]), ValueError, r"out must not overlap x \(or be exactly x\)"),
    (lambda: bnfast.group_norm_grad(X, X[:2], *STATISTICS, 3, axis=1), ValueError, r"dy must have the shape of x"),
    (
        lambda: bnfast.group_norm_grad(X, X, *STATISTICS, 2, axis=1),
        ValueError,
        r"mean must have shape \(4, 2\), \(batch",
    ),
    (
        lambda: bnfast.group_norm_grad(X, X, None, None, 2, axis=1),
        TypeError,
        r"mean must be an array of shape \(4, 2\)",
    ),
    (
        lambda: bnfast.layer_norm_grad(X, X, *STATISTICS),
        ValueError,
        r"mean must have shape \(4, 6\), that of x without",
    ),
    (
        lambda: bnfast.layer_norm_grad(X, X, X[..., 0], np.ones((4, 6), int)),
        TypeError,
        r"invstd must have dtype float32",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[e[2][:40] for e in ERRORS])
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not X.any()


def test_statistics_may_be_float32_and_buffers_are_read():
    x, dy, gamma, beta = inputs((4, 6, 5), 6, "float32")
    forward, backward = group_call(x, dy, gamma, beta, 1, np.int64(3))
    narrow = bnfast.group_norm_grad(dy, x, *(a.astype(np.float32) for a in forward[1:]), 3, gamma, axis=1)
    np.testing.assert_allclose(narrow.dx, backward.dx, atol=1e-5)
    assert same(bnfast.group_norm(memoryview(x), 3, memoryview(gamma), memoryview(beta), axis=1), forward)
    assert (
        _core.group_norm(x, 3, gamma, beta, 1, 1e-3, None, 0.2, None, None) is not None
    )  # _core accepts this call without _arguments
