"""Every cell of docs/states.md: a batch with NaN, infinity, overflow, one value or none, under each policy."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import bnfast
import numpy as np
import pytest
from sample_data import dtype_of

PAGE = Path(__file__).parents[2] / "docs" / "states.md"
POLICIES = ("propagate", "skip_update", "raise")
NAN, INF = np.nan, np.inf
BETA, EPSILON = 0.5, 1e-3


class State(NamedTuple):
    values: list[float]  # of one channel
    mean: float
    variance: float
    y: float | None  # of all values; None: x normalized
    moves: bool = True  # whether the moving statistics of propagate change
    finite: bool = True  # whether the statistics are, so that skip_update and raise do nothing special
    mask: list[float] | None = None
    epsilon: float = EPSILON
    dx: float | None = 0.0  # of all values; None: finite, with any value
    gamma: float = 1.0
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")


STATES = {
    "ordinary": State([1, 2, 3, 6], 3, 3.5, None, dx=None),
    "NaN": State([1, NAN, 3, 6], NAN, NAN, NAN, finite=False, dx=NAN),
    "infinity": State([1, INF, 3, 6], INF, NAN, NAN, finite=False, dx=NAN),
    "both infinities": State([-INF, INF, 3, 6], NAN, NAN, NAN, finite=False, dx=NAN),
    "variance overflows": State([2e38, 0, 0, 2e38], 1e38, INF, BETA, finite=False, dtypes=("float32", "bfloat16")),
    "variance overflows, float64": State([2e300, 0, 0, 2e300], 1e300, INF, BETA, finite=False, dtypes=("float64",)),
    "y overflows float16": State([-1, 1, -1, 1], 0, 1, INF, gamma=1e30, dx=None, dtypes=("float16",)),
    "constant": State([3, 3, 3, 3], 3, 0, BETA),
    "constant, epsilon 0": State([3, 3, 3, 3], 3, 0, BETA, epsilon=0.0),
    "one value": State([3], 3, 0, BETA),
    "empty": State([], 0, 0, None, moves=False),
    "fully masked": State([1, 2, 3, 6], 0, 0, None, moves=False, mask=[0, 0, 0, 0], dx=None),
    "NaN under the mask": State([1, 2, NAN, 3], 2, 2 / 3, None, mask=[1, 1, 0, 1], dx=NAN),
}


def run(state: State, dtype: str, policy: str, rows: bool) -> dict[str, Any]:
    """A call on this channel between two ordinary ones."""
    kind, parameter = dtype_of(dtype), np.float64 if dtype == "float64" else np.float32
    M = len(state.values)
    x = np.zeros((M, 3)) + np.arange(M)[:, None] % 600
    x[:, 1] = state.values
    x = x.astype(kind)
    x = np.ascontiguousarray(x.T[None]) if rows else x
    axis = 1 if rows else -1
    mask = None if state.mask is None else np.array(state.mask, parameter).reshape((1, M) if rows else (M,))
    gamma, beta = np.array([1, state.gamma, 1], parameter), np.full(3, BETA, parameter)
    moving = np.full(3, 0.25), np.full(3, 2.0)
    words = {"axis": axis, "mask": mask}
    result, error = None, None
    try:
        result = bnfast.batch_norm_train(
            x, gamma, beta, *moving, momentum=0.5, epsilon=state.epsilon, nan_policy=policy, **words
        )
    except FloatingPointError as raised:
        error = raised
    channel = (lambda a: np.moveaxis(a, axis, 0)[1].ravel().astype(float)) if M else np.ravel
    found: dict[str, Any] = {"error": error, "moving": [each.copy() for each in moving]}
    if result is not None:
        grad = bnfast.batch_norm_grad(np.ones_like(x), x, result.mean, result.invstd, gamma, **words)
        found |= {"y": channel(result.y), "mean": result.mean, "variance": result.variance, "dx": channel(grad.dx)}
        found["others"] = np.moveaxis(result.y, axis, 0)[[0, 2]].astype(float)
    return found


CELLS = [(name, dtype, policy) for name, state in STATES.items() for dtype in state.dtypes for policy in POLICIES]


@pytest.mark.parametrize("times", [1, 150, 5000])  # 5000: blocks of one channel are merged, by several threads
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("name", "dtype", "policy"), CELLS)
def test_a_cell(name: str, dtype: str, policy: str, rows: bool, times: int) -> None:
    state = STATES[name]
    state = state._replace(values=state.values * times, mask=state.mask and state.mask * times)
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    found = run(state, dtype, policy, rows)
    mean, variance = found["moving"]
    if policy == "raise" and not state.finite:
        assert "non-finite batch statistics in channels 1" in str(found["error"])
        np.testing.assert_array_equal([mean, variance], [[0.25] * 3, [2.0] * 3])
        return
    assert found["error"] is None
    np.testing.assert_allclose(found["mean"][1], state.mean, rtol=4e-3 if state.mean > 1e30 else 1e-6)
    np.testing.assert_allclose(found["variance"][1], state.variance, rtol=1e-6)
    if state.y is not None:
        wanted = np.full(len(state.values), state.y)
        if name == "y overflows float16":
            wanted = np.array(state.values) * INF
        np.testing.assert_array_equal(found["y"], wanted)
    elif state.values:
        scale = 1 / np.sqrt(state.variance + state.epsilon)
        tolerance = {"float16": 1e-2, "bfloat16": 3e-1}.get(dtype, 1e-5)
        wanted = (np.array(state.values) - state.mean) * scale + BETA
        np.testing.assert_allclose(found["y"], wanted, rtol=tolerance, atol=tolerance)
    if state.dx is None:
        assert np.isfinite(found["dx"]).all()
    else:
        np.testing.assert_array_equal(np.abs(found["dx"]), np.full(len(state.values), state.dx))
    assert np.isfinite(found["others"]).all()
    if not state.moves or (policy == "skip_update" and not state.finite):
        assert (mean[1], variance[1]) == (0.25, 2.0)
    else:
        np.testing.assert_allclose(mean[1], 0.125 + state.mean / 2, rtol=4e-3 if state.mean > 1e30 else 1e-6)
        np.testing.assert_allclose(variance[1], 1 + state.variance / 2, rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("values", "mean"), [([INF], INF), ([-INF], -INF), ([INF, -INF], NAN), ([INF, NAN], NAN)])
def test_infinities_far_apart(values: list[float], mean: float, dtype: str, axis: int) -> None:
    """Each in a block of its own, which the others' are merged with."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = np.random.default_rng(0).standard_normal((20_000, 2)).astype(dtype_of(dtype))
    for i, value in enumerate(values):
        x[7000 + 9000 * i, 1] = value
    found = bnfast.moments(np.ascontiguousarray(x.T[None]) if axis == 1 else x, axis=axis)
    np.testing.assert_array_equal(found.mean[1], mean)
    assert np.isnan(found.variance[1])
    assert np.isfinite([found.mean[0], found.variance[0]]).all()
    groups = bnfast.group_norm(x.reshape(1, -1, 2), 2, axis=-1)
    np.testing.assert_array_equal(groups.mean[0, 1], mean)


def test_the_page_has_these_states() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    assert [row for row in rows if row not in ("state", "---")] == list(STATES)
