"""Invariant 1: results depend on the values, shape, dtype and axis alone. Raw bits are compared, all NaNs as one.

Every comparison is with the baseline instruction set on one thread. The other run has another instruction set, several
threads, the caller's flush-to-zero mode, strided or unaligned copies of the values, or other cache sizes.
"""

import functools
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import bnfast
import numpy as np
import pytest
import sample_data
from bnfast import _core
from exact import LAYOUTS, bits, force_isa_and_threads, restored_settings  # noqa: F401  # the fixture restores the settings

BASELINE = bnfast.build_info()["isas"][-1]
FLUSH = 0x8040  # MXCSR's FTZ and DAZ
SHAPES = [  # (shape, axis): columns and rows, packed and odd sizes, one and many blocks and chunks
    ((1, 23), -1),
    ((700, 3), -1),
    ((6001, 24), -1),
    ((1001, 100), -1),
    ((130, 257), 1),
    ((5, 7, 3, 67), 3),
    ((5, 23, 7, 7), 1),
    ((900, 3, 2), 1),
    ((3, 5, 4501), 1),
    ((270001, 1), 1),
]


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    dtype: str
    activation: str | None
    affine: bool
    residual: bool
    mask: str | None = None  # "weights", "ones"
    denormal: bool = False  # x, residual and beta
    non_finite: bool = False  # some values are NaN or infinite
    distant_centers: bool = False  # in every other channel the center samples are far off, so the centers move


def option_cases(shape, axis, dtype):
    """Every option with every kind of loop. Large shapes (several chunks per row) run once."""
    yield Case(shape, axis, dtype, "relu", True, True, "weights")
    if math.prod(shape) > 200000:
        return
    yield Case(shape, axis, dtype, None, False, False, distant_centers=True)
    yield Case(shape, axis, dtype, "relu6", True, False)
    yield Case(shape, axis, dtype, "leaky_relu", False, True, "weights")


@functools.lru_cache(maxsize=2)  # the key has no denormal float, which flush to zero would change
def arguments(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(len(case.shape) + sum(case.shape))
    dtype, channels = sample_data.dtype_of(case.dtype), case.shape[case.axis]
    x, dy, residual = (rng.standard_normal(case.shape) + offset for offset in (0.7, 0, 0))
    if case.non_finite:
        for a, value in ((x, np.nan), (x, np.inf), (dy, -np.inf), (residual, np.nan)):
            a.flat[rng.integers(0, a.size, 3)] = value
    parameter = np.float64 if dtype == np.float64 else np.float32
    if case.distant_centers:
        np.moveaxis(x, case.axis, -1)[..., ::2] += 50.0 * sample_data.in_center_sample(case.shape, case.axis)[..., None]
    gamma, beta, mean, variance = sample_data.vectors(channels, rng, parameter)
    weights = np.moveaxis(x, case.axis, -1)[..., 0]
    scale = {"float64": 1e-310, "float16": 1e-6}.get(case.dtype, 1e-40) if case.denormal else 1.0
    masks = {None: None, "weights": rng.integers(0, 4, weights.shape) / 2, "ones": np.ones(weights.shape)}
    return {
        "x": (x * scale).astype(dtype),
        "dy": dy.astype(dtype),
        "residual": (residual * scale).astype(dtype) if case.residual else None,
        "gamma": gamma if case.affine else None,
        "beta": (beta * scale).astype(parameter) if case.affine else None,
        "moving_mean": (mean * scale).astype(parameter),
        "moving_variance": variance.astype(np.float32),
        "mask": masks[case.mask],
    }


def all_results(case: Case, check=lambda: None, change=lambda a: a, give_out=False) -> dict[str, Any]:
    """Results of the four functions for a case. `check` runs after each call; `change` may re-layout the inputs."""
    a = arguments(case)
    x, dy, residual = (None if a[name] is None else change(a[name]) for name in ("x", "dy", "residual"))
    mm, mv = a["moving_mean"].copy(), a["moving_variance"].copy()
    kwargs = {"axis": case.axis, "activation": case.activation, "residual": residual}
    affine = a["gamma"], a["beta"]

    def out():
        return {"out": np.empty(case.shape, a["x"].dtype) if give_out else None}

    train = bnfast.batch_norm_train(x, *affine, mm, mv, correction=1, mask=a["mask"], **kwargs, **out())
    check()
    statistics = train.mean, train.invstd
    grad = bnfast.batch_norm_grad(
        dy, x, *statistics, *affine, mask=a["mask"], dmean=train.mean, dvariance=train.variance, **kwargs, **out()
    )
    check()
    by_y = None
    if residual is not None:
        with_y = {**kwargs, "residual": None, "y": change(train.y)}
        by_y = bnfast.batch_norm_grad(dy, x, *statistics, *affine, mask=a["mask"], **with_y, **out())
        check()
    frozen = bnfast.batch_norm_grad(dy, x, *statistics, *affine, training=False, **kwargs, **out())
    check()
    infer = bnfast.batch_norm_infer(x, a["moving_mean"], a["moving_variance"], *affine, **kwargs, **out())
    check()
    moments = bnfast.moments(x, axis=case.axis, mask=a["mask"])
    check()
    named = {"moving_mean": mm, "moving_variance": mv, "infer": infer}
    results = {"train": train, "grad": grad, "frozen": frozen, "moments": moments}
    for prefix, result in (results if by_y is None else {**results, "by_y": by_y}).items():
        named |= {f"{prefix}.{name}": value for name, value in zip(result._fields, result, strict=True)}
    return named


def assert_same_bits(actual, expected, case):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None
            continue
        assert np.asarray(actual[name]).dtype == np.asarray(value).dtype
        if not np.array_equal(bits(actual[name]), bits(value)):
            places = np.argwhere(bits(actual[name]) != bits(value))
            raise AssertionError(f"{name} differs at {len(places)} places, first {places[0]}: {case}")


@functools.cache
def expected_of(case: Case) -> dict[str, Any]:
    return all_results(case, force_isa_and_threads(BASELINE, 1))


@pytest.mark.sample(60)
@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_instruction_sets_and_threads(shape, axis, dtype, isa, force_isa):
    force_isa(isa if BASELINE != "neon" else BASELINE)
    isa = bnfast.build_info()["isa"]
    for case in option_cases(shape, axis, dtype):
        for threads in (1, 2, 3, 8):
            assert_same_bits(all_results(case, force_isa_and_threads(isa, threads)), expected_of(case), (case, threads))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES[1:8], ids=str)
def test_flush_to_zero_set_by_the_caller(shape, axis, dtype):
    for denormal in (False, True):
        case = Case(shape, axis, dtype, "relu", True, True, "weights", denormal)
        expected = expected_of(case)
        if denormal:
            assert 0 < np.abs(expected["train.mean"]).max() < 1e-5  # the values are denormal
        for isa in bnfast.build_info()["isas"]:
            for threads in (1, 3):
                check = force_isa_and_threads(isa, threads)
                before = _core._fp_mode()
                _core._set_fp_mode(before | FLUSH)
                try:
                    actual = all_results(case, check)
                    after = _core._fp_mode()
                finally:
                    _core._set_fp_mode(before)
                assert after & 0xFFC0 == (before | FLUSH) & 0xFFC0
                assert_same_bits(actual, expected, (case, isa, threads))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_alignment(layout, dtype):
    for shape, axis in SHAPES[:8]:
        for case in list(option_cases(shape, axis, dtype))[::3]:
            for threads in (1, 3):
                actual = all_results(case, force_isa_and_threads(bnfast.build_info()["isa"], threads), LAYOUTS[layout])
                assert_same_bits(actual, expected_of(case), (case, layout))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_an_all_ones_mask_is_none(shape, axis, dtype):
    for isa in bnfast.build_info()["isas"]:
        check = force_isa_and_threads(isa, 2)
        case = Case(shape, axis, dtype, "leaky_relu", True, False, distant_centers=True)
        assert_same_bits(all_results(case._replace(mask="ones"), check), all_results(case, check), (case, isa))


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_repeated_runs_and_out(shape, axis, dtype):
    case = Case(shape, axis, dtype, "relu", True, True)
    _core._set_serial_bytes(0)
    bnfast.set_num_threads(3)  # any thread that wakes in time joins, so runs differ
    for repeat in range(6):
        assert_same_bits(all_results(case, give_out=repeat % 2 == 1), expected_of(case), case)


@pytest.mark.parametrize("dtype", sample_data.DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:-1], ids=str)
def test_nan_positions_are_the_same(shape, axis, dtype):
    for activation in sample_data.ACTIVATIONS:
        case = Case(shape, axis, dtype, activation, True, True, non_finite=True)
        expected = expected_of(case)
        assert np.isnan(expected["train.y"]).any()
        for isa in bnfast.build_info()["isas"]:
            assert_same_bits(all_results(case, force_isa_and_threads(isa, 3)), expected, (case, isa))


def test_in_place_is_the_same():
    for dtype in sample_data.DTYPES:
        for shape, axis in SHAPES:
            case = Case(shape, axis, dtype, None, False, False)
            expected, a = expected_of(case), arguments(case)
            x = a["x"].copy()
            result = bnfast.batch_norm_train(x, axis=axis, out=x)
            assert result.y is x
            assert np.array_equal(bits(x), bits(expected["train.y"]))
            statistics = expected["train.mean"], expected["train.invstd"]
            wanted = bnfast.batch_norm_grad(a["dy"], a["x"], *statistics, axis=axis).dx
            for over in ("dy", "x"):
                given = {"dy": a["dy"].copy(), "x": a["x"].copy()}
                grad = bnfast.batch_norm_grad(given["dy"], given["x"], *statistics, axis=axis, out=given[over])
                assert grad.dx is given[over]
                assert np.array_equal(bits(grad.dx), bits(wanted))


# ---- settings read at load, in another process -----------------------------------------------------------------------


def digest() -> str:
    """A hash of the results of some cases, run serially and by several threads with this process's environment."""
    total = hashlib.sha256()
    for threads in (1, 3):
        check = force_isa_and_threads(bnfast.build_info()["isa"], threads)
        for shape, axis in SHAPES:
            for dtype in sample_data.DTYPES:
                *_, case = option_cases(shape, axis, dtype)
                for value in all_results(case, check).values():
                    if value is not None:
                        total.update(bits(value).tobytes())
    return total.hexdigest()


def in_a_process(**environment):
    code = "import json, test_same_bits as t; print(json.dumps([t.digest(), t._core._last_run()[0]]))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path} | environment
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_cache_sizes_change_no_bit():
    expected = digest()
    tiny = {"BNFAST_L1_BYTES": "1024", "BNFAST_L2_BYTES": "1024", "BNFAST_L3_BYTES": "1024"}  # all stores streamed
    huge = {
        "BNFAST_L2_BYTES": str(1 << 28),
        "BNFAST_L3_BYTES": str(1 << 32),
    }  # every group of channels fits in the cache
    for environment in (tiny, huge):
        assert in_a_process(**environment)[0] == expected


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_environment_chooses_the_instruction_set(isa, force_isa):
    force_isa(isa)
    code = "import bnfast; i = bnfast.build_info(); print(i['isa'], '|', i['isa_reason'])"
    environment = os.environ | {"BNFAST_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{isa} |")
    assert "BNFAST_ISA" in run.stdout


def test_an_unsupported_instruction_set_is_one_line_and_the_best_one_runs():
    environment = os.environ | {"BNFAST_ISA": "altivec"}
    run = subprocess.run([sys.executable, "-c", "import bnfast"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    (line,) = run.stderr.strip().splitlines()
    assert line.startswith("bnfast: BNFAST_ISA must be one of")
    assert BASELINE in line
    assert "altivec" in line


def test_forcing_an_unknown_instruction_set_changes_nothing():
    before = bnfast.build_info()["isa"]
    with pytest.raises(ValueError, match=r"isa must be one of .*baseline.* Received: altivec"):
        _core._set_isa("altivec")
    assert bnfast.build_info()["isa"] == before
