"""The states of docs/states.md on a device, by policy: few values, and so many that they lie in several parts."""

from typing import Any, NamedTuple

import bnfast
import numpy as np
import pytest
from bnfast import cuda
from fake_cuda import Namespace, numpy_dtype

INF, NAN = np.inf, np.nan
LARGE = {"float32": 2.0**127, "bfloat16": 2.0**127, "float64": 2.0**1023}


class State(NamedTuple):
    values: list[complex]  # of one channel, 1j: LARGE
    mean: complex
    variance: float


STATES = {
    "ordinary": State([1, 2, 3, 6], 3, 3.5),
    "NaN": State([1, NAN, 3, 6], NAN, NAN),
    "infinity": State([1, INF, 3, 6], INF, NAN),
    "minus infinity": State([-INF, 1], -INF, NAN),
    "both infinities": State([-INF, INF, 3, 6], NAN, NAN),
    "the sum overflows": State([1j, 1j, 0, 0], 0.5j, INF),
    "differences overflow": State([1j, -1j, 1j, -1j], 0, INF),
    "constant and large": State([1j, 1j, 1j, 1j], 1j, 0),
    "constant": State([3, 3, 3, 3], 3, 0),
    "one value": State([3], 3, 0),
    "empty": State([], 0, 0),
}
CELLS = [
    (name, dtype)
    for name, state in STATES.items()
    for dtype in ("float32", "float64", "float16", "bfloat16")
    if dtype in LARGE or not any(isinstance(value, complex) for value in state.values)
]


def real(value: complex, dtype: str) -> float:
    return LARGE[dtype] * value.imag if isinstance(value, complex) else value


def run(module: Any, to: Any, x: np.ndarray, axis: int, policy: str) -> dict[str, Any]:
    """Training and gradient of one array, with what they did to the moving statistics."""
    moving = to(np.full(3, 0.25)), to(np.full(3, 2.0))
    on = to(x)
    try:
        train = module.batch_norm_train(on, None, None, *moving, axis=axis, momentum=0.5, nan_policy=policy)
    except FloatingPointError as raised:
        return {"error": str(raised), "moving": moving}
    grad = module.batch_norm_grad(to(np.ones_like(x)), on, train.mean, train.invstd, axis=axis)
    return {"error": None, "moving": moving, "results": [*train, *grad[:3]]}


@pytest.mark.parametrize("repeats", [1, 150])
@pytest.mark.parametrize("policy", ["propagate", "skip_update", "raise"])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(("name", "dtype"), CELLS)
def test_a_cell(dlpack: Namespace, name: str, dtype: str, axis: int, policy: str, repeats: int) -> None:
    state = STATES[name]
    mean, variance = real(state.mean, dtype), state.variance
    x = np.zeros((len(state.values) * repeats, 3)) + np.arange(len(state.values) * repeats)[:, None] % 7
    x[:, 1] = [real(value, dtype) for value in state.values] * repeats
    x = np.ascontiguousarray(x if axis == -1 else x.T[None]).astype(numpy_dtype(dtype))
    found = run(cuda, dlpack.to, x, axis, policy)
    moving = [dlpack.host(array) for array in found["moving"]]
    if policy == "raise" and not np.isfinite([mean, variance]).all():
        assert "non-finite batch statistics in channels 1" in found["error"]
        np.testing.assert_array_equal(moving, [[0.25] * 3, [2.0] * 3])
        return
    assert found["error"] is None
    y, got_mean, got_variance, _, dx, dgamma, _ = (dlpack.host(a).astype("float64") for a in found["results"])
    np.testing.assert_allclose([got_mean[1], got_variance[1]], [mean, variance], rtol=1e-6)
    y, dx = (array[:, 1] if axis == -1 else array[0, 1] for array in (y, dx))
    if np.isnan(variance):
        assert np.isnan([*y, *dx]).all()
    elif np.isinf(variance) or variance == 0:
        assert not np.any([*y, *dx, dgamma[1]])
    if not state.values or (policy == "skip_update" and not np.isfinite([mean, variance]).all()):
        wanted = [0.25, 2.0]
    else:
        wanted = [0.125 + mean / 2, 1 + variance / 2]
    np.testing.assert_allclose([each[1] for each in moving], wanted, rtol=1e-6)
    if repeats > 1:
        return
    cpu = run(bnfast, np.copy, x, axis, policy)
    limit = {"float16": 2e-3, "bfloat16": 1.6e-2}.get(dtype, 1e-5)
    for ours, theirs in zip(found["results"], cpu["results"], strict=True):
        np.testing.assert_allclose(
            dlpack.host(ours).astype("float64"), theirs.astype("float64"), rtol=limit, atol=10 * limit
        )
