"""How far y is from the exact result, over many channels, in units of the promised bound; and the half types.

|y - exact| <= 4*eps*(|a|*(|x| + |mean| + std) + |b|),  a = gamma/sqrt(variance + epsilon), b = beta - a*mean
"""

from __future__ import annotations

from typing import Any

import bnfast
import numpy as np


def measure(channels: int) -> dict[str, Any]:
    """The largest error over that bound, for |mean|/std from 0 to 1e6."""
    rng, worst, values, done = np.random.default_rng(1), {"float32": 0.0, "float64": 0.0}, 256, 0
    while done < channels:
        width = min(2000, channels - done)
        dtype = "float32" if done // 2000 % 2 == 0 else "float64"
        eps = np.finfo(dtype).eps
        offset = np.concatenate([[0.0], 10.0 ** rng.uniform(-1, 6, width - 1)])
        scale = 10.0 ** rng.uniform(-3, 3, width)
        x = ((rng.standard_normal((values, width)) + offset) * scale).astype(dtype)
        gamma, beta = rng.standard_normal((2, width)).astype(dtype)
        last = done // 2000 % 4 < 2
        given = x if last else np.ascontiguousarray(x.T.reshape(width, 8, 32).swapaxes(0, 1))
        y = bnfast.batch_norm_train(given, gamma, beta, axis=-1 if last else 1).y
        y = y if last else y.swapaxes(0, 1).reshape(width, values).T
        exact = x.astype(np.longdouble)
        mean, variance = exact.mean(0), exact.var(0)
        a = gamma / np.sqrt(variance + np.longdouble(1e-3))
        error = np.abs(y - (a * (exact - mean) + beta))
        bound = bound_of_y(exact, mean, variance, a, beta)
        worst[dtype] = max(worst[dtype], float((error / (4 * eps * bound)).max()))
        done += width
    return {"channels": channels, "worst": worst}


def bound_of_y(x: Any, mean: Any, variance: Any, a: Any, beta: Any) -> Any:
    """The bound above, in units of 4*eps. All arrays broadcast to x."""
    return np.abs(a) * (np.abs(x) + np.abs(mean) + np.sqrt(variance)) + np.abs(beta - a * mean)


def half_types() -> dict[str, Any]:
    """All values of both: y is the float32 result of the same values, correctly rounded."""
    import ml_dtypes

    wrong, values = {}, 0
    for name, dtype in (("float16", np.dtype("float16")), ("bfloat16", np.dtype(ml_dtypes.bfloat16))):
        x = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(-1, 1)
        mean, variance = np.array([0.3], np.float32), np.array([1.7], np.float32)
        gamma, beta = np.array([0.9], np.float32), np.array([0.1], np.float32)
        y = bnfast.batch_norm_infer(x, mean, variance, gamma, beta)
        with np.errstate(over="ignore", invalid="ignore"):
            wide = bnfast.batch_norm_infer(x.astype(np.float32), mean, variance, gamma, beta).astype(dtype)
        same = (y.view(np.uint16) == wide.view(np.uint16)) | (np.isnan(y.astype(float)) & np.isnan(wide.astype(float)))
        wrong[name], values = int((~same).sum()), values + same.size
    return {"values": values, "wrong": wrong}
