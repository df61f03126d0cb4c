"""Fixtures of all tests that need TensorFlow. Without it each module skips itself, unless BNFAST_REQUIRE names it."""

import importlib
import os
import sys

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if "tensorflow" in os.environ.get("BNFAST_REQUIRE", ""):
    importlib.import_module("tensorflow")  # its absence is then an error, not a skip


@pytest.fixture(params=["numpy_function", "op"])
def each_bridge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once through either way into TensorFlow; its value says which. Linux always has the op."""
    from bnfast.tensorflow import op

    name = str(request.param)
    available, reason = op.status()
    if name == "op" and not available:
        (pytest.fail if sys.platform == "linux" else pytest.skip)(f"op: {reason}")
    monkeypatch.setenv("BNFAST_BRIDGE", name)
    return name


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2026)
