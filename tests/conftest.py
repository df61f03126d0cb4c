"""Shared fixtures. needs.py says what BNFAST_REQUIRE does, running.py which tests run, and which run alone."""

import os
import sys

import bnfast
import hypothesis
import numpy as np
import pytest
from bnfast import _core
from needs import KNOWN, REQUIRED, absent, need_module

pytest_plugins = ["running"]

for helper in (
    *("sample_data", "tolerances", "conversion", "exact", "fold_cases", "keras_models", "norms_cases", "taped"),
):
    pytest.register_assert_rewrite(helper)

# Fixed examples, so that a run says the same twice; HYPOTHESIS_PROFILE=explore looks further.
hypothesis.settings.register_profile("fixed", deadline=None, max_examples=60, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config: pytest.Config) -> None:
    if unknown := REQUIRED - KNOWN:
        raise pytest.UsageError(f"BNFAST_REQUIRE names {sorted(unknown)}; known are {sorted(KNOWN)}")


@pytest.fixture(autouse=True)
def jax_stays_as_it_is():
    """The benchmark's JAX computes in 64 bits; the next test's may not."""
    jax = sys.modules.get("jax")
    before = bool(jax and jax.config.jax_enable_x64)
    yield
    if (jax := sys.modules.get("jax")) and jax.config.jax_enable_x64 != before:
        jax.config.update("jax_enable_x64", before)


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
        _core._set_full_team(True)
        bnfast.set_num_threads(n)

    yield force
    _core._set_full_team(False)
    bnfast.set_num_threads(None)
    _core._set_serial_bytes(None)


@pytest.fixture
def force_fp_mode():
    """force_fp_mode(bits) sets bits (0x8040: flush to zero) of this thread's MXCSR."""
    before = _core._fp_mode()
    yield lambda bits: _core._set_fp_mode(before | bits)
    _core._set_fp_mode(before)
