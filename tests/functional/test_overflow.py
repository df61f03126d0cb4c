"""Finite values whose sums overflow: the mean is right, and a variance that overflows makes y = beta and dx = 0."""

from typing import Any

import bnfast
import numpy as np
import pytest
from bnfast import _core
from exact import bits, restored_settings  # noqa: F401

LARGEST = {"float32": np.finfo(np.float32).max, "float64": np.finfo(np.float64).max, "bfloat16": 3.3895e38}
DTYPES = tuple(LARGEST)
SHAPES = ((6, 3), (5, 3, 4), (4, 3, 9, 9), (700, 3), (3, 3, 300))


def numpy_type(dtype: str) -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def huge(shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    """Three channels along axis 1: one that overflows, one of ordinary size, one with NaN."""
    rng = np.random.default_rng(5)
    scale = {
        "one": rng.permutation(np.prod(shape)).reshape(shape) == 0,
        "signs": rng.choice([-1.0, 1.0], shape),
        "all": rng.uniform(0.5, 1, shape),
        "root": rng.uniform(0, 1, shape) * 2 * LARGEST[dtype] ** -0.5,
    }[kind]
    x = np.moveaxis(scale * 0.99 * float(LARGEST[dtype]), 1, 0).copy()
    x[1] = rng.normal(size=x[1].shape)
    x[2].flat[-1] = np.nan
    return np.ascontiguousarray(np.moveaxis(x, 0, 1)).astype(numpy_type(dtype))


def exact(x: np.ndarray, dtype: str) -> tuple[float, float]:
    values = x.astype(np.longdouble).ravel()
    mean, variance = values.mean(), ((values - values.mean()) ** 2).mean()
    limit = np.finfo(np.float64 if dtype == "float64" else np.float32).max
    return float(mean), float(variance) if variance <= limit else np.inf


@pytest.mark.parametrize("kind", ["one", "signs", "all", "root"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(dtype: str, shape: tuple[int, ...], kind: str) -> None:
    x = huge(shape, dtype, kind)
    for axis in (1, -1):
        check_batch_norm(x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1)), axis, dtype)


def check_batch_norm(x: np.ndarray, axis: int, dtype: str) -> None:
    channels = np.moveaxis(x, axis, 0)
    mean, variance = exact(channels[0], dtype)
    beta, gamma = np.array([0.5, -1, 2.0]), np.array([2.0, 3, 1])
    moving = [np.zeros(3), np.ones(3)]
    result = bnfast.batch_norm_train(x, gamma, beta, *moving, axis=axis, nan_policy="skip_update")
    tolerance = 1e-5 if dtype != "float64" else 1e-12
    np.testing.assert_allclose(result.mean[0], mean, rtol=tolerance, atol=1e-7 * float(LARGEST[dtype]) * (mean == 0))
    np.testing.assert_allclose(result.variance[0], variance, rtol=tolerance)
    np.testing.assert_allclose(result.mean[1], channels[1].astype(float).mean(), rtol=1e-4, atol=1e-5)
    assert np.isnan(result.mean[2])
    assert np.isnan(np.moveaxis(result.y, axis, 0)[2].astype(float)).all()
    y, dy = np.moveaxis(result.y, axis, 0)[0].astype(float), np.ones_like(x)
    grad = bnfast.batch_norm_grad(dy, x, result.mean, result.invstd, gamma, axis=axis)
    assert np.isfinite(y).all()
    assert np.isfinite(np.moveaxis(grad.dx, axis, 0)[0].astype(float)).all()
    assert np.isfinite([grad.dgamma[0], grad.dbeta[0]]).all()
    if np.isinf(variance):
        assert (y == 0.5).all()
        assert result.invstd[0] == 0
        assert moving[0][0] == 0
        assert moving[1][0] == 1  # skipped, as the channel with NaN
        assert not np.moveaxis(grad.dx, axis, 0)[0].astype(float).any()
        assert grad.dgamma[0] == 0
        assert grad.dbeta[0] == y.size
        with pytest.raises(FloatingPointError):
            bnfast.batch_norm_train(x, axis=axis, nan_policy="raise")
        moved = [np.zeros(3), np.ones(3)]
        bnfast.batch_norm_train(x, None, None, *moved, axis=axis)
        np.testing.assert_allclose(moved[0][0], 0.01 * mean, rtol=1e-5, atol=1e-7 * float(LARGEST[dtype]))
        assert moved[1][0] == np.inf
    else:
        assert moving[1][0] != 1
    moments = bnfast.moments(x, axis=axis)
    np.testing.assert_array_equal(moments.mean, result.mean)
    np.testing.assert_array_equal(moments.variance, result.variance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(dtype: str) -> None:
    """Masked infinities don't count, and weights do."""
    kind, top = numpy_type(dtype), 0.9 * float(LARGEST[dtype])
    x = np.array([[top], [-top], [top], [np.inf]]).astype(kind)
    result = bnfast.batch_norm_train(x, mask=np.array([1.0, 1, 0.5, 0]))
    np.testing.assert_allclose(result.mean, [0.2 * float(x[0, 0])], rtol=1e-6)
    assert result.variance == [np.inf]
    np.testing.assert_array_equal(result.y[:3].astype(float), 0)


@pytest.mark.parametrize("kind", ["one", "signs", "all", "root"])
@pytest.mark.parametrize("shape", [(3, 8), (3, 6, 5), (3, 4, 20, 20), (3, 700)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_norm(dtype: str, shape: tuple[int, ...], kind: str) -> None:
    x = np.ascontiguousarray(np.moveaxis(huge(shape[1:2] + shape[:1] + shape[2:], dtype, kind), 1, 0))
    for axis in (1, -1):
        each = x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))
        for groups in (1, 2):
            result = bnfast.group_norm(each, groups, axis=axis)
            rows = np.moveaxis(each, axis, 1).reshape(3, groups, -1)
            for row in range(groups):
                mean, variance = exact(rows[0, row], dtype)
                atol = 1e-7 * float(LARGEST[dtype]) * (abs(mean) < 1e-3 * float(LARGEST[dtype]))
                np.testing.assert_allclose(result.mean[0, row], mean, rtol=1e-5, atol=atol)
                np.testing.assert_allclose(result.invstd[0, row], 1 / np.sqrt(variance + 1e-3), rtol=1e-4)
            assert np.isfinite(result.y[:2].astype(float)).all()
            grad = bnfast.group_norm_grad(np.ones_like(each), each, result.mean, result.invstd, groups, axis=axis)
            assert np.isfinite(grad.dx[:2].astype(float)).all()


@pytest.mark.parametrize("kind", ["signs", "root"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits(dtype: str, kind: str) -> None:
    for shape in ((700, 3), (6, 3, 9, 9)):
        x, results = huge(shape, dtype, kind), []
        for isa in bnfast.build_info()["isas"]:
            for threads in (1, 3):
                _core._set_isa(isa)
                _core._set_serial_bytes(0)
                bnfast.set_num_threads(threads)
                y, mean, variance, invstd = bnfast.batch_norm_train(x, axis=1)
                grad = bnfast.batch_norm_grad(np.ones_like(x), x, mean, invstd, axis=1)
                results.append([bits(each) for each in (y, mean, variance, invstd, *grad[:3])])
        for each in results[1:]:
            for one, other in zip(results[0], each, strict=True):
                np.testing.assert_array_equal(one, other)
