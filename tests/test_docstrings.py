"""Every public function and class has an example in its docstring, and the examples run (tests/cuda has CUDA's)."""

import importlib

import bnfast
import pytest
from docstrings import NAMESPACES, public, run_example, source

NAMES = [(space, name) for space in NAMESPACES for name in public(space)]
HERE = [(space, name) for space, name in NAMES if not space.startswith("bnfast.cuda")]


@pytest.fixture(autouse=True)
def defaults():
    """Restores the settings that examples change."""
    limit = bnfast.memory_statistics()["limit_bytes"]
    yield
    bnfast.set_num_threads(None)
    bnfast.set_memory_limit(limit)


@pytest.mark.parametrize(("space", "name"), HERE, ids=[f"{space}.{name}" for space, name in HERE])
def test_the_example_runs(need, space, name):
    if NAMESPACES[space] is not None:
        need(NAMESPACES[space])
    run_example(f"{space}.{name}", getattr(importlib.import_module(space), name))


def test_every_namespace_is_counted():
    """A package that users import must be in NAMESPACES: these are all that are not bnfast's own parts."""
    assert len(NAMES) >= 87
    for space in NAMESPACES:
        assert public(space), space
        for name in public(space):
            assert not name.startswith("_")
    packages = {path.parent.name for path in source("bnfast").parent.glob("*/__init__.py")}
    parts = {"functional", "layers", "tensorflow", "diagnosis", "cli", "benchmark", "compat", "distributed"}
    spaces = {space.split(".")[1] for space in NAMESPACES if "." in space}
    assert {name for name in packages if not name.startswith("_")} <= parts | spaces


def test_only_the_version_is_not_callable():
    assert {name for name in bnfast.__all__ if not callable(getattr(bnfast, name))} == {"__version__"}
