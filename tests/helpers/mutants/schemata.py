"""Many mutants in one build: each mutated expression asks at run time which mutant is on.

`a < b` becomes `((bnfast_mutant == 7) ? (a <= b) : (a < b))`, so that 120 mutants cost one compilation of the kernels,
which takes minutes. Mutants of constant expressions can't be chosen so: they are compiled alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .points import Point

HEADER = "extern int bnfast_mutant;\n"
SOURCE = """#include <stdlib.h>
extern int bnfast_mutant;
int bnfast_mutant;
// Before all constructors, some of which choose an instruction set or make a pool.
__attribute__((constructor(101))) static void choose() {
    const char* text = getenv("BNFAST_MUTANT");
    bnfast_mutant = text ? atoi(text) : 0;
}
"""


def alone(content: bytes, point: Point) -> bytes:
    return content[: point.start] + replacement(point).encode() + content[point.end :]


def replacement(point: Point) -> str:
    return point.text if point.text or point.kind != "statement" else "(void)0"


def render(content: bytes, chosen: Iterable[tuple[int, Point]]) -> bytes:
    """The file with all these mutants in it. Expressions nest and never cross."""
    ordered = sorted(chosen, key=lambda pair: (pair[1].outer_start, -pair[1].outer_end))
    return rendered(content, 0, len(content), ordered)


def rendered(content: bytes, begin: int, end: int, chosen: list[tuple[int, Point]]) -> bytes:
    parts, at = [], begin
    while chosen:
        (number, point), rest = chosen[0], chosen[1:]
        inner = [pair for pair in rest if pair[1].outer_start < point.outer_end]
        parts.append(content[at : point.outer_start])
        # Mutants of the same expression nest in the branch that isn't mutated.
        original = rendered(content, point.outer_start, point.outer_end, inner)
        parts.append(choice(content, number, point, original))
        at, chosen = point.outer_end, rest[len(inner) :]
    return b"".join([*parts, content[at:end]])


def choice(content: bytes, number: int, point: Point, original: bytes) -> bytes:
    on = f"bnfast_mutant == {number}".encode()
    if point.kind == "statement":
        return b"if (!(" + on + b")) " + original
    mutated = (
        content[point.outer_start : point.start] + replacement(point).encode() + content[point.end : point.outer_end]
    )
    return b"((" + on + b") ? (" + mutated + b") : (" + original + b"))"
