"""The graph of this project's imports, read from the sources with ast; nothing is imported.

Imports inside functions and under TYPE_CHECKING count. Implicit ones don't: importing `bnfast.functional.moments` also
runs `bnfast/__init__.py`, but no file says so. A room is a package, or a module directly in `bnfast`; `__main__` is
part of `cli`. The floor of a room is the length of the longest import path below it; the compiled `_core` is floor 0.

Run as a script (`python tests/helpers/imports.py`), it prints the rooms floor by floor, and the circles.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "python"
# A package directly inside these is a room. Any other (benchmark.peers) belongs to the package around it.
OPENED = ("bnfast", "bnfast.keras", "bnfast.tensorflow")
Graph = Mapping[str, frozenset[str]]


def name_of(path: Path, sources: Path = SOURCES) -> str:
    """The dotted name of the module in `path`; a package has the name of its folder."""
    parts = path.relative_to(sources).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(sources: Path = SOURCES) -> dict[str, Path]:
    """Every module below `sources`, by name. A compiled module (`_core`) is represented by its stub."""
    stubs = {name_of(path, sources): path for path in sorted(sources.rglob("*.pyi"))}
    return stubs | {name_of(path, sources): path for path in sorted(sources.rglob("*.py"))}


def imported(path: Path, sources: Path = SOURCES) -> Iterator[str]:
    """The absolute names that a file imports. `from a import b` gives a.b if that is one of our modules, else a."""
    package = name_of(path, sources).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in modules(sources) else base


def outside(path: Path) -> set[str]:
    """The third-party top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)} - {"bnfast"}


@cache
def module_graph(sources: Path = SOURCES) -> Graph:
    """Each module and the modules that it imports."""
    known = modules(sources)
    return {name: frozenset(known.keys() & imported(path, sources)) - {name} for name, path in known.items()}


def room_of(module: str) -> str:
    """The room that a module is in: the innermost package that is one, or a top-level module itself."""
    if module == "bnfast.__main__":
        return "bnfast.cli"
    parts = module.split(".")
    room = parts[0]
    for part in parts[1:]:
        inner = f"{room}.{part}"
        if room not in OPENED or (room != "bnfast" and modules()[inner].stem != "__init__"):
            break
        room = inner
    return room


@cache
def room_graph() -> Graph:
    """Each room and the rooms that its modules import."""
    found: dict[str, set[str]] = {}
    for module, targets in module_graph().items():
        found.setdefault(room_of(module), set()).update(map(room_of, targets))
    return {room: frozenset(targets - {room}) for room, targets in found.items()}


def circles(graph: Graph) -> list[list[str]]:
    """The sets of nodes that reach each other (strongly connected components of more than one node)."""
    reached = {node: _below(graph, node) for node in graph}
    together = {frozenset(n for n in reached[node] if node in reached[n]) for node in graph if node in reached[node]}
    return sorted(sorted(nodes) for nodes in together)


def floors(graph: Graph) -> dict[str, int]:
    """The floor of every node: above all that it imports. The graph must have no circle."""

    @cache
    def floor(node: str) -> int:
        return 1 + max(map(floor, graph[node]), default=-1)

    return {node: floor(node) for node in graph}


def _below(graph: Graph, start: str) -> set[str]:
    """What `start` reaches. `start` itself is in it only where a circle leads back."""
    seen: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def main() -> None:
    for what, graph in (("modules", module_graph()), ("rooms", room_graph())):
        print(f"{len(graph)} {what}, {sum(map(len, graph.values()))} imports between them")
        for circle in circles(graph):
            print("  circle:", *circle)
            for node in circle:
                print(f"    {node} ->", *sorted(graph[node] & set(circle)))
    rooms = room_graph()
    if not circles(rooms):
        for room, floor in sorted(floors(rooms).items(), key=lambda pair: (pair[1], pair[0])):
            print(f"floor {floor}: {room} ->", *sorted(rooms[room]))


if __name__ == "__main__":
    main()
