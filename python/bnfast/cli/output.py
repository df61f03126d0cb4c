"""What the command writes to the terminal: `show` to stdout, `say` to stderr.

Both write to the file descriptor at once and leave nothing in Python's buffers: what a buffer still holds at exit would
fail there, with a message of Python's and status 120. Characters that the encoding lacks are written as \\u escapes.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import Any

from bnfast.cli.errors import UserError


def show(text: str) -> None:
    """Write `text` and a line end to stdout. Raises UserError if that is impossible."""
    try:
        _write(sys.stdout, f"{text}\n")
    except (OSError, ValueError) as error:  # ValueError: Python's stream was closed
        raise UserError(f"can't write to standard output: {getattr(error, 'strerror', None) or error}") from error


def say(line: str) -> None:
    """Write a line to stderr, or nothing if that is impossible. Never raises: no work ends because of a message."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, f"{line}\n")


def show_table(table: Any) -> None:
    """Write one of rich's tables to stdout."""
    from rich.console import Console

    console = Console()
    with console.capture() as capture:
        console.print(table)
    show(capture.get().removesuffix("\n"))


def occupy_closed_descriptors() -> None:
    """Open /dev/null as descriptors 0 to 2 where they are closed. Otherwise the next file that is opened becomes
    standard error, and TensorFlow's C++ code logs into it."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def _write(stream: Any, text: str) -> None:
    if stream is None:
        raise OSError("it is closed")  # since before the process was started
    try:
        descriptor = stream.fileno()
    except OSError:  # not a file: a notebook's stream, a test's
        stream.write(text)
        stream.flush()
        return
    stream.flush()
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # a pipe that another process made non-blocking
            select.select([], [descriptor], [])
