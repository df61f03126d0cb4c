"""How close a result must be to the float64 reference: bounds and checks for every output of the kernels.

Kernels compute half types in float32. Bounds are in units of the compute type's epsilon times the size of the terms
that were added up, plus half a unit in the last place of the output's own dtype.
"""

from typing import Any

import numpy as np
import numpy_reference


def compute_eps(dtype: Any) -> float:
    return float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)


def storage_eps(dtype: Any) -> float:
    return {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(np.dtype(dtype).name, compute_eps(dtype))


def tiny(dtype: Any) -> float:
    """Half the smallest subnormal, the rounding error near zero: 3e-8 for float16."""
    return {"float16": 2.0**-25, "float64": 0.0}.get(np.dtype(dtype).name, 2.0**-134)


def per_channel(v, x, axis):
    """A (C,) vector in a shape that broadcasts against x."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(v).reshape(shape)


def close(actual, expected, size, eps, dtype=None, what=""):
    """Assert |actual - expected| <= eps*size plus rounding to `dtype`, and NaN and infinities in the same positions."""
    actual = np.asarray(actual).astype(np.longdouble)
    expected = np.asarray(expected).astype(np.longdouble)
    assert actual.shape == expected.shape, what
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = eps * np.asarray(size, np.longdouble)
        if dtype is not None:
            allowed = allowed + 0.5 * storage_eps(dtype) * np.abs(expected) + tiny(dtype)
        fine = (np.abs(actual - expected) <= allowed) | (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if not fine.all():
        at = tuple(int(i[0]) for i in np.nonzero(~fine))
        excess = float(np.nanmax(np.abs(actual - expected) / np.maximum(allowed, np.finfo(np.float64).tiny)))
        share = f"{np.sum(~fine)} of {fine.size} off, worst {excess:.2f} bounds"
        raise AssertionError(f"{what} at {at}: {actual[at]} != {expected[at]}, {share}")


def check_statistics(x, mean, variance, expected, chosen=False):
    """Invariant 2: relative variance error 1e-6 (float32 compute) or 1e-12 (float64).

    chosen: the values may be adversarial (the first far off and all others equal, so that all additions round the same
    way). 64 additions per block may then each cost one float32 epsilon: 8e-6. The largest error seen is 5e-6.
    """
    eps = compute_eps(x.dtype)
    assert mean.dtype == variance.dtype == np.float64
    close(mean, expected.mean, np.abs(expected.mean) + np.sqrt(expected.variance), 4 * eps, what="mean")
    bound, compute = (1e-12, np.float64) if x.dtype == np.float64 else (8e-6 if chosen else 1e-6, np.float32)
    # squares below the smallest normal number of the compute type (1e-38, 2e-308) may vanish
    close(variance, expected.variance, expected.variance + np.finfo(compute).tiny / bound, bound, what="variance")


def check_output(x, y, expected, mean, invstd, gamma=None, beta=None, axis=-1, residual=None, chosen=False):
    """y has x's shape and dtype and is close to `expected`; half the variance's relative error is allowed on top."""
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    size = np.abs(numpy_reference.preactivation(x, mean, invstd, axis=axis)) + 1
    # the mean is float64: its eps is 1 eps of y for float64 x with mean/std = 1, and 1e-9 eps for float32 x
    share = np.finfo(np.float64).eps / compute_eps(x.dtype)
    size = size + np.abs(per_channel(np.asarray(mean) * invstd, x, axis)) * share
    if gamma is not None:
        size = size * np.abs(per_channel(gamma, x, axis))
    if beta is not None:
        size = size + np.abs(per_channel(beta, x, axis))
    if residual is not None:
        size = size + np.abs(residual.astype(size.dtype))
    close(y, expected, size, (40 if chosen else 8) * compute_eps(x.dtype), x.dtype, "y")


def zero_near_kinks(dy, x, mean, invstd, gamma, beta, axis, residual, activation):
    """dy with zeros where the pre-activation is so close to a kink that rounding decides the side."""
    if activation is None:
        return dy
    z = numpy_reference.preactivation(x, mean, invstd, gamma, beta, axis=axis, residual=residual)
    near = (np.abs(z) < 1e-4) | (np.abs(z - 6) < 1e-4)
    return np.where(near, np.zeros((), dy.dtype), dy)


def check_gradient(dy, x, result, mean, invstd, gamma=None, beta=None, axis=-1, **options):
    """A GradResult against the closed form."""
    expected = numpy_reference.grad(dy, x, mean, invstd, gamma, beta, axis=axis, **options)
    eps = compute_eps(x.dtype)
    parameter = next((p.dtype for p in (gamma, beta) if p is not None), None)
    parameter = parameter or np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    channels = x.shape[axis]
    other = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    xhat = np.abs(numpy_reference.preactivation(x, mean, invstd, axis=axis))
    g = np.abs(dy.astype(xhat.dtype))
    sum_g, sum_gx = g.sum(other), (g * (xhat + 1)).sum(other)
    for name, actual, size in (("dbeta", result.dbeta, sum_g), ("dgamma", result.dgamma, sum_gx)):
        assert actual.shape == (channels,)
        assert actual.dtype == parameter
        close(actual, getattr(expected, name), size, 8 * eps, parameter, name)
    assert result.dx.shape == x.shape
    assert result.dx.dtype == x.dtype
    scale = np.abs(per_channel(invstd if gamma is None else gamma.astype(xhat.dtype) * invstd, x, axis))
    count = max(float(numpy_reference.weights(options.get("mask"), x, axis, np.float64).sum()), 1e-30)
    top = 1.0 if options.get("mask") is None else float(np.max(np.asarray(options["mask"], np.float64), initial=0))
    size = scale * (g + (per_channel(sum_g, x, axis) + (xhat + 1) * per_channel(sum_gx, x, axis)) * (top / count))
    dvariance_factor = 2 * (xhat + 1) / per_channel(np.where(invstd > 0, invstd, 1), x, axis)
    for name, more in (("dmean", 1.0), ("dvariance", dvariance_factor)):
        if options.get(name) is not None:
            size = size + np.abs(per_channel(options[name], x, axis)) * more * (top / count)
    close(result.dx, expected.dx, size, 8 * eps, x.dtype, "dx")
    if options.get("residual") is None:
        assert result.dresidual is None
    else:
        assert result.dresidual.dtype == x.dtype
        close(result.dresidual, expected.dresidual, g, 2 * eps, x.dtype, "dresidual")
