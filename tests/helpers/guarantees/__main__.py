"""Measures the promises of docs/guarantees.md and writes the page: `just guarantees`, within an hour on 2 cores.

With tests/helpers on the path:

    python -m guarantees              measures everything, writes guarantees.json and the page
    python -m guarantees --scale 0.1  a tenth of it, prints it and writes nothing
    python -m guarantees interrupts   measures this row anew, and keeps the others' figures
    python -m guarantees --page       writes the page anew from guarantees.json

Exit status 1 if a promise is broken.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage_figures

from . import accuracy, calls, hostile, processes, same_bits, views

ROOT = Path(__file__).resolve().parents[3]
PAGE, DATA = ROOT / "docs" / "guarantees.md", ROOT / "docs" / "benchmarks" / "guarantees.json"

Figures = dict[str, Any]


class Row:
    """A promise: how it is measured at a scale, whether the figures keep it, and how the page says them."""

    def __init__(
        self, promise: str, measure: Callable[[float], Figures], kept: Callable[[Figures], bool], text: str
    ) -> None:
        self.promise, self.measure, self.kept, self.text = promise, measure, kept, text


def count(scale: float, whole: int) -> int:
    return max(1, round(scale * whole))


ROWS = {
    "same_bits": Row(
        "The same bits on every instruction set, with 1 to 8 threads, at any alignment, in place or not, in 16 "
        "floating-point modes of the caller, and in a fresh process",
        lambda scale: same_bits.measure(count(scale, 10_000)),
        lambda f: not f["different"] and not f["processes_different"],
        "{configurations} configurations, {n_different} different; {processes} processes, {processes_different} "
        "different. One hash: `{hash}`",
    ),
    "accuracy": Row(
        "y is within 4\\*eps\\*(abs(a)\\*(abs(x) + abs(mean) + std) + abs(b)), for mean/std from 0 to 1e6",
        lambda scale: accuracy.measure(count(scale, 200_000)),
        lambda f: max(f["worst"].values()) <= 1,
        "{channels} channels; the largest error is {worst[float32]:.2f} of the bound in float32, {worst[float64]:.2f} "
        "in float64",
    ),
    "half_types": Row(
        "float16 and bfloat16 are the float32 result, correctly rounded",
        lambda scale: accuracy.half_types(),
        lambda f: not any(f["wrong"].values()),
        "{values} values (all of both); wrong: {wrong[float16]} and {wrong[bfloat16]}",
    ),
    "forks": Row(
        "A fork works: between calls, and while another thread computes",
        lambda scale: processes.forks(count(scale, 1000), count(scale, 200)),
        lambda f: not f["failed"] and not f["failed_during"],
        "{after} forks after a call, {failed} failed or hung; {during} during one, {failed_during} failed or hung",
    ),
    "exits": Row(
        "The interpreter ends while daemon threads compute",
        lambda scale: processes.exits(count(scale, 200)),
        lambda f: not f["failed"],
        "{exits} exits, {failed} failed or hung",
    ),
    "interrupts": Row(
        "Ctrl-C takes effect when the running call ends, which for 1 GB is within 200 ms on two idle cores",
        lambda scale: processes.interrupts(count(scale, 30), 1024 if scale == 1 else 64),
        lambda f: f["longest_ms"] <= max(200, 1.5 * f["call_ms"]),
        "{interrupts} interrupts of calls on {megabytes} MB, the longest wait {longest_ms:.0f} ms; the call itself "
        "takes {call_ms:.0f} ms",
    ),
    "calls": Row(
        "Valid calls compute, invalid ones raise; no argument changes, nothing crashes",
        lambda scale: calls.measure(count(scale, 3_000_000), count(scale, 1_000_000)),
        lambda f: not f["failures"],
        "{valid} valid and {invalid} invalid calls, {n_failures} failures",
    ),
    "views": Row(
        "Strided, misaligned, byte-swapped, read-only and overlapping views: right, or a clear error, and no byte "
        "outside of them is touched (guard pages)",
        lambda scale: views.measure(count(scale, 2500)),
        lambda f: not f["failures"],
        "{views} pairs of views, {n_failures} failures",
    ),
    "hostile": Row(
        "DLPack tensors and buffers that contradict themselves, nonsense as options, states and op attributes: a "
        "clear error or a right result, and nothing loaded by half",
        lambda scale: hostile.measure(count(scale, 20_000)),
        lambda f: not f["failures"],
        "{attempts} attempts of each kind ({n_kinds} kinds), {n_failures} failures",
    ),
}


def fuzzed(data: Figures) -> str:
    targets = data["targets"].items()
    inputs = ", ".join(f"{row['inputs']} on {name}" for name, row in targets)
    return f"{data['minutes']:.0f} minutes; inputs: {inputs}; {sum(row['findings'] for _, row in targets)} findings"


def mutated(data: Figures) -> str:
    survivors = data["mutants"] - data["killed"]
    planned = "" if data["mutants"] == data["planned"] else f", of {data['planned']} that are planned"
    reasons = "each with its reason" if not data["unexplained"] else f"{data['unexplained']} of them without a reason"
    return f"{data['mutants']} mutants{planned}: {data['killed']} killed, {survivors} survivors, {reasons}"


class Apart:
    """A promise whose figures another command writes: `just NAME` to docs/benchmarks/NAME.json."""

    def __init__(self, promise: str, kept: Callable[[Figures], bool], said: Callable[[Figures], str]) -> None:
        self.promise, self.kept, self.said = promise, kept, said


APART = {
    "fuzzing": Apart(
        "libFuzzer finds nothing in the views of tensors, the plans and the public functions (`just fuzz`)",
        lambda data: not any(row["findings"] for row in data["targets"].values()),
        fuzzed,
    ),
    "mutants": Apart(
        "The C++ tests notice at least 90 % of the mutants of the scalar path (`just mutants`)",
        lambda data: data["killed"] >= 0.9 * data["mutants"] and not data["unexplained"],
        mutated,
    ),
    "coverage": Apart(
        "The tests reach nearly every line and every branch (`just coverage`)",
        lambda data: coverage_figures.kept(data["counts"]),
        lambda data: coverage_figures.said(data["counts"]),
    ),
}


def apart() -> list[str]:
    lines = []
    for name, row in APART.items():
        path = DATA.with_name(f"{name}.json")
        if path.exists():
            data = json.loads(path.read_text())
            when = f"{data['date']}, [{data['commit']}](benchmarks/{name}.json)"
            lines.append(f"| {row.promise} | {row.said(data)} | {'yes' if row.kept(data) else '**no**'} | {when} |")
    head = ["## Measured apart", "", "| promise | figure | kept? | measured |", "|---|---|---|---|"]
    return [*head, *lines, ""] if lines else []


HELD_BY_CI = """## Held by every run of CI

| promise | held by |
|---|---|
| the bits of results are those that are written down, on x86-64 (three instruction sets) and on aarch64 (NEON, under qemu) | `csrc/tests/golden_test.cpp`; stages gcc, clang, machines |
| no invalid address, no undefined behaviour | stage sanitize: AddressSanitizer and UndefinedBehaviorSanitizer over the C++ tests |
| no read of what was never written, no lost memory | stage valgrind: memcheck over ten files of the C++ tests, baseline and AVX2 |
| the inputs that the fuzzers kept are handled | `csrc/tests/fuzz/corpus`, replayed by every build of the C++ tests |
| no data race | stage tsan: ThreadSanitizer |
| a failing allocation is a MemoryError | `csrc/tests/memory_test.cpp` and the tests beside it |
| the functions of Python and of the stub agree | stage types: stubtest; `tests/core/test_signatures.py` |
| hostile files and command lines are errors that name the argument | `tests/cli` |
| NaN, infinity, overflow, empty, masked, one value | [states](states.md), each cell with its test |
"""  # noqa: E501


def measured(names: list[str], scale: float) -> dict[str, Any]:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    figures = {}
    for name in names:
        row = ROWS[name]
        begin = time.perf_counter()
        figures[name] = row.measure(scale)
        figures[name] |= {"seconds": round(time.perf_counter() - begin, 1), "commit": commit}
        print(f"{'kept  ' if row.kept(figures[name]) else 'BROKEN'} {name}: {said(row, figures[name])}", flush=True)
    return figures


def said(row: Row, figures: Figures) -> str:
    lengths = {f"n_{key}": len(value) for key, value in figures.items() if isinstance(value, list)}
    return row.text.format(**figures, **lengths)


def page(data: dict[str, Any]) -> str:
    commits: dict[str, list[str]] = {}
    for name, figures in data["rows"].items():
        commits.setdefault(figures["commit"], []).append(name)
    most = max(commits, key=lambda commit: len(commits[commit]))
    others = "".join(f"; {', '.join(names)} at {commit}" for commit, names in commits.items() if commit != most)
    lines = [
        "# Guarantees",
        "",
        "What bnfast promises, and the figures of the last whole measurement. `just guarantees` measures it again and",
        "writes this page; CI measures a tenth of every row. Code: `tests/helpers/guarantees`. Errors beside those of",
        "other libraries: [accuracy](accuracy.md).",
        "",
        f"Measured at {most}{others}; last on {data['date']}: {data['machine']}, {data['minutes']} minutes.",
        "",
        "| promise | figure | kept? |",
        "|---|---|---|",
    ]
    for name, row in ROWS.items():
        figures = data["rows"][name]
        lines.append(f"| {row.promise} | {said(row, figures)} | {'yes' if row.kept(figures) else '**no**'} |")
    return "\n".join([*lines, "", *apart(), HELD_BY_CI])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, Python {platform.python_version()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.page:
        data = json.loads(DATA.read_text())
    else:
        rows = measured(options.rows or list(ROWS), options.scale)
        if options.rows and options.scale == 1:
            rows = {**json.loads(DATA.read_text())["rows"], **rows}
        data = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "minutes": round(sum(figures["seconds"] for figures in rows.values()) / 60),
            "rows": rows,
        }
        if options.scale == 1:
            DATA.write_text(json.dumps(data, indent=1) + "\n")
    if options.scale == 1 or options.page:
        PAGE.write_text(page(data))
    return 0 if all(ROWS[name].kept(figures) for name, figures in data["rows"].items()) else 1


if __name__ == "__main__":
    sys.exit(main())
