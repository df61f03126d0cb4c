"""Every public name of bnfast.jax has a row in docs/jax.md, and every function an example that runs."""

import doctest
import importlib
import operator
from pathlib import Path

import bnfast.jax
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "jax.md").read_text()


@pytest.mark.parametrize("name", [*bnfast.jax.__all__, "nnx.BatchNorm"])
def test_the_example_runs(need, name):
    if name.startswith("nnx"):
        need("flax")
        importlib.import_module("bnfast.jax.nnx")
    doc = operator.attrgetter(name)(bnfast.jax).__doc__
    assert f"`{name}`" in PAGE
    assert ("\n    Example:\n" in doc) is not name.endswith("Result")
    example = doctest.DocTestParser().get_doctest(doc, {}, name, None, None)
    report = []
    failed, _ = doctest.DocTestRunner().run(example, out=report.append)
    assert not failed, "".join(report)
