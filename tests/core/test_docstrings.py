"""Every public function and class of bnfast has an example in its docstring, and the examples run."""

import doctest

import bnfast
import pytest

PUBLIC = [name for name in bnfast.__all__ if callable(getattr(bnfast, name))]


@pytest.fixture(autouse=True)
def defaults():
    """Restores the settings that examples change."""
    limit = bnfast.memory_statistics()["limit_bytes"]
    yield
    bnfast.set_num_threads(None)
    bnfast.set_memory_limit(limit)


def test_only_the_version_is_not_callable():
    assert set(bnfast.__all__) - set(PUBLIC) == {"__version__"}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    doc = getattr(bnfast, name).__doc__
    assert "\n    Example:\n" in doc, f"bnfast.{name} must have a section 'Example:' in its docstring"
    example = doctest.DocTestParser().get_doctest(doc, {}, f"bnfast.{name}", None, None)
    assert example.examples, f"bnfast.{name} must have lines that start with >>> in its example"
    report = []
    failed, _ = doctest.DocTestRunner().run(example, out=report.append)
    assert not failed, "".join(report)
