"""Every public function and class has an example in its docstring, and the examples run (tests/cuda has CUDA's)."""

import importlib
import inspect
import re

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


def variable(value):
    """The names of *args and **kwargs in a callable's signature; a class's is that of __init__."""
    function = value.__init__ if inspect.isclass(value) else value
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, each in inspect.signature(function).parameters.items() if each.kind in kinds]


@pytest.mark.parametrize(("space", "name"), HERE, ids=[f"{space}.{name}" for space, name in HERE])
def test_arguments_are_named(need, space, name):
    """Only keywords that a framework's base class takes, and may take more of, stay **kwargs; the docstring says so."""
    if NAMESPACES[space] is not None:
        need(NAMESPACES[space])
    value = getattr(importlib.import_module(space), name)
    if isinstance(value, type) and issubclass(value, tuple):
        return  # a NamedTuple, whose __new__ takes its fields
    frameworks = {kind.__module__.partition(".")[0] for kind in getattr(value, "__mro__", ())} & {"keras", "flax"}
    assert variable(value) in ([], ["kwargs"] if frameworks else [])
    if variable(value):  # a class that takes them as bnfast's own base class does need not say it again
        docs = "".join(kind.__doc__ or "" for kind in value.__mro__ if kind.__module__.startswith("bnfast."))
        assert re.search(r"kwargs: (those|arguments) of keras\.layers\.Layer|all keywords of flax\.", docs)


@pytest.mark.parametrize("space", ["bnfast", "bnfast.keras"])
def test_the_conditional_layer_has_the_arguments_of_the_plain_one(need, space):
    if NAMESPACES[space] is not None:
        need(NAMESPACES[space])
    module = importlib.import_module(space)
    plain, conditional = (
        inspect.signature(kind.__init__).parameters
        for kind in (module.BatchNormalization, module.ConditionalBatchNormalization)
    )
    names = list(conditional)
    assert names == ["self", "num_classes", *list(plain)[1:]]
    for name in names[2:]:
        assert (conditional[name].default, conditional[name].kind) == (plain[name].default, plain[name].kind), name


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
