"""Without JAX only the tests of call frames are collected here, and without Flax not those of its module.
BNFAST_REQUIRE makes that an error."""

import importlib.util

import pytest
from needs import REQUIRED

collect_ignore_glob = []
for package, tests in (("jax", "test_[!h]*.py"), ("flax", "test_nnx.py")):
    if importlib.util.find_spec(package) is None:
        collect_ignore_glob.append(tests)
        if package in REQUIRED:
            raise pytest.UsageError(f"{package} is in BNFAST_REQUIRE, but it isn't installed")


@pytest.fixture
def x64():
    """Float64 arrays for one test."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
