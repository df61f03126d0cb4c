"""What a subcommand reports when it cannot do what was asked: one line on stderr, and exit status 2."""

from __future__ import annotations

import argparse
import importlib.util
import os

MOST_THREADS = 4096  # as in bnfast.set_num_threads


class UserError(Exception):
    """A request that cannot be met. The message is one line for the person at the terminal."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


REPORTED = (UserError, OSError, MemoryError)  # what `main` reports as one line


def require(*modules: str, extra: str) -> None:
    """Raise UserError unless all `modules` are installed. `extra` is the extra of bnfast that installs them."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}, not installed here: pip install "bnfast[{extra}]"')


def require_memory(what: str, least_bytes: int) -> None:
    """Raise UserError if this machine has less memory. Without the check Linux would grant more than it has, and end
    the process later."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return
    if least_bytes > memory > 0:
        wanted, present = (f"{-(-count // 2**30):,} GiB" for count in (least_bytes, memory))
        raise UserError(f"{what} needs at least {wanted} of memory. This machine has {present}")


MOST_BUSY = 0.25  # of the processors. At a load of 9 on two, single ratios of one comparison went from 0.4 to 2.1.


def require_idle(busy: float | None, processors: int) -> None:
    """Raise UserError if other programs run: the figures would lie."""
    if busy is not None and busy > MOST_BUSY * processors:
        raise UserError(
            f"other programs keep {busy:.1f} of {processors} processors busy, so the figures would lie. Wait for them, "
            "or pass --quick or --rounds N to measure all the same"
        )


def positive_int(text: str) -> int:
    """An argparse type: an integer in [1, 2**31)."""
    return _integer(text, least=1)


def non_negative_int(text: str) -> int:
    """An argparse type: an integer in [0, 2**31)."""
    return _integer(text, least=0)


def thread_count(text: str) -> int:
    """An argparse type: a number that `bnfast.set_num_threads` takes."""
    return _integer(text, least=1, most=MOST_THREADS)


def _integer(text: str, least: int, most: int = 2**31 - 1) -> int:
    try:
        value = int(text)
    except ValueError:  # not a number, or one of more than 4300 digits
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}. Received: {text}")
    if value > most:
        raise argparse.ArgumentTypeError(f"must be an integer <= {most}. Received: {text}")
    return value
