"""Every public name of bnfast.torch has a row in docs/pytorch.md. (tests/test_docstrings.py runs their examples.)"""

from pathlib import Path

import bnfast.torch
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "pytorch.md").read_text()


@pytest.mark.parametrize("name", bnfast.torch.__all__)
def test_the_page_names_it(name):
    assert f"`{name}`" in PAGE
