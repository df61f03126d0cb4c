"""For tests of equal bits: raw bits, memory layouts, and settings that must not change a bit."""

import bnfast
import numpy as np
import pytest
from bnfast import _core


def bits(value) -> np.ndarray:
    """Raw bits, with all NaNs equal."""
    a = np.ascontiguousarray(value)
    return np.where(np.isnan(a), -1, a.view(f"i{a.itemsize}"))


def force_isa_and_threads(isa, threads):
    """Set both. Returns a function that asserts that the last call ran with them."""
    _core._set_isa(isa)
    _core._set_serial_bytes(0)
    _core._set_full_team(True)
    bnfast.set_num_threads(threads)

    def check():
        assert _core._last_run() == (isa, threads)

    return check


@pytest.fixture(autouse=True)
def restored_settings():
    mode = _core._fp_mode()
    yield
    _core._set_fp_mode(mode)
    _core._set_isa(None)
    _core._set_serial_bytes(None)
    _core._set_full_team(False)
    bnfast.set_num_threads(None)


def shifted(a, by_bytes):
    """A copy whose data starts `by_bytes` after a 64-byte boundary."""
    room = np.zeros(a.nbytes + 192, np.uint8)
    start = -room.ctypes.data % 64 + by_bytes
    view = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    assert view.ctypes.data % 64 == by_bytes % 64
    return view


def every_other(a):
    """The same values, as every second element of a larger array."""
    room = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    room[..., ::2] = a
    return room[..., ::2]


LAYOUTS = {
    "one value off a 64-byte boundary": lambda a: shifted(a, a.itemsize),
    "one byte off": lambda a: shifted(a, 1),
    "every other": every_other,
    "backwards": lambda a: a[::-1].copy()[::-1],
    "Fortran order": np.asfortranarray,
    "read only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "channels moved": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -1, 0)), 0, -1),
}
