"""Batch renormalization's correction: with it, training normalizes about as inference will.

Source: Ioffe 2017, https://arxiv.org/abs/1702.03275. The rest is `batch_norm_train` and `batch_norm_grad`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import checks as _checks
from .._arguments.arrays import Array, as_array

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
    """r and d of batch renormalization, y = gamma*(xhat*r + d) + beta (Ioffe 2017, https://arxiv.org/abs/1702.03275).

        s = max(moving_stddev, sqrt(epsilon))
        r = clip(sqrt(variance + epsilon)/s, rmin, rmax);  d = clip((mean - moving_mean)/s, -dmax, dmax)

    To the gradient both are constants, so that renorm is batch norm with other parameters:

        _, mean, variance = moments(x)
        r, d = renorm_correction(mean, variance, moving_mean, moving_stddev, rmax=3, dmax=5)
        scale, shift = gamma*r, beta + gamma*d
        y, mean, variance, invstd = batch_norm_train(x, scale, shift)
        dx, dscale, dshift, _ = batch_norm_grad(dy, x, mean, invstd, scale, shift)
        dgamma, dbeta = r*dscale + d*dshift, dshift
        moving_mean += (1 - momentum)*(mean - moving_mean)
        moving_stddev += (1 - momentum)*(sqrt(variance + epsilon) - moving_stddev)

    with one `epsilon` throughout. rmin = rmax = 1 and dmax = 0 is plain batch norm. Keras's renorm_mean and
    renorm_stddev are moving_mean and moving_stddev here, and s has Keras's floor.

    Args:
        mean, variance: of the batch, as `moments` returns them.
        moving_mean, moving_stddev: as they were before this batch; shape of mean, float32 or float64.
        rmin, rmax, dmax: bounds, at least 0; None is no bound. The paper goes from 1, 1, 0 to 0, 3, 5 in training.
        epsilon: that of the normalization. Where it and moving_stddev are 0, so that s is, r is 1 and d 0.

    Returns:
        (r, d), float64 in the shape of mean. NaN where the statistics are.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    mean = _vector("mean", mean)
    variance = _vector("variance", variance, mean.shape, positive=True)
    moving_mean = _vector("moving_mean", moving_mean, mean.shape)
    moving_stddev = _vector("moving_stddev", moving_stddev, mean.shape, positive=True)
    bounds = {"rmin": rmin, "rmax": rmax, "dmax": dmax}
    low, high, most = (None if value is None else _checks.real(name, value) for name, value in bounds.items())
    if low is not None and high is not None and low > high:
        raise ValueError(f"rmin must be at most rmax. Received: rmin={low}, rmax={high}")
    epsilon = _checks.real("epsilon", epsilon)
    floor = np.maximum(moving_stddev, np.sqrt(epsilon))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        r = np.where(floor == 0, 1.0, np.sqrt(variance + epsilon) / floor)
        d = np.where(floor == 0, 0.0, (mean - moving_mean) / floor)
    if low is not None:
        r = np.maximum(r, low)
    if high is not None:
        r = np.minimum(r, high)
    return r, d if most is None else np.clip(d, -most, most)


def _vector(name: str, value: Any, shape: tuple[int, ...] | None = None, positive: bool = False) -> Vector:
    array: Array = as_array(name, value)
    if array.dtype.char not in "fd" or not array.dtype.isnative:
        wanted = "float32 or float64 in the machine's byte order"
        raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} must have the shape of mean, {shape}. Received: {array.shape}")
    if positive and (array < 0).any():
        raise ValueError(f"{name} must be at least 0. Received: {array[array < 0][0]}")
    return array.astype(np.float64)
