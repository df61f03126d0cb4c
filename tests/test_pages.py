"""The code of the tutorials, docs/how-to.md and docs/numerics.md runs, the blocks of a page in order as one program."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = [path for path in sorted((DOCS / "tutorials").glob("*.md")) if path.suffixes == [".md"]]
PAGES = [*(path for path in TUTORIALS if path.name != "README.md"), DOCS / "how-to.md", DOCS / "numerics.md"]
OPTIONAL = {"tf2onnx"}  # a block that imports one of these is left out without it


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_there_are_pages():
    assert len(PAGES) >= 9
    assert all(blocks(page) for page in PAGES)
    assert sum(len(blocks(page)) for page in PAGES) >= 35


@pytest.mark.needs("sklearn", "tensorflow", "keras")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page, tmp_path, monkeypatch, need):
    keras = need("keras")
    monkeypatch.chdir(tmp_path)
    policy, names, left_out = keras.config.dtype_policy(), {}, []
    try:
        for number, block in enumerate(blocks(page), 1):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block, f"{page.name}, block {number}", "exec"), names)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                left_out.append(error.name)
    finally:
        keras.config.set_dtype_policy(policy)
    if left_out:
        need(left_out[0])  # skips the page by that name, or fails it under BNFAST_REQUIRE
