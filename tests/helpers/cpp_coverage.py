"""The coverage of C++ by its tests, from gcovr's JSON.

A line counts once, for however many functions and types it is compiled. So do the branches of a line of the kernels,
of which a template has up to 100 instances with branches of their own: a line's conditions are covered where one
instance takes them and one doesn't. Everywhere else every branch counts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def ways(file: str, lines: list[dict[str, Any]]) -> list[bool]:
    """Whether each way out of a line's conditions was taken."""
    branches = [branch for line in lines for branch in line.get("branches", []) if not branch.get("gcovr/excluded")]
    if "/kernels/" not in file:
        found: dict[tuple[Any, ...], bool] = defaultdict(bool)
        for branch in branches:
            found[branch.get("branchno"), branch.get("source_block_id")] |= branch["count"] > 0
        return list(found.values())
    blocks: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for branch in branches:
        blocks[branch.get("source_block_id")].append(branch)
    merged: dict[int, bool] = defaultdict(bool)
    for block in blocks.values():
        for position, branch in enumerate(sorted(block, key=lambda b: int(b["branchno"]))):
            merged[position % 2] |= branch["count"] > 0
    return list(merged.values())


def measure(report: dict[str, Any]) -> dict[str, Any]:
    counts = {"lines": 0, "lines_run": 0, "branches": 0, "branches_taken": 0}
    missing: list[str] = []
    for file in report["files"]:
        by_line: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for line in file["lines"]:
            if not line.get("gcovr/excluded") and not line.get("gcovr/noncode"):
                by_line[line["line_number"]].append(line)
        for number, lines in sorted(by_line.items()):
            run = any(line["count"] > 0 for line in lines)
            taken = ways(file["file"], lines)
            counts["lines"] += 1
            counts["lines_run"] += run
            counts["branches"] += len(taken)
            counts["branches_taken"] += sum(taken)
            if not run:
                missing.append(f"{file['file']}:{number}: never run")
            elif not all(taken):
                missing.append(f"{file['file']}:{number}: {sum(taken)} of {len(taken)} branches")
    return {**counts, "missing": missing}
