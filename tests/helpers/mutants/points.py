"""Where the sources can be mutated, and how: read from clang's syntax tree of each translation unit.

A mutant replaces one operator, constant or comparison, or deletes one statement. Only what the baseline instruction set
compiles is in the tree, so that code of other instruction sets has no mutants.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BINARY = {
    **{"+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "<<": ">>", ">>": "<<", "&": "|", "|": "&", "^": "|"},
    **{"&&": "||", "||": "&&", "==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">"},
    **{"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "|=": "&=", "&=": "|=", "^=": "|=", "<<=": ">>=", ">>=": "<<="},
}
NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
UNARY = {"!": "!!", "-": "", "~": "", "++": "--", "--": "++"}
NUMBER = re.compile(r"(0[xX][0-9a-fA-F']+|\d+)([uUlL]*)$")
REAL = re.compile(r"(\d+\.\d*|\.\d+|\d+(?=[eE])|0[xX][0-9a-fA-F.]+(?=[pP]))([eEpP][-+]?\d+)?([fFlL]?)$")


@dataclass(frozen=True)
class Point:
    """Replace [start, end) of the file's bytes by `text`; [outer_start, outer_end) is the whole expression."""

    file: str
    line: int
    kind: str
    start: int
    end: int
    outer_start: int
    outer_end: int
    text: str
    before: str
    constant: bool  # in a constant expression, so that it can't be chosen at run time

    @property
    def said(self) -> str:
        return f"{self.before} -> {self.text}" if self.text else f"without {self.before}"


def library() -> Any:
    """clang.cindex with its library: `pip install libclang`."""
    try:
        from clang import cindex
    except ImportError as error:
        raise SystemExit("mutants need libclang: pip install libclang") from error
    return cindex


def arguments(root: Path) -> list[str]:
    """Of the compiler, as far as the syntax tree depends on them. The wheel of libclang has no headers of its own."""
    flags = ["-x", "c++", "-std=c++17", f"-I{root}/csrc", f"-I{root}/csrc/include"]
    if clang := shutil.which("clang++"):
        resource = subprocess.run([clang, "-print-resource-dir"], capture_output=True, text=True, check=True)
        flags += ["-isystem", f"{resource.stdout.strip()}/include"]
    return flags


class Reader:
    """Walks a translation unit and yields the points of the files under `root` that `wanted` takes."""

    def __init__(self, root: Path, wanted: Any) -> None:
        self.root, self.wanted, self.cindex = root, wanted, library()
        self.contents: dict[str, bytes] = {}
        self.index = self.cindex.Index.create()

    def content(self, file: str) -> bytes:
        if file not in self.contents:
            self.contents[file] = (self.root / file).read_bytes()
        return self.contents[file]

    def points(self, unit: Path) -> Iterator[Point]:
        tree = self.index.parse(str(unit), args=arguments(self.root))
        # Only of our files: the headers of intrinsics belong to another version of clang, and don't matter.
        ours = [d for d in tree.diagnostics if d.location.file and Path(d.location.file.name).is_relative_to(self.root)]
        if errors := [str(d) for d in ours if d.severity >= self.cindex.Diagnostic.Error]:
            raise SystemExit(f"clang can't read {unit}: {errors[0]}")
        for cursor in tree.cursor.get_children():
            if self.file_of(cursor):
                yield from self.walk(cursor, False)

    def file_of(self, cursor: Any) -> str | None:
        if cursor.location.file is None:
            return None
        path = Path(cursor.location.file.name).resolve()
        if not path.is_relative_to(self.root):
            return None
        name = str(path.relative_to(self.root))
        return name if self.wanted(name) else None

    def walk(self, cursor: Any, constant: bool) -> Iterator[Point]:
        kinds = self.cindex.CursorKind
        if cursor.kind in (kinds.ENUM_DECL, kinds.STATIC_ASSERT, kinds.TEMPLATE_NON_TYPE_PARAMETER):
            return
        spelled = self.first_words(cursor)
        constant = constant or b"constexpr" in spelled
        yield from self.of(cursor, constant)
        for number, child in enumerate(cursor.get_children()):
            inside = constant
            if cursor.kind == kinds.PARM_DECL or (cursor.kind == kinds.CASE_STMT and number == 0):
                inside = True  # the extents of an array, a default that a constant expression may use; a label
            if cursor.kind == kinds.VAR_DECL and cursor.type.kind.name.endswith("ARRAY") and self.in_brackets(child):
                inside = True  # the extents
            yield from self.walk(child, inside)
            if cursor.kind == kinds.COMPOUND_STMT:
                yield from self.deleted(child, constant)

    def in_brackets(self, cursor: Any) -> bool:
        file = self.file_of(cursor)
        return file is not None and self.content(file)[cursor.extent.end.offset :].lstrip().startswith(b"]")

    def first_words(self, cursor: Any) -> bytes:
        kinds = self.cindex.CursorKind
        declares = (kinds.VAR_DECL, kinds.FIELD_DECL, kinds.FUNCTION_DECL, kinds.CXX_METHOD, kinds.FUNCTION_TEMPLATE)
        if cursor.kind not in (*declares, kinds.IF_STMT, kinds.CONSTRUCTOR):
            return b""
        file = self.file_of(cursor)
        return self.content(file)[cursor.extent.start.offset :][:60].split(b"(")[0].split(b"=")[0] if file else b""

    def point(self, cursor: Any, kind: str, start: int, end: int, text: str, constant: bool) -> Iterator[Point]:
        file = self.file_of(cursor)
        outer = cursor.extent.start.offset, cursor.extent.end.offset
        if file and outer[0] <= start < end <= outer[1]:
            before = self.content(file)[start:end].decode()
            yield Point(file, cursor.location.line, kind, start, end, *outer, text, before, constant)

    def of(self, cursor: Any, constant: bool) -> Iterator[Point]:
        kinds, file = self.cindex.CursorKind, self.file_of(cursor)
        if file is None:
            return
        text, begin = self.content(file), cursor.extent.start.offset
        if cursor.kind in (kinds.BINARY_OPERATOR, kinds.COMPOUND_ASSIGNMENT_OPERATOR):
            left, right = list(cursor.get_children())[:2]
            start, end = left.extent.end.offset, right.extent.start.offset
            operator = text[start:end].strip().decode()
            if operator not in BINARY:
                return
            start += text[start:end].index(operator.encode())
            kind = "comparison" if operator in ("<", "<=", ">", ">=", "==", "!=") else "operator"
            for other in [BINARY[operator], *([NEGATED[operator]] if operator in NEGATED else [])]:
                yield from self.point(cursor, kind, start, start + len(operator), other, constant)
        elif cursor.kind == kinds.UNARY_OPERATOR:
            for operator, other in UNARY.items():
                if text[begin:].startswith(operator.encode()) and not (
                    operator == "-" and text[begin : begin + 2] == b"--"
                ):
                    yield from self.point(cursor, "operator", begin, begin + len(operator), other, constant)
        elif cursor.kind in (kinds.INTEGER_LITERAL, kinds.FLOATING_LITERAL):
            end = cursor.extent.end.offset
            for other in replaced_number(text[begin:end].decode()):
                yield from self.point(cursor, "constant", begin, end, other, constant)
        elif cursor.kind == kinds.CXX_BOOL_LITERAL_EXPR:
            other = {b"true": "false", b"false": "true"}.get(text[begin : cursor.extent.end.offset])
            if other:
                yield from self.point(cursor, "constant", begin, cursor.extent.end.offset, other, constant)

    def deleted(self, cursor: Any, constant: bool) -> Iterator[Point]:
        """An expression statement, without its semicolon. `return` and declarations stay."""
        kinds, file = self.cindex.CursorKind, self.file_of(cursor)
        if file is None or not cursor.kind.is_expression():
            return
        text, start, end = self.content(file), cursor.extent.start.offset, cursor.extent.end.offset
        if text[end : end + 1] == b";" and cursor.kind != kinds.LAMBDA_EXPR and end > start:
            yield from self.point(cursor, "statement", start, end, "", constant)


def replaced_number(text: str) -> list[str]:
    """A constant one off, for an integer up and down."""
    if whole := NUMBER.match(text):
        digits, suffix = whole.groups()
        value = int(digits.replace("'", ""), 0)
        return [f"{value + 1}{suffix}", *([f"{value - 1}{suffix}"] if value else [])]
    return [f"({text} * 2)" if float_of(text) else f"(1 + {text})"] if REAL.match(text) else []


def float_of(text: str) -> float:
    text = text.rstrip("fFlL") if not text.lower().startswith("0x") or "p" in text.lower() else text
    return float.fromhex(text) if text.lower().startswith("0x") else float(text)
