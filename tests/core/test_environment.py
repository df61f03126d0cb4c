"""The environment variables BNFAST_*: a bad value is one line on stderr, and what would be used without it is used."""

from __future__ import annotations

import os
import subprocess
import sys

import bnfast
import pytest

MOST = 2**40  # bytes
CODE = """
import sys, bnfast, numpy as np
bnfast.build_info()
bnfast.set_num_threads(4096)
x = np.ones((64, 256), "float32")
for shape in ((64, 256), (4, 8, 512), (16384,), (2, 8192)):
    y, mean, variance, invstd = bnfast.batch_norm_train(x.reshape(shape))
    assert not y.any() and not variance.any()
    bnfast.batch_norm_grad(x.reshape(shape), x.reshape(shape), mean, invstd)
print(*(bnfast.build_info()[f"l{level}_bytes"] for level in ("1d", 2, 3)))
"""


def run(values: dict[str, str]) -> tuple[list[int], list[str]]:
    """The three cache sizes of a new process with those variables, and its lines on stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BNFAST_")}
    words = [sys.executable, "-c", CODE]
    done = subprocess.run(words, env=environment | values, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()], done.stderr.splitlines()


@pytest.mark.parametrize(
    "value", ["1e9", "", " ", "-1", "0", str(2**63 - 1), "0x10", "9" * 19, str(MOST + 1), "abc", "+5", "12 ", "1.5"]
)
def test_a_bad_cache_size_is_one_line_and_the_default_is_used(value):
    names = ("BNFAST_L1_BYTES", "BNFAST_L2_BYTES", "BNFAST_L3_BYTES")
    sizes, lines = run(dict.fromkeys(names, value))
    without, silence = run({})
    assert sizes == without
    assert silence == []
    wanted = f"must be a whole number of bytes from 1 to {MOST}. Received: '{value}'. The detected size is used."
    assert lines == [f"bnfast: {name} {wanted}" for name in names]


def test_the_line_is_one_line_whatever_the_value_holds():
    _, lines = run({"BNFAST_L1_BYTES": "1\n2\033[31m" + "3" * 100_000})
    assert len(lines) == 1
    assert len(lines[0]) < 250
    assert "Received: '1?2?[31m3" in lines[0]


@pytest.mark.parametrize("value", [1, MOST])
def test_the_extreme_sizes_overflow_nothing(value):
    sizes, lines = run({f"BNFAST_L{level}_BYTES": str(value) for level in (1, 2, 3)})
    assert (sizes, lines) == ([value] * 3, [])
    sizes, lines = run({"BNFAST_L2_BYTES": str(value)})
    assert (sizes[1], lines) == (value, [])


def test_a_closed_stderr_does_not_matter():
    words = [sys.executable, "-c", "import bnfast, os; print(bnfast.build_info()['l2_bytes'])"]
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" 2>&-', "sh", *words],
        env={**os.environ, "BNFAST_L2_BYTES": "1e9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"{bnfast.build_info()['l2_bytes']}\n"
