"""Without JAX only the tests of call frames are collected here; BNFAST_REQUIRE=jax makes that an error."""

import importlib.util

import pytest
from needs import REQUIRED

collect_ignore_glob = [] if importlib.util.find_spec("jax") else ["test_[!h]*.py"]
if collect_ignore_glob and "jax" in REQUIRED:
    raise pytest.UsageError("jax is in BNFAST_REQUIRE, but it isn't installed")


@pytest.fixture
def x64():
    """Float64 arrays for one test."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
