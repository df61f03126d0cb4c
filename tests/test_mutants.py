"""The tools behind `just mutants` and `just fuzz` do what they say."""

import json

import fuzzing
import pytest
from mutants import __main__ as mutants
from mutants.points import Point, Reader, replaced_number
from mutants.schemata import alone, render

SOURCE = b"int f(int a, int b) {\n    g(a);\n    return a < b + 1;\n}\n"


def point(before: str, text: str, outer: str, kind: str) -> Point:
    outer_start, start = SOURCE.index(outer.encode()), SOURCE.index(before.encode())
    end = start + len(before)
    return Point("f.cpp", 3, kind, start, end, outer_start, outer_start + len(outer), text, before, False)


LESS = point("<", "<=", "a < b + 1", "comparison")
PLUS = point("+", "-", "b + 1", "operator")
CALL = point("g(a)", "", "g(a)", "statement")


def test_mutants_nest_in_one_source():
    text = render(SOURCE, [(1, PLUS), (2, LESS), (3, CALL)]).decode()
    assert "if (!(bnfast_mutant == 3)) g(a);" in text
    less, plus = "(bnfast_mutant == 2) ? (a <= b + 1)", "((bnfast_mutant == 1) ? (b - 1) : (b + 1))"
    assert f"return ({less} : (a < {plus}));" in text


def test_a_mutant_alone_changes_one_place():
    assert alone(SOURCE, LESS) == SOURCE.replace(b"<", b"<=")
    assert alone(SOURCE, CALL) == SOURCE.replace(b"g(a)", b"(void)0")
    assert render(SOURCE, []) == SOURCE


def test_constants_become_their_neighbours():
    assert replaced_number("8") == ["9", "7"]
    assert replaced_number("0u") == ["1u"]
    assert replaced_number("0x1000") == ["4097", "4095"]
    assert replaced_number("0.5f") == ["(0.5f * 2)"]
    assert replaced_number("0x1p-3f") == ["(0x1p-3f * 2)"]
    assert replaced_number("0.0") == ["(1 + 0.0)"]


def test_points_of_a_source_are_found():
    pytest.importorskip("clang.cindex", reason="libclang is not installed")
    file = "csrc/cpu/environment.cpp"
    found = {(p.line, p.said) for p in Reader(mutants.ROOT, file.__eq__).points(mutants.ROOT / file)}
    text = (mutants.ROOT / file).read_text().splitlines()
    line = next(number for number, line in enumerate(text, 1) if "c < ' ' || c > '~'" in line)
    assert {(line, "|| -> &&"), (line, "< -> <="), (line, "< -> >="), (line, "> -> <=")} <= found
    assert any(said.startswith("without std::fprintf") for _, said in found)


def test_the_extent_of_an_array_is_a_constant_expression(tmp_path):
    pytest.importorskip("clang.cindex", reason="libclang is not installed")
    (tmp_path / "f.cpp").write_text(
        "int f(int n) {\n    int a[8];\n    int b[2][3] = {{n, 5}};\n    return a[4] + b[1][0];\n}\n"
    )
    points = list(Reader(tmp_path, "f.cpp".__eq__).points(tmp_path / "f.cpp"))
    assert {p.before for p in points if p.constant} == {"8", "2", "3"}
    assert {p.before for p in points if not p.constant} == {"5", "4", "1", "0", "+"}


def test_every_survivor_has_a_reason():
    if mutants.DATA.exists():
        rows = json.loads(mutants.DATA.read_text())["rows"]
        assert [row for row in mutants.explained(rows) if not row["killed_by"] and not row["reason"]] == []


def test_the_corpus_is_small_and_whole():
    files = sorted(fuzzing.CORPUS.iterdir())
    assert [path.stem for path in files] == sorted(fuzzing.TARGETS)
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in files:
        lines = path.read_text().split()
        assert lines
        assert all(bytes.fromhex(line) for line in lines)
