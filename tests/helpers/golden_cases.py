"""Calls of bnfast.cuda whose results are known to the bit: tests/cuda/golden.json has their SHA-256.

The hashes come from the emulator. They are a function of values, shape, dtype and axis, so a GPU must give the same.
The inputs come from integer arithmetic, so that no library's generator can change them.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from fake_cuda import numpy_dtype


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    dtype: str
    activation: str | None = None
    residual: bool = False
    offset: float = 0.0


CASES = [
    Case((70, 33), -1, "float32"),
    Case((301, 64), -1, "float32", "relu"),
    Case((301, 64), -1, "bfloat16", "relu", True),
    Case((301, 65), -1, "float16", "leaky_relu", True),
    Case((300, 3), -1, "float32", "relu6", True, 1e4),
    Case((4097, 1), -1, "float32"),
    Case((1, 100), -1, "float32", "relu"),
    Case((130, 257), -1, "float64", "leaky_relu", True),
    Case((2500, 100), -1, "bfloat16", None, False, 100.0),
    Case((3, 7, 7, 33), -1, "float16"),
    Case((9, 33, 7, 7), 1, "float32", "relu", True),
    Case((9, 33, 7, 7), 1, "bfloat16", "relu6"),
    Case((5, 3, 41, 43), 1, "float32", None, False, 1e6),
    Case((5, 3, 41, 43), 1, "float16", "leaky_relu", True),
    Case((2, 65, 129), 1, "float64", "relu"),
    Case((1, 2, 20001), 1, "float32", "relu"),
    Case((64, 1, 33), 1, "bfloat16"),
    Case((3, 100, 1), 1, "float32"),
    Case((17, 8, 2), 1, "float32", "leaky_relu", True),
    Case((6, 5, 3, 4), 2, "bfloat16", "relu", True),
]


def name_of(case: Case) -> str:
    shape = "x".join(map(str, case.shape))
    return f"{shape} axis {case.axis} {case.dtype} {case.activation or 'linear'}{' + residual' * case.residual}"


def values(shape: tuple[int, ...], seed: int, offset: float = 0.0) -> np.ndarray:
    """Multiples of 2^-12 in [-4, 4) plus an offset, from a 64-bit mix of the index."""
    count = int(np.prod(shape))
    n = np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)
    n = (n ^ (n >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    n = (n ^ (n >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((n >> np.uint64(49)).astype("float64") / 4096 - 4 + offset).reshape(shape)


def digest(arrays: list[np.ndarray]) -> str:
    """SHA-256 of the arrays' bits, in order; every NaN counts as the same."""
    whole = hashlib.sha256()
    for array in arrays:
        wide = array.astype("float64")
        bits = np.ascontiguousarray(array).view(f"u{array.itemsize}")
        whole.update(np.where(np.isnan(wide), 0x7FFF, bits).astype(bits.dtype).tobytes())
    return whole.hexdigest()


def results(case: Case, xp: Any) -> dict[str, str]:
    """The hashes of one case; xp has `to` and `host`."""
    from bnfast import cuda

    dtype = numpy_dtype(case.dtype)
    C = case.shape[case.axis]
    x, dy, residual = (xp.to(values(case.shape, i, case.offset * (i == 1)).astype(dtype)) for i in (1, 2, 3))
    vector = "float64" if case.dtype == "float64" else "float32"
    gamma, beta, mean, variance = (xp.to((values((C,), i) / 8 + 1).astype(vector)) for i in (4, 5, 6, 7))
    kwargs: dict[str, Any] = {"axis": case.axis, "activation": case.activation}
    kwargs |= {"residual": residual} if case.residual else {}
    train = cuda.batch_norm_train(x, gamma, beta, mean, variance, momentum=0.75, correction=1, **kwargs)
    infer = cuda.batch_norm_infer(x, mean, variance, gamma, beta, **kwargs)
    grad = cuda.batch_norm_grad(dy, x, train.mean, train.invstd, gamma, beta, **kwargs)
    moments = cuda.moments(x, axis=case.axis)
    groups = {
        "train": [*train, mean, variance],
        "infer": [infer],
        "grad": [array for array in grad if array is not None],
        "moments": [moments.mean, moments.variance],
    }
    return {name: digest([xp.host(array) for array in arrays]) for name, arrays in groups.items()}
