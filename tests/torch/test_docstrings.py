"""Every public name of bnfast.torch has an example in its docstring that runs, and a row in docs/pytorch.md."""

import doctest
import re
from pathlib import Path

import bnfast.torch
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "pytorch.md").read_text()


@pytest.mark.parametrize("name", bnfast.torch.__all__)
def test_the_example_runs(name):
    doc = getattr(bnfast.torch, name).__doc__
    assert "\n    Example:\n" in doc
    assert f"`{name}`" in PAGE
    example = doctest.DocTestParser().get_doctest(doc, {}, name, None, None)
    report = []
    failed, tried = doctest.DocTestRunner().run(example, out=report.append)
    assert tried
    assert not failed, "".join(report)


def test_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "pytorch.md", "exec"), {})
    assert "1 of 1 normalizations on bnfast" in capsys.readouterr().out
