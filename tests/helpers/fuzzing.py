"""Fuzzes the C++ sources with libFuzzer, 10 minutes in all: `just fuzz`. With tests/helpers on the path:

    python -m fuzzing                  writes csrc/tests/fuzz/corpus, docs/benchmarks/fuzzing.json and the page
    python -m fuzzing --minutes 0.5    less, prints it and writes nothing

The targets are in csrc/tests/fuzz. What libFuzzer keeps is minimized and stays below 100 KB in all; every build of the
C++ tests replays it. Exit status 1 for a finding, whose input is printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CORPUS, DATA = ROOT / "csrc" / "tests" / "fuzz" / "corpus", ROOT / "docs" / "benchmarks" / "fuzzing.json"
BUILD = ROOT / "build" / "fuzz"
TARGETS, MINUTES = ("views", "plan", "calls"), 10.0
MOST_INPUT, MOST_CORPUS = 256, 16_000  # bytes; the latter per target, twice as long in hexadecimal


def build() -> None:
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    subprocess.run(["cmake", "--preset", "fuzz", "-G", "Ninja", *launcher], cwd=ROOT, check=True)
    programs = [f"bnfast_fuzz_{target}" for target in TARGETS]
    subprocess.run(["cmake", "--build", BUILD, "--target", *programs], cwd=ROOT, check=True)


def unpack(target: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packed = CORPUS / f"{target}.txt"
    for number, line in enumerate(packed.read_text().split() if packed.exists() else []):
        (folder / f"{number:04}").write_bytes(bytes.fromhex(line))


def pack(folder: Path) -> str:
    """One input per line, the shortest first, as many as may be committed."""
    inputs, total = sorted((path.read_bytes() for path in folder.iterdir()), key=lambda b: (len(b), b)), 0
    lines = []
    for content in inputs:
        total += len(content)
        if content and total <= MOST_CORPUS:
            lines.append(content.hex())
    return "".join(f"{line}\n" for line in lines)


def program(target: str) -> Path:
    return BUILD / "csrc" / "tests" / "fuzz" / f"bnfast_fuzz_{target}"


def fuzz(target: str, seconds: float) -> tuple[dict[str, Any], list[str]]:
    """The figures of one target, and its findings: inputs in hexadecimal."""
    inputs, findings = BUILD / "inputs" / target, BUILD / "findings" / target
    unpack(target, inputs)
    shutil.rmtree(findings, ignore_errors=True)
    findings.mkdir(parents=True)
    limits = [f"-max_len={MOST_INPUT}", "-timeout=20", "-rss_limit_mb=2048", f"-artifact_prefix={findings}/"]
    command = [program(target), f"-max_total_time={max(1, round(seconds))}", "-print_final_stats=1", *limits, inputs]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = [path.read_bytes().hex() for path in findings.iterdir()]
    if done.returncode or found:
        print(done.stderr[-6000:])
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    figures = {"inputs": int(executed[1]) if executed else 0, "edges": int(edges[-1]) if edges else 0}
    return {**figures, "findings": max(len(found), int(done.returncode != 0))}, found


def minimized(target: str) -> str:
    inputs, small = BUILD / "inputs" / target, BUILD / "minimized" / target
    shutil.rmtree(small, ignore_errors=True)
    small.mkdir(parents=True)
    command = [program(target), "-set_cover_merge=1", f"-max_len={MOST_INPUT}", small, inputs]
    subprocess.run(command, check=True, capture_output=True)
    return pack(small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all targets together")
    options = parser.parse_args()
    build()
    rows, failed = {}, False
    for target in TARGETS:
        rows[target], found = fuzz(target, options.minutes * 60 / len(TARGETS))
        failed = failed or rows[target]["findings"] > 0
        print(target, rows[target], *found, flush=True)
    if options.minutes >= MINUTES and not failed:
        CORPUS.mkdir(exist_ok=True)
        for target in TARGETS:
            (CORPUS / f"{target}.txt").write_text(minimized(target))
        commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        about = {"commit": commit.stdout.strip(), "date": datetime.date.today().isoformat(), "minutes": options.minutes}
        DATA.write_text(json.dumps({**about, "targets": rows}, indent=1) + "\n")
        subprocess.run([sys.executable, "-m", "guarantees", "--page"], cwd=Path(__file__).parent, check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
