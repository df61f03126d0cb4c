"""Checks a peer's result against float64 NumPy, on all values of the first, the middle and the last channel.

y = gamma*(x - mean)*invstd + beta;  dx = gamma*invstd*(dy - dbeta/M - xhat*dgamma/M)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, Arrays, Case

# Allowed error relative to 1 + max|y| or 1 + max|dx|; for dgamma and dbeta, relative to 1 + |value| + sqrt(M).
# It covers the rounding of the result and, for float32, peers that accumulate in float32.
TOLERANCE = {"float64": 1e-9, "float32": 5e-4, "float16": 2e-2, "bfloat16": 1e-1}


def error_over_tolerance(case: Case, arrays: Arrays, result: dict[str, Array]) -> float:
    """The largest error of `result`, divided by the tolerance: above 1 the result is wrong.

    `result` holds y for train and infer, and dx, dgamma and dbeta for grad. A NaN or a wrong shape gives infinity.
    """
    largest = 0.0
    for channel in sorted({0, case.shape.c // 2, case.shape.c - 1}):
        for name, expected in expected_channel(case, arrays, channel).items():
            if name in ("y", "dx"):
                error = _tensor_error(case, result[name], expected, channel)
            else:
                error = _sum_error(case, result[name], expected, channel)
            largest = max(largest, math.inf if math.isnan(error) else error / TOLERANCE[case.dtype])
    return largest


def expected_channel(case: Case, arrays: Arrays, channel: int) -> dict[str, Any]:
    """One channel of the right result, computed in float64: y, or dx with the numbers dgamma and dbeta."""
    x = _take(case, arrays.x, channel)
    gamma, beta = float(arrays.gamma[channel]), float(arrays.beta[channel])
    if case.op == "infer":
        mean, variance = float(arrays.moving_mean[channel]), float(arrays.moving_variance[channel])
    else:
        mean, variance = x.mean(), x.var()
    invstd = 1 / math.sqrt(variance + EPSILON)
    xhat = (x - mean) * invstd
    if case.op != "grad":
        return {"y": gamma * xhat + beta}
    dy = _take(case, arrays.dy, channel)
    dgamma, dbeta = (dy * xhat).sum(), dy.sum()
    dx = gamma * invstd * (dy - dbeta / x.size - xhat * dgamma / x.size)
    return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _tensor_error(case: Case, found: Array, expected: Array, channel: int) -> float:
    if found.shape != case.array_shape:
        return math.inf
    difference = np.abs(_take(case, found, channel) - expected).max()
    return float(difference / (1 + np.abs(expected).max()))


def _sum_error(case: Case, found: Array, expected: float, channel: int) -> float:
    values_per_channel = case.shape.size / case.shape.c
    return abs(float(found[channel]) - expected) / (1 + abs(expected) + math.sqrt(values_per_channel))


def _take(case: Case, array: Array, channel: int) -> Array:
    taken: Array = np.take(array, channel, axis=case.axis).astype(np.float64)
    return taken
