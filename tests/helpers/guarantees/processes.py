"""Forks, signals and exits beside running calls. A hanging child is killed and counted.

`python processes.py SCRIPT` runs one of the scripts below.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import bnfast
import numpy as np
from bnfast import _core

LIMIT = 20  # seconds


def work(x: np.ndarray) -> bytes:
    return bytes(bnfast.batch_norm_train(x).y.tobytes())


def finished(pid: int) -> bool:
    """Whether the child ends with status 0 in time; it is killed otherwise."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def fork_and_work(x: np.ndarray, wanted: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking a process with threads
        pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work(x) == wanted else 1)
        finally:
            os._exit(2)
    return finished(pid)


def forks(after: int, during: int) -> dict[str, Any]:
    """The child computes the same bits: forked between calls, and while another thread computes."""
    x = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)
    _core._set_serial_bytes(0)
    bnfast.set_num_threads(4)
    try:
        wanted = work(x)
        failed = sum(not fork_and_work(x, wanted) for _ in range(after))
        stop = threading.Event()

        def compute() -> None:
            while not stop.is_set():
                work(x)

        thread = threading.Thread(target=compute)
        thread.start()
        failed_during = sum(not fork_and_work(x, wanted) for _ in range(during))
        stop.set()
        thread.join()
        return {"after": after, "failed": failed, "during": during, "failed_during": failed_during}
    finally:
        _core._set_serial_bytes(None)
        bnfast.set_num_threads(None)


def daemons() -> None:
    """The script of `exits`: the interpreter ends while daemon threads compute."""
    x = np.random.default_rng(0).standard_normal((4000, 32)).astype(np.float32)

    def compute() -> None:
        while True:
            work(x)

    for _ in range(3):
        threading.Thread(target=compute, daemon=True).start()
    time.sleep(0.02)


def exits(count: int) -> dict[str, Any]:
    failed = 0
    for _ in range(count):
        command = [sys.executable, str(Path(__file__)), "daemons"]
        try:
            failed += subprocess.run(command, timeout=LIMIT, capture_output=True).returncode != 0
        except subprocess.TimeoutExpired:
            failed += 1
    return {"exits": count, "failed": failed}


def interrupts(count: int, megabytes: int) -> dict[str, Any]:
    """The longest time from Ctrl-C in a call to KeyboardInterrupt, beside the time of the call itself."""
    x = np.ones((megabytes << 20 >> 8, 64), np.float32)
    out = np.empty_like(x)
    bnfast.batch_norm_train(x, out=out)
    begin = time.perf_counter()
    bnfast.batch_norm_train(x, out=out)
    call, waits, sent = time.perf_counter() - begin, [], [0.0]

    def send(delay: float) -> None:
        time.sleep(delay)
        sent[0] = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for i in range(count):
            sender = threading.Thread(target=send, args=(call * i / count,))
            try:
                sender.start()
                while True:
                    bnfast.batch_norm_train(x, out=out)
            except KeyboardInterrupt:
                waits.append(time.perf_counter() - sent[0])
            sender.join()
    finally:
        signal.signal(signal.SIGINT, before)
    return {"interrupts": count, "megabytes": megabytes, "longest_ms": 1e3 * max(waits), "call_ms": 1e3 * call}


if __name__ == "__main__":
    {"daemons": daemons}[sys.argv[1]]()
