"""Strided, misaligned, byte-swapped, read-only and overlapping views between guard pages: right or a clear error."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import bnfast
import numpy as np

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class Fenced:
    """Memory whose last byte lies before an inaccessible page, or whose first byte lies after one."""

    def __init__(self, size: int, at_end: bool) -> None:
        pages = -(-size // PAGE)
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        self._view = (ctypes.c_char * ((pages + 2) * PAGE)).from_buffer(self._map)
        self.address = ctypes.addressof(self._view)
        for page in (0, pages + 1):
            if LIBC.mprotect(ctypes.c_void_p(self.address + page * PAGE), PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = PAGE + (pages * PAGE - size if at_end else 0)
        self.bytes = np.frombuffer(self._view, np.uint8, size, start)

    def close(self) -> None:
        LIBC.mprotect(ctypes.c_void_p(self.address), len(self._map), mmap.PROT_READ | mmap.PROT_WRITE)


def view_of(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Fenced, str]:
    """The values in fenced memory, in a layout drawn at random."""
    steps = [int(rng.choice([1, 1, 2, 3, -1, -2])) for _ in values.shape]
    order = rng.permutation(values.ndim)
    dtype = values.dtype.newbyteorder() if rng.integers(6) == 0 else values.dtype
    extents = [(n - 1) * abs(step) + 1 for n, step in zip(values.shape, steps, strict=True)]
    room = Fenced(int(np.prod(extents)) * dtype.itemsize, bool(rng.integers(2)))
    base = np.ndarray([extents[i] for i in order], dtype, room.bytes).transpose(np.argsort(order))
    view = base[tuple(slice(None, None, step) for step in steps)]
    view[...] = values
    if rng.integers(4) == 0:
        view.flags.writeable = False
    return view, room, f"{values.shape} steps {steps} order {order.tolist()} {dtype.str}"


def measure(count: int) -> dict[str, Any]:
    rng, failures = np.random.default_rng(11), []
    for _ in range(count):
        shape = tuple(int(n) for n in rng.integers(1, 40, rng.integers(1, 5)))
        while np.prod(shape) > 200_000:
            shape = shape[:-1]
        dtype = ("float32", "float64", "float16")[rng.integers(3)]
        axis = int(rng.integers(len(shape)))
        values, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
        (x, room, what), (given, other, _) = view_of(values, rng), view_of(dy, rng)
        try:
            wanted = bnfast.batch_norm_train(values, axis=axis)
            found = bnfast.batch_norm_train(x, axis=axis)
            grads = [bnfast.batch_norm_grad(d, v, wanted.mean, wanted.invstd, axis=axis).dx
                     for d, v in ((dy, values), (given, x))]  # fmt: skip
            if not (np.array_equal(found.y, wanted.y) and np.array_equal(*grads) and np.array_equal(x, values)):
                failures.append(f"wrong: {what}")
            shifted = x.reshape(-1)[1:] if x.flags.c_contiguous else None
            if shifted is not None and x.ndim == 1 and x.size > 2 and x.flags.writeable:
                try:
                    bnfast.batch_norm_train(x[:-1], out=shifted, axis=0)
                    failures.append(f"overlap accepted: {what}")
                except ValueError:
                    pass
        except Exception as error:
            swapped = not (x.dtype.isnative and given.dtype.isnative)  # refused: a copy would cost more than the call
            if not (swapped and isinstance(error, TypeError) and "byte order" in str(error)):
                failures.append(f"{type(error).__name__}: {error}: {what}")
        room.close()
        other.close()
    return {"views": count, "failures": failures[:20]}
