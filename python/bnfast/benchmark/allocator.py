"""Makes glibc's malloc keep freed memory ("warm"), and undoes that.

By default malloc takes blocks above 32 MiB from mmap on each call, and smaller ones too until a block of that size has
been freed once: its thresholds adapt (mallopt(3)). A careful user of another library may switch mmap off, so `warm`
does the same. Setting any threshold ends the adaptation for the whole process. `restore_defaults` therefore sets the
values that the adaptation reaches in a process that frees blocks of many sizes: mmap from 32 MiB, trim above 64 MiB.
If the C library is not glibc, `available` returns False and the other functions do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MIB = 1 << 20


def _load_glibc() -> Any:
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version") else None


_LIBC = _load_glibc()


def available() -> bool:
    """Whether warm() has an effect here."""
    return _LIBC is not None


def restore_defaults() -> None:
    """Give malloc the settings that a long-lived process has by default. Call it once before anything is timed."""
    if _LIBC is not None:
        _LIBC.mallopt(M_MMAP_MAX, 65536)
        _LIBC.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        _LIBC.mallopt(M_TRIM_THRESHOLD, 64 * MIB)


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """Inside the block malloc never calls mmap and returns nothing to the system; afterwards free memory goes back."""
    if _LIBC is None:
        yield
        return
    _LIBC.mallopt(M_MMAP_MAX, 0)
    _LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the largest int: 2 GiB, above any tensor here
    try:
        yield
    finally:
        restore_defaults()
        _LIBC.malloc_trim(ctypes.c_size_t(0))  # else the next peer would get this warm memory
