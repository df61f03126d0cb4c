"""`renorm_correction`: the r and d of batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275).

r and d move the batch statistics towards the moving ones, so that training normalizes nearly as inference does.
Everything else of batch renormalization is `batch_norm_train` and `batch_norm_grad` with other parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import checks
from .._arguments.array_checks import parameter

__all__ = ["renorm_correction"]

Vector = npt.NDArray[np.float64]


def renorm_correction(
    mean: Any,
    variance: Any,
    moving_mean: Any,
    moving_stddev: Any,
    *,
    rmin: float | None = None,
    rmax: float | None = None,
    dmax: float | None = None,
    epsilon: float = 1e-3,
) -> tuple[Vector, Vector]:
    """The factor r and offset d of batch renormalization, y = gamma*(xhat*r + d) + beta.

        s = max(moving_stddev, sqrt(epsilon))
        r = clip(sqrt(variance + epsilon)/s, rmin, rmax);  d = clip((mean - moving_mean)/s, -dmax, dmax)

    The gradient treats both as constants, so renorm is batch norm with other parameters:

        _, mean, variance = moments(x)
        r, d = renorm_correction(mean, variance, moving_mean, moving_stddev, rmax=3, dmax=5)
        scale, shift = gamma*r, beta + gamma*d
        y, mean, variance, invstd = batch_norm_train(x, scale, shift)
        dx, dscale, dshift, _ = batch_norm_grad(dy, x, mean, invstd, scale, shift)
        dgamma, dbeta = r*dscale + d*dshift, dshift
        moving_mean += (1 - momentum)*(mean - moving_mean)
        moving_stddev += (1 - momentum)*(sqrt(variance + epsilon) - moving_stddev)

    All steps use the same epsilon. rmin = rmax = 1 and dmax = 0 is plain batch norm. moving_mean and moving_stddev are
    Keras's renorm_mean and renorm_stddev, and the lower bound sqrt(epsilon) of s is Keras's.

    Args:
        mean, variance: of the batch, as returned by `moments`: float32 or float64, of any shape.
        moving_mean, moving_stddev: their values before this batch, float32 or float64 in the shape of mean.
        rmin, rmax, dmax: bounds, at least 0; None means no bound. During training the paper relaxes them from 1, 1, 0
            to 0, 3, 5.
        epsilon: that of the normalization, >= 0. Where epsilon and moving_stddev are both 0, r is 1 and d is 0.

    Returns:
        (r, d), float64 in the shape of mean; NaN where the statistics are NaN.

    Raises:
        ValueError, TypeError: an argument is wrong.

    Example:
        >>> import bnfast
        >>> import numpy as np
        >>> mean, variance = np.array([2.0]), np.array([4.0])
        >>> bnfast.renorm_correction(mean, variance, np.array([1.0]), np.array([1.0]), rmax=1.5, epsilon=0.0)
        (array([1.5]), array([1.]))

    Source: Ioffe 2017, https://arxiv.org/abs/1702.03275.
    """
    mean = _vector("mean", mean)
    variance = _vector("variance", variance, mean.shape, positive=True)
    moving_mean = _vector("moving_mean", moving_mean, mean.shape)
    moving_stddev = _vector("moving_stddev", moving_stddev, mean.shape, positive=True)
    bounds = {"rmin": rmin, "rmax": rmax, "dmax": dmax}
    low, high, limit = (None if value is None else checks.real(name, value) for name, value in bounds.items())
    if low is not None and high is not None and low > high:
        raise ValueError(f"rmin must be at most rmax. Received: rmin={low}, rmax={high}")
    epsilon = checks.real("epsilon", epsilon)
    scale = np.maximum(moving_stddev, np.sqrt(epsilon))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        r = np.where(scale == 0, 1.0, np.sqrt(variance + epsilon) / scale)
        d = np.where(scale == 0, 0.0, (mean - moving_mean) / scale)
    if low is not None:
        r = np.maximum(r, low)
    if high is not None:
        r = np.minimum(r, high)
    return r, d if limit is None else np.clip(d, -limit, limit)


def _vector(name: str, value: Any, shape: tuple[int, ...] | None = None, positive: bool = False) -> Vector:
    array = parameter(name, value)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have the shape of mean, {shape}. Received: {array.shape}")
    if positive and (array < 0).any():
        raise ValueError(f"{name} must be at least 0. Received: {array[array < 0][0]}")
    return array.astype(np.float64)
