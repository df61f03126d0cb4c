"""Every allocation of every function fails, once and all from the k-th on: MemoryError, and the next call is right.

The C++ core's own sweep, first calls included, is csrc/tests/allocation_test.cpp; here are the bindings and the Python
functions above them. helpers/allocations.py makes the calls, in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import allocations
import fake_cuda
import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = (os.environ.get("CXX") or "c++", "g++", "clang++")

pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/tests/failing_malloc.cpp, compiled to be preloaded."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        pytest.skip("failing_malloc.cpp stands on glibc's functions")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler: {', '.join(COMPILERS)}")
    made = tmp_path_factory.mktemp("failing-malloc") / "failing_malloc.so"
    source = ROOT / "csrc" / "tests" / "failing_malloc.cpp"
    # Without the C++ library, which would otherwise be loaded, and its thread-local data laid out, at start.
    words = [compiler, "-shared", "-fPIC", "-O2", "-nodefaultlibs", "-o", str(made), str(source), "-lgcc_s", "-lc"]
    subprocess.run(words, check=True)
    return made


def run(library: Path, allocator: str, *words: str) -> list[dict[str, Any]]:
    environment = os.environ | {"LD_PRELOAD": str(library), "PYTHONMALLOC": allocator}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-X", "faulthandler", allocations.__file__, str(library), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-3000:])
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line for line in lines if "begins" not in line]


def check(found: dict[str, Any]) -> None:
    assert found["wrong"] == [], found["name"]
    assert found["MemoryError"] + found["succeeded"] == found["k"] + 1
    if not found["first"]:  # which loads what stays
        assert found["lost"][-1] < max(2, found["k"] // 4), "blocks are lost with every failure"


@pytest.mark.parametrize("name", [*allocations.core(), *allocations.public()])
def test_a_failing_allocation_is_a_memory_error_and_nothing_else(library, name):
    binding = name in allocations.core()
    once, all_later = run(library, "malloc" if binding else "pymalloc", name)
    check(once)
    check(all_later)
    if binding:
        assert all_later["MemoryError"] > 0


def test_the_functions_of_cuda(library, tmp_path_factory):
    """Their first calls, too, which load kernels: files that pass for fatbins, and the driver of the tests."""
    folder = tmp_path_factory.getbasetemp().parent / "bnfast_fake_cuda"
    driver, images = fake_cuda.library(folder), tmp_path_factory.mktemp("images")
    for dtype in ("float32", "float64"):
        (images / f"bnfast_cuda_{dtype}.fatbin").write_bytes(b"an image")
    found = run(library, "malloc", "cuda", str(driver), str(images))
    for one in found:
        check(one)
        assert one["MemoryError"] > 0, one["name"]
    assert sum(one["first"] for one in found) == 12
    assert len(found) == 40
