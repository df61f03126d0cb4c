"""glibc's malloc, told to keep what is freed ("warm"), and back.

By default malloc maps blocks above 32 MiB afresh each time, and smaller ones until one of their size was freed once
(mallopt(3): the thresholds are dynamic). A process may switch both off, as a peer's careful user would. Switching at
all ends the dynamic adjustment, so the default state is stood for by where that arrives in a process that frees blocks
of many sizes: mmap from 32 MiB, trim above 64 MiB.
Where the C library isn't glibc, `available` is False and the rest does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MIB = 1 << 20


def _libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # TypeError: Windows
        return None


_LIBC = _libc()


def available() -> bool:
    """Whether warm() can do anything here."""
    return _LIBC is not None


def settle() -> None:
    """The state a long-lived process has by default. Called once before anything is timed."""
    if _LIBC is not None:
        _LIBC.mallopt(M_MMAP_MAX, 65536)
        _LIBC.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        _LIBC.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Inside, no block is mapped by itself and none goes back to the system; after it, all that is free goes back."""
    if _LIBC is None:
        yield
        return
    _LIBC.mallopt(M_MMAP_MAX, 0)
    _LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # an int, read as size_t: 2 GiB, above any tensor here
    try:
        yield
    finally:
        settle()
        _LIBC.malloc_trim(ctypes.c_size_t(0))  # or the other peers would find this memory, warm as it is
