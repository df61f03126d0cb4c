"""Is a peer's result right? Checked against float64 NumPy on the first, middle and last channel, all values of each.

y = gamma*(x - mean)*invstd + beta;  dx = gamma*invstd*(dy - dbeta/M - xhat*dgamma/M)
"""

from __future__ import annotations

import math

import numpy as np

from bnfast._arguments.arrays import Array
from bnfast.benchmark.cases import EPSILON, Arrays, Case

# Of the result's rounding and, for float32, of peers that sum in it. dgamma and dbeta: times 1 + |value| + sqrt(M).
TOLERANCE = {"float64": 1e-9, "float32": 5e-4, "float16": 2e-2, "bfloat16": 1e-1}


def worst_error(case: Case, arrays: Arrays, result: dict[str, Array]) -> float:
    """The largest error of `result` (train, infer: y; grad: dx, dgamma, dbeta) over what is allowed: above 1 is wrong.

    NaN, where the result has one, is returned as infinity.
    """
    worst = 0.0
    for channel in sorted({0, case.shape.c // 2, case.shape.c - 1}):
        for name, expected in _channel(case, arrays, channel).items():
            found = result[name]
            if name in ("y", "dx"):
                if found.shape != arrays.x.shape:
                    return math.inf
                error = np.abs(_take(case, found, channel) - expected).max() / (1 + np.abs(expected).max())
            else:
                allowed = 1 + abs(expected) + math.sqrt(case.shape.size / case.shape.c)
                error = abs(float(found[channel]) - expected) / allowed
            worst = max(worst, math.inf if math.isnan(error) else float(error) / TOLERANCE[case.dtype])
    return worst


def _take(case: Case, array: Array, channel: int) -> Array:
    taken: Array = np.take(array, channel, axis=case.axis).astype(np.float64)
    return taken


def _channel(case: Case, arrays: Arrays, channel: int) -> dict[str, Array]:
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
