"""The documents that a test can check: generated benchmark tables, the form of decisions and of performance pages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
TOPICS = sorted(path for path in (DOCS / "performance").glob("*.md") if path.name != "README.md")
COLUMNS = ["tried", "expected", "measured", "machine", "commit", "kept?"]


def cells(line: str) -> list[str]:
    """The cells of one line of a Markdown table; an escaped | belongs to its cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table of a page as its rows of cells, the ruler included."""
    return [[cells(line) for line in block.splitlines()] for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]


TRANSLATIONS = [
    path for path in (ROOT / "README.zh.md", *sorted((DOCS / "tutorials").glob("*.zh.md"))) if path.exists()
]


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.name)
def test_a_translation_has_the_code_and_the_structure_of_its_original(path):
    original = path.with_name(path.name.replace(".zh.md", ".md"))
    texts = [each.read_text() for each in (path, original)]
    ours, theirs = (re.findall(r"```.*?```", text, re.DOTALL) for text in texts)
    assert ours == theirs, f"copy the code blocks of {original.name} to {path.name}"
    ours, theirs = (re.findall(r"^#+ ", text, re.MULTILINE) for text in texts)
    assert ours == theirs, f"{path.name} must have the headings of {original.name}"
    ours, theirs = ([[len(row) for row in table] for table in tables(text)] for text in texts)
    assert ours == theirs, f"{path.name} must have the tables of {original.name}"
    ours, theirs = (set(re.findall(r"(?<![\w.])\d+\.\d\d(?!\d)", text)) for text in texts)
    assert ours == theirs, f"{path.name} must have the figures of {original.name}"


def test_there_are_translations():
    assert len(TRANSLATIONS) >= 3


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", DOCS / "benchmarks" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_something_to_check(render):
    assert DECISIONS
    assert TOPICS
    assert render.result_files()


def test_generated_tables_are_those_of_their_data(render):
    assert render.differing() == [], "run python docs/benchmarks/render.py"


def test_every_picture_has_data(render):
    pictures = {path.with_suffix(".json") for path in (DOCS / "benchmarks").rglob("*.png")}
    assert pictures <= set(render.result_files())


def test_a_table_that_differs_from_its_data_is_found(render, monkeypatch, tmp_path):
    (tmp_path / "index.json").write_text('[{"folder": "cpu/abc1234", "date": "2026-11-21", "about": "x"}]')
    (tmp_path / "cpu" / "abc1234").mkdir(parents=True)
    data = '{"title": "T", "machine": "M", "date": "D", "program": "P", "about": [], "tables":'
    columns = '[{"columns": [{"name": "a"}, {"name": "b", "format": ".2f"}], "rows": [[1, 2.0], ["x", null]]}]}'
    (tmp_path / "cpu" / "abc1234" / "t.json").write_text(data + columns)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    monkeypatch.setattr(render, "INDEX", tmp_path / "index.json")
    assert len(render.differing()) == 3
    for page, text in render.pages():
        page.write_text(text)
    assert render.differing() == []
    page = tmp_path / "cpu" / "abc1234" / "t.md"
    assert "| 1 | 2.00 |\n| x | - |" in page.read_text()
    page.write_text(page.read_text().replace("2.00", "1.00"))
    assert render.differing() == [page]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_has_its_headings(path):
    text = path.read_text()
    number = path.name[:4]
    assert re.match(rf"# {number}\. \S", text)
    assert re.search(r"^Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    status = re.search(r"^Status: (.*)$", text, re.MULTILINE)
    assert status is not None
    replaced = re.fullmatch(r"Accepted|Superseded by \[(\d{4})\]\((\d{4})-[\w-]+\.md\)", status[1])
    assert replaced is not None, f"{path.name}: {status[1]}"
    if replaced[1]:
        later = next(other for other in DECISIONS if other.name.startswith(replaced[1]))
        assert re.search(rf"^Supersedes: \[{number}\]", later.read_text(), re.MULTILINE), later.name


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_what_a_decision_supersedes_says_so_too(path):
    for number in re.findall(r"^Supersedes: \[(\d{4})\]", path.read_text(), re.MULTILINE):
        earlier = next(other for other in DECISIONS if other.name.startswith(number))
        assert f"Status: Superseded by [{path.name[:4]}]" in earlier.read_text()


def test_decisions_are_numbered_from_one_and_listed():
    assert [path.name[:4] for path in DECISIONS] == [f"{n:04d}" for n in range(1, len(DECISIONS) + 1)]
    (index,) = tables((DOCS / "decisions" / "README.md").read_text())
    listed = {row[0]: row for row in index[2:]}
    assert list(listed) == [f"[{path.name[:4]}]({path.name})" for path in DECISIONS]
    for path, row in zip(DECISIONS, listed.values(), strict=True):
        text = path.read_text()
        assert text.startswith(f"# {path.name[:4]}. {row[1]}\n")
        assert f"\nStatus: {row[2]}\n" in text
        assert row[3].endswith(".")


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_a_performance_page_has_an_introduction_and_full_tables(path):
    text = path.read_text()
    found = tables(text)
    assert re.match(r"# \S.*\n\n[^|#\n]", text), "a heading, then a paragraph"
    assert found
    for rows in found:
        assert rows[0] == COLUMNS
        assert rows[2:]
        for row in rows:
            assert len(row) == len(COLUMNS), row
            assert all(row), f"write 'not recorded' where a value is missing: {row}"


def test_every_performance_page_is_listed():
    index = (DOCS / "performance" / "README.md").read_text()
    assert {name for name in re.findall(r"\]\(([\w-]+\.md)\)", index)} == {path.name for path in TOPICS}


def test_the_sketch_of_a_torch_bridge_computes_what_torch_does(need):
    torch = need("torch")
    (page,) = [path for path in DECISIONS if path.stem.endswith("five-functions-per-framework")]
    sketch: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0], page.name, "exec"), sketch)
    options = SimpleNamespace(axis=1, epsilon=1e-3)
    options._asdict = lambda: {"axis": 1, "epsilon": 1e-3, "activation": None, "negative_slope": 0.2}
    torch.manual_seed(0)
    x, weights = torch.randn(8, 5, 4, 4, requires_grad=True), torch.randn(8, 5, 4, 4)
    gamma, beta = (torch.rand(5, requires_grad=True) for _ in range(2))
    mean, variance = torch.zeros(5), torch.ones(5)
    batch = SimpleNamespace(x=x, gamma=gamma, beta=beta)
    y, *moving = sketch["train_step"](batch, (mean, variance), 0.9, options, correction=1)
    ours = [y, *torch.autograd.grad((y * weights).sum(), (x, gamma, beta)), *moving]
    z = torch.nn.functional.batch_norm(x, mean, variance, gamma, beta, True, 0.1, 1e-3)
    theirs = [z, *torch.autograd.grad((z * weights).sum(), (x, gamma, beta)), mean, variance]
    ours += [sketch["moments"](x, None, options)[0], sketch["infer"](x, gamma, beta, mean, variance, options)]
    theirs += [x.mean((0, 2, 3)).double()]
    theirs += [torch.nn.functional.batch_norm(x, mean, variance, gamma, beta, False, 0.0, 1e-3)]
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
