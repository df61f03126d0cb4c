"""Tests marked `serial` run while no other test does; all others run side by side, in as many processes as there are.

What is about threads, fork, time or the memory of a process would measure its neighbours. So every test takes a lock:
`serial` ones alone, the others together. The locks are files that the workers of pytest-xdist share; a process that
dies lets go of them. One call of pytest thus runs every test exactly once, whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """The caller's turn, alone or with others. Whoever waits holds the gate, so that nobody enters the room before."""
    with open(folder / "gate", "w") as gate, open(folder / "room", "w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)
