"""Whether the tests reach what they shall: `python -m coverage_figures CPP.json PYTHON.json`, after both were measured.

CPP.json comes from gcovr, PYTHON.json from `coverage json`. Prints the figures, and what is missing where one is below
its goal, with exit status 1. Writes docs/benchmarks/coverage.json and the page of guarantees.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cpp_coverage

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs" / "benchmarks" / "coverage.json"
# Percent. Of C++: a line that no test reaches says so beside its reason (GCOVR_EXCL), and those of 2026-11 may rise.
GOALS = {"cpp_lines": 99.8, "cpp_branches": 95.0, "python_lines": 98.0, "python_branches": 98.0}
NAMES = {"cpp": "C++ by its tests", "python": "Python by all tests, some cases of each"}


def of_cpp(report: dict[str, Any]) -> tuple[dict[str, list[int]], list[str]]:
    found = cpp_coverage.measure(report)
    lines, branches = (found["lines_run"], found["lines"]), (found["branches_taken"], found["branches"])
    return {"cpp_lines": [*lines], "cpp_branches": [*branches]}, found["missing"]


def of_python(report: dict[str, Any]) -> tuple[dict[str, list[int]], list[str]]:
    totals, missing = report["totals"], []
    for file, found in report["files"].items():
        missing += [f"{file}:{line}: never run" for line in found["missing_lines"]]
        missing += [f"{file}:{line}: never to {to}" for line, to in found["missing_branches"] if line > 0]
    counts = {"python_lines": [totals["covered_lines"], totals["num_statements"]]}
    return {**counts, "python_branches": [totals["covered_branches"], totals["num_branches"]]}, missing


def percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 100.0


def kept(counts: dict[str, list[int]]) -> bool:
    return all(percent(*counts[name]) >= goal for name, goal in GOALS.items() if name in counts)


def said(counts: dict[str, list[int]]) -> str:
    parts = []
    for language, name in NAMES.items():
        lines, branches = (counts[f"{language}_{kind}"] for kind in ("lines", "branches"))
        parts.append(
            f"{name}: {percent(*lines):.1f} % of {lines[1]} lines, {percent(*branches):.1f} % of {branches[1]} branches"
        )
    return "; ".join(parts)


def main() -> int:
    cpp, python = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    counts: dict[str, list[int]] = {}
    for found, missing in (of_cpp(cpp), of_python(python)):
        counts |= found
        if not kept(found):
            print("\n".join(missing))
    print(said(counts))
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {"commit": commit.stdout.strip(), "date": datetime.date.today().isoformat()}
    DATA.write_text(json.dumps({**about, "goals": GOALS, "counts": counts}, indent=1) + "\n")
    subprocess.run([sys.executable, "-m", "guarantees", "--page"], cwd=Path(__file__).parent, check=True)
    return 0 if kept(counts) else 1


if __name__ == "__main__":
    sys.exit(main())
