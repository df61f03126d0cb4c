"""Every public name of bnfast.jax has a row in docs/jax.md. (tests/test_docstrings.py runs their examples.)"""

from pathlib import Path

import bnfast.jax
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "jax.md").read_text()


@pytest.mark.parametrize("name", [*bnfast.jax.__all__, "nnx.BatchNorm"])
def test_the_page_names_it(name):
    assert f"`{name}`" in PAGE
