"""Shared fixtures. The environment's BNFAST_REQUIRE (comma list: avx2, avx512, torch, tf_keras, onnx, ...) names the
oracles and instruction sets whose absence is a failure; without it they are skipped by name."""

import importlib
import os
from types import ModuleType

import bnfast
import hypothesis
import numpy as np
import pytest
from bnfast import _core

ISAS = ("baseline", "avx2", "avx512", "neon")
KNOWN = {*ISAS, "torch", "tf_keras", "keras", "tensorflow", "onnx", "ml_dtypes", "jax", "sklearn"}
REQUIRED = {name for name in os.environ.get("BNFAST_REQUIRE", "").replace(" ", "").split(",") if name}

# Fixed examples, so that a run says the same twice; HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("fixed", deadline=None, max_examples=60, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    if unknown := REQUIRED - KNOWN:
        raise pytest.UsageError(f"BNFAST_REQUIRE names {sorted(unknown)}; known are {sorted(KNOWN)}")


def absent(name: str, why: str) -> None:
    if name in REQUIRED:
        pytest.fail(f"{name} is in BNFAST_REQUIRE, but {why}")
    pytest.skip(f"{name}: {why}")


def need_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        absent(name, f"can't be imported: {error}")
        raise


@pytest.fixture(scope="session")
def need():
    """need("torch") is the module, or skips the test; under BNFAST_REQUIRE it fails it."""
    return need_module


@pytest.fixture
def bfloat16():
    return np.dtype(need_module("ml_dtypes").bfloat16)


@pytest.fixture
def force_isa():
    """force_isa("avx2") makes the kernels run that set, or skips (fails under BNFAST_REQUIRE) where the CPU can't."""

    def force(name: str) -> None:
        if name not in bnfast.build_info()["isas"]:
            absent(name, f"this CPU runs {bnfast.build_info()['isas']}")
        _core._set_isa(name)

    yield force
    _core._set_isa(None)


@pytest.fixture
def force_threads():
    """force_threads(n) makes every call, however small, run in a team of n."""

    def force(n: int) -> None:
        _core._set_serial_bytes(0)
        bnfast.set_num_threads(n)

    yield force
    bnfast.set_num_threads(None)
    _core._set_serial_bytes(None)


@pytest.fixture
def force_fp_mode():
    """force_fp_mode(bits) sets bits (0x8040: flush to zero) of this thread's MXCSR."""
    before = _core._fp_mode()
    yield lambda bits: _core._set_fp_mode(before | bits)
    _core._set_fp_mode(before)
