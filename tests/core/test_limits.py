"""Threads that can't be made: the caller works alone, or with those there are, with the same bits."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import bnfast
import pytest

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(sys.platform != "linux", reason="sets Linux's limits"),
    pytest.mark.skipif(
        bnfast.build_info()["threading"] != "own threads", reason="libgomp ends the process when it can't make a thread"
    ),
]

BEFORE = """
import os, resource, threading, time
import numpy as np
import bnfast
from bnfast import _core
_core._set_serial_bytes(0)
_core._set_full_team(True)
rng = np.random.default_rng(0)
x, dy = rng.standard_normal((2, 500, 40)).astype("float32")
groups = rng.standard_normal((10, 8, 16)).astype("float32")

def everything():
    result = bnfast.batch_norm_train(x)
    arrays = [*result, *bnfast.batch_norm_grad(dy, x, result.mean, result.invstd)[:3]]
    arrays += [bnfast.batch_norm_infer(x, result.mean, result.variance), *bnfast.group_norm(groups, 4)]
    return [array.tobytes() for array in arrays], _core._last_run()[1]

def thread_fails():
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        return True
    return False

bnfast.set_num_threads(1)
expected, alone = everything()
assert alone == 1
"""


def run(code: str) -> str:
    words = [sys.executable, "-c", BEFORE + textwrap.dedent(code)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stderr == ""
    return done.stdout


def test_no_process_may_be_added():
    """RLIMIT_NPROC, which root is exempt from: the child becomes nobody. A team that exists goes on working."""
    code = """
        bnfast.set_num_threads({before})
        everything()
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        if os.geteuid() == 0:
            try:
                os.setuid(65534)
            except OSError as error:
                print("this root can't become another user:", error)
                raise SystemExit(77)
        assert thread_fails()
        bnfast.set_num_threads(8)
        for _ in range(3):
            bits, team = everything()
            assert bits == expected
            assert team == {before}, team
            time.sleep(0.12)  # the next call tries again
        print("right")
    """
    assert run(code.format(before=1)) == "right\n"
    assert run(code.format(before=3)) == "right\n"


def test_no_room_for_a_stack_and_later_there_is():
    code = """
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 20), hard))
        assert thread_fails()
        bnfast.set_num_threads(4)
        for _ in range(3):
            bits, team = everything()
            assert bits == expected
            assert team == 1, team
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        time.sleep(0.15)
        assert everything() == (expected, 4)
        print("right")
    """
    assert run(code) == "right\n"


def test_some_threads_and_not_all():
    code = """
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        stack = min(s for s in (resource.getrlimit(resource.RLIMIT_STACK)[0], 2**40) if s > 0)
        if stack > 1 << 28:
            print("the stack's limit is", stack)
            raise SystemExit(77)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + 5 * stack // 2 + (2 << 20), hard))
        bnfast.set_num_threads(64)
        bits, team = everything()
        assert bits == expected
        assert 1 < team < 64, team
        print("right")
    """
    assert run(code) == "right\n"


def test_workers_take_no_signal_of_the_process():
    """Python's handlers run in the main thread; a worker that took the signal would only wake and pass it on."""
    code = """
        import signal
        bnfast.set_num_threads(3)
        assert everything() == (expected, 3)
        masks = {}
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/status") as file:
                status = dict(line.split(":\\t", 1) for line in file if ":\\t" in line)
            masks.setdefault(status["Name"].strip(), []).append(int(status["SigBlk"], 16))
        assert len(masks["bnfast"]) == 2, masks
        for mask in masks["bnfast"]:
            blocked = {s for s in signal.Signals if mask >> (s - 1) & 1}
            assert {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD} <= blocked
            assert not {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGPROF} & blocked
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        print("right")
    """
    assert run(code) == "right\n"
