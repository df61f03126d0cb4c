"""Mutates the scalar path and asks the C++ tests whether they notice: `just mutants`, some 45 minutes of one core.

The mutants are a sample by a fixed seed of all that points.py finds in csrc/cpu, as the baseline instruction set
compiles it. They are built at -O1 with the baseline kernels alone, and each is run by the tests of CTest, likeliest
first, until one fails. With tests/helpers on the path:

    python -m mutants                 120 mutants; writes docs/benchmarks/mutants.json and docs/guarantees.md
    python -m mutants --count 10      fewer, prints them and writes nothing
    python -m mutants --minutes 9     what fits into 9 minutes; the next run goes on from there
    python -m mutants --only 17,23    these of them anew, written to the others' results
    python -m mutants --explain       reads explained.json again, and runs nothing

A run that is interrupted goes on where it stopped, as long as the sources are the same. A survivor needs a reason in
explained.json, beside this file. Exit status 1 if fewer than 90 % are killed, or one has no reason.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import schemata
from .points import Point, Reader

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "docs" / "benchmarks" / "mutants.json"
REASONS = Path(__file__).with_name("explained.json")
WORK = ROOT / "build" / "mutants"
SEED, COUNT, SPARE = 20, 120, 20
UNITS = ["csrc/cpu/*.cpp", "csrc/cpu/dispatch/isa.cpp", "csrc/cpu/kernels/baseline.cpp"]
PROGRAMS = ["bnfast_tests", "bnfast_allocation_tests", "bnfast_refusal_tests"]
# Tests by the file that is mutated: what most likely notices. All others follow, the quickest first.
LIKELY = {
    "plan": ["plan", "golden"],
    "memory": ["memory", "allocation"],
    "cgroup": ["cgroup"],
    "group_norm": ["group_norm"],
    "row_norm": ["group_norm"],
    "spans": ["spans", "group_norm"],
    "parallel": ["parallel", "refusals"],
    "affinity": ["refusals"],
    "thread_state": ["refusals"],
    "machine": ["machine", "machine_sizes_1", "machine_sizes_1e9"],
    "activation": ["activation", "golden"],
    "math": ["activation"],
    "overflow": ["overflow"],
    "stats": ["moments", "golden"],
    "moments": ["moments"],
    "backward": ["backward", "golden"],
    "simd": ["half", "golden"],
    "isa": ["isa", "isa_baseline"],
}


def points() -> list[Point]:
    """All mutants, shuffled by the seed. Where two units see the same header, its mutants are one."""
    reader = Reader(ROOT, lambda name: name.startswith("csrc/cpu/") and not name.endswith("kernel_table.h"))
    found = {}
    for pattern in UNITS:
        for unit in sorted(ROOT.glob(pattern)):
            for point in reader.points(unit):
                key = (point.file, point.start, point.end, point.text)
                if key not in found or point.constant:
                    found[key] = point
    ordered = sorted(found.values(), key=lambda p: (p.file, p.start, p.end, p.text))
    random.Random(SEED).shuffle(ordered)
    return ordered


class Build:
    """A copy of the sources with the mutants in it."""

    def __init__(self, chosen: list[Point]) -> None:
        self.chosen = chosen
        self.source, self.binary = WORK / "source", WORK / "binary"
        self.alone = {number for number, point in enumerate(chosen, 1) if point.constant}
        self.contents = {file: (ROOT / file).read_bytes() for file in {point.file for point in chosen}}
        self.has_all = False  # the programs have every mutant that can be chosen at run time

    def configure(self) -> None:
        """Copies what is new, so that an earlier build is of use."""
        header, switch = WORK / "mutant.h", b'#include "mutant.cpp"\n'
        for path in [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]:
            name = str(path.relative_to(ROOT))
            if name not in self.contents:
                replace(self.source / name, path.read_bytes() + (switch if name == "csrc/tests/main.cpp" else b""))
        replace(header, schemata.HEADER.encode())
        replace(self.source / "csrc" / "tests" / "mutant.cpp", schemata.SOURCE.encode())
        options = ["-DBNFAST_BUILD_TESTS=ON", "-DBNFAST_KERNELS=baseline", "-DCMAKE_BUILD_TYPE=None"]
        if shutil.which("ccache"):
            options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
        flags = f"-DCMAKE_CXX_FLAGS=-O1 -w -include {header}"
        self.write()
        run(["cmake", "-S", self.source, "-B", self.binary, "-G", "Ninja", flags, *options])

    def write(self) -> None:
        for file, content in self.contents.items():
            pairs = [(n, p) for n, p in enumerate(self.chosen, 1) if p.file == file and n not in self.alone]
            replace(self.source / file, schemata.render(content, pairs))

    def compile(self) -> str | None:
        """None, or what the compiler said."""
        done = subprocess.run(
            ["ninja", "-C", self.binary, "-j1", "-k0", *PROGRAMS],
            capture_output=True,
            text=True,
        )
        return None if done.returncode == 0 else done.stdout

    def compile_all(self) -> None:
        """What doesn't compile as a choice at run time is compiled alone later."""
        self.write()
        while (said := self.compile()) is not None:
            failed = {
                number
                for number, point in enumerate(self.chosen, 1)
                if number not in self.alone and f"{point.file}:{point.line}:" in said
            }
            if not failed:
                raise SystemExit(f"the sources with mutants don't compile:\n{said[-3000:]}")
            self.alone |= failed
            self.write()
        self.has_all = True

    def compile_alone(self, number: int) -> bool:
        self.has_all = False
        self.write()
        point = self.chosen[number - 1]
        replace(self.source / point.file, schemata.alone(self.contents[point.file], point))
        return self.compile() is None


def replace(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")


class Progress:
    """What an interrupted run has found, kept beside the build, for these mutants of these sources alone."""

    def __init__(self, chosen: list[Point]) -> None:
        texts = [(ROOT / file).read_bytes() for file in sorted({point.file for point in chosen})]
        self.key = hashlib.sha256(b"".join([*texts, repr(chosen).encode()])).hexdigest()
        self.path = WORK / "progress.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data = known if known.get("key") == self.key else {"key": self.key, "minutes": 0.0, "rows": {}}
        self.begin = time.perf_counter()

    def save(self) -> None:
        now = time.perf_counter()
        self.data["minutes"] += (now - self.begin) / 60
        self.begin = now
        WORK.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data))


class Tests:
    """The tests as CTest knows them: name, command, environment and, once run, seconds."""

    def __init__(self, binary: Path) -> None:
        listed = subprocess.run(["ctest", "--show-only=json-v1"], cwd=binary, capture_output=True, text=True)
        self.commands, self.environments = {}, {}
        for test in json.loads(listed.stdout)["tests"]:
            command, name = test.get("command", ["", ""]), test["name"]
            if Path(command[0]).name not in PROGRAMS:
                continue
            values = next((p["value"] for p in test["properties"] if p["name"] == "ENVIRONMENT"), [])
            self.commands[name] = [*command, "--abort-after=1"]
            self.environments[name] = dict(value.split("=", 1) for value in values)
        self.seconds: dict[str, float] = {}

    def measure(self, progress: Progress) -> None:
        self.seconds = progress.data["seconds"] = {}
        for name in self.commands:
            begin = time.perf_counter()
            if not self.passes(name, 0, 3600):
                raise SystemExit(f"{name} fails without a mutant")
            self.seconds[name] = time.perf_counter() - begin
            progress.save()

    def passes(self, name: str, number: int, limit: float) -> bool:
        # The variable is the mutants' alone, so that a test sees the environment that CTest gives it.
        environment = {**os.environ, **self.environments[name], "BNFAST_MUTANT": str(number)}
        try:
            done = subprocess.run(self.commands[name], env=environment, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def order(self, file: str) -> list[str]:
        stem = Path(file).name.split(".")[0]
        likely = [name for key, names in LIKELY.items() if stem.startswith(key) for name in names]
        first = [name for name in dict.fromkeys(likely) if name in self.commands]
        rest = sorted(set(self.commands) - set(first), key=lambda name: self.seconds[name])
        return first + rest

    def killer(self, number: int, file: str) -> str | None:
        """The first test that fails, or None."""
        for name in self.order(file):
            if not self.passes(name, number, 10 + 5 * self.seconds[name]):
                return name
        return None


def judge(
    build: Build, tests: Tests, numbers: list[int], count: int, progress: Progress, end: float
) -> list[dict[str, Any]]:
    """One row per mutant, until `count` of them compile or the time is over; those that are compiled alone last."""
    rows: dict[str, dict[str, Any]] = progress.data["rows"]
    while time.perf_counter() < end:
        refused = sum(not row["compiled"] for row in rows.values())
        left = [number for number in numbers[: count + refused] if str(number) not in rows]
        if not left:
            break
        number = min(left, key=lambda number: (number in build.alone, number))
        point = build.chosen[number - 1]
        is_alone = number in build.alone
        if not is_alone and not build.has_all:
            build.compile_all()
        compiled = not is_alone or build.compile_alone(number)
        killer = tests.killer(0 if is_alone else number, point.file) if compiled else None
        line = build.contents[point.file].decode().splitlines()[point.line - 1].strip()
        row = {"number": number, "file": point.file, "line": point.line, "source": line, "kind": point.kind}
        rows[str(number)] = {**row, "change": point.said, "compiled": compiled, "killed_by": killer}
        progress.save()
        said = killer or ("SURVIVED" if compiled else "no program")
        print(f"{number:4} {said:24} {point.file}:{point.line}: {point.said}", flush=True)
    known = sorted((row for row in rows.values() if row["number"] in numbers), key=lambda row: row["number"])
    return [{k: v for k, v in row.items() if k != "compiled"} for row in known if row["compiled"]][:count]


def reason(row: dict[str, Any], reasons: dict[str, str]) -> str | None:
    return reasons.get(f"{row['file']}: {row['source']}: {row['change']}")


def explained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    reasons = json.loads(REASONS.read_text())
    return [{**row, **({} if row["killed_by"] else {"reason": reason(row, reasons)})} for row in rows]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    killed = sum(row["killed_by"] is not None for row in rows)
    return {"mutants": len(rows), "killed": killed, "unexplained": sum(row.get("reason", "") is None for row in rows)}


def kept(data: dict[str, Any]) -> bool:
    return data["killed"] >= 0.9 * data["mutants"] and not data["unexplained"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then, with as many as were run")
    parser.add_argument("--only", help="numbers, comma by comma")
    parser.add_argument("--explain", action="store_true", help="reads explained.json again, and runs nothing")
    options = parser.parse_args()
    begin = time.perf_counter()
    if options.explain:
        data = json.loads(DATA.read_text())
        rows = explained(data["rows"])
    else:
        chosen = points()[: options.count + SPARE * options.count // COUNT]
        build, progress = Build(chosen), Progress(chosen)
        numbers = [int(n) for n in options.only.split(",")] if options.only else list(range(1, len(chosen) + 1))
        if options.only:
            for number in numbers:
                progress.data["rows"].pop(str(number), None)
        build.configure()
        build.compile_all()
        progress.save()
        print(f"built; {len(build.alone)} of {len(chosen)} are compiled alone", flush=True)
        tests = Tests(build.binary)
        tests.measure(progress)
        print(f"all tests take {sum(tests.seconds.values()):.0f} s without a mutant", flush=True)
        end = begin + 60 * options.minutes
        rows = explained(judge(build, tests, numbers, options.count, progress, end))
        if options.only:
            others = json.loads(DATA.read_text())["rows"]
            rows = sorted({row["number"]: row for row in [*others, *rows]}.values(), key=lambda row: row["number"])
        commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        data = {"commit": commit.stdout.strip(), "date": datetime.date.today().isoformat(), "seed": SEED}
        data["planned"] = options.count
        data["minutes"] = round(progress.data["minutes"])
    data |= {**summary(rows), "rows": rows}
    print(f"{data['killed']} of {data['mutants']} killed, {data['unexplained']} survivors without a reason")
    if options.count == COUNT:
        DATA.write_text(json.dumps(data, indent=1) + "\n")
        subprocess.run([sys.executable, "-m", "guarantees", "--page"], cwd=Path(__file__).parents[1], check=True)
    return 0 if kept(data) else 1


if __name__ == "__main__":
    sys.exit(main())
