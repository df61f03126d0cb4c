"""Locks that let tests marked `serial` run alone, while all other tests run in parallel.

A test of threads, fork, time or process memory would measure the tests beside it. So every test takes a lock: exclusive
if it is marked `serial`, shared otherwise. The locks are files that the workers of pytest-xdist share; the system
releases them if a worker dies. So one call of pytest runs every test exactly once, with any number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds the lock: exclusive if `alone`, else shared. The gate makes a waiting exclusive test the next to enter."""
    with open(folder / "gate", "w") as gate, open(folder / "room", "w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)
