"""One call on a device: its arrays, read and checked against x, and the memory that it makes.

Everything is checked before anything is allocated, launched or written. An error names the argument, what was wanted
and what was received.
"""

from __future__ import annotations

from typing import Any

from .. import _cuda
from . import compiler
from .arrays import DTYPES, Geometry, View, memory_order
from .libraries import library_of, view_of

VectorAt = tuple[int, bool] | None

_SCRATCH_ALIGNMENT = 256  # in bytes; allocators of CUDA memory give as much, but none promises it here


class Call:
    """The tensor that decides (x), and the other arrays as they are added."""

    def __init__(self, name: str, x: Any, axis: Any) -> None:
        self.name, self.value = name, x
        self.library = library_of(name, x)
        self.x: View = self.library.view(name, x)
        self.geometry = Geometry.of(name, self.x, axis)
        self.stream = self.library.stream(x, self.x.device)
        self.inputs: list[tuple[str, View]] = [(name, self.x)]
        self._kept: list[Any] = []
        self._lent = self.library.lends
        compiler.find()

    @property
    def dtype(self) -> int:
        return DTYPES.index(self.x.dtype)

    @property
    def place(self) -> tuple[Any, ...]:
        """The first arguments of every function of _cuda."""
        return self.x.device, self.stream, self.scratch

    # ---- inputs ----

    def tensor(self, name: str, value: Any) -> int:
        """The address of an optional array like x, or 0."""
        if value is None:
            return 0
        view = self._on_device(name, value)
        self._require_like_x(name, view)
        self.inputs.append((name, view))
        return view.address

    def vector(self, name: str, value: Any) -> VectorAt:
        """An optional vector: its address, and whether it is float64."""
        if value is None:
            return None
        view = self._vector(name, value)
        self.inputs.append((name, view))
        return view.address, view.dtype == "float64"

    def _vector(self, name: str, value: Any) -> View:
        view = self._on_device(name, value)
        wanted = self.geometry.vector_shape
        if view.shape != wanted:
            raise ValueError(f"{name} must have shape {wanted} to match axis of {self.name}. Received: {view.shape}")
        if view.dtype not in ("float32", "float64"):
            raise TypeError(f"{name} must be float32 or float64. Received: {view.dtype}")
        if view.strides is not None:
            order = memory_order(name, view.shape, view.strides)
            if list(order) != sorted(order):
                raise ValueError(f"{name} must be C-contiguous. Received: strides {view.strides}")
        return view

    def _on_device(self, name: str, value: Any) -> View:
        library = library_of(name, value)
        view = library.view(name, value)
        if view.device != self.x.device:
            raise ValueError(
                f"{name} must be on CUDA device {self.x.device}, where {self.name} is. Received: device {view.device}"
            )
        self._lent = self._lent or library.lends
        if library is not self.library and view.size:
            other = library.stream(value, view.device)
            if other != self.stream:  # of another library, or made on another stream: wait until it is written
                _wait(view, other)
        return view

    def finish(self) -> None:
        """After the launches. A producer that only lends its memory must not take it back while the device reads it."""
        if self._lent and self.x.size:
            _wait(self.x, self.stream)

    def _require_like_x(self, name: str, view: View) -> None:
        if view.shape != self.x.shape:
            raise ValueError(f"{name} must have the shape {self.x.shape} of {self.name}. Received: {view.shape}")
        if view.dtype != self.x.dtype:
            raise TypeError(f"{name} must have the dtype {self.x.dtype} of {self.name}. Received: {view.dtype}")
        if memory_order(name, view.shape, view.strides) != self.geometry.order:
            own, wanted = (each.strides or "of a C-contiguous array" for each in (view, self.x))
            raise ValueError(
                f"{name} must lie in memory as {self.name}, with strides {wanted}. Received: strides {own}"
            )

    # ---- outputs ----

    def moving(self, mean: Any, variance: Any) -> tuple[VectorAt, VectorAt]:
        """The moving statistics, which the call updates."""
        if (mean is None) != (variance is None):
            given, absent = (
                ("moving_mean", "moving_variance") if variance is None else ("moving_variance", "moving_mean")
            )
            raise ValueError(
                f"moving_mean and moving_variance must be given together. Received: {given} without {absent}"
            )
        found: list[VectorAt] = []
        for name, value in (("moving_mean", mean), ("moving_variance", variance)):
            if value is None:
                return None, None
            view = self._vector(name, value)
            self._require_writable(name, view)
            self._require_disjoint(name, view, ())
            self.inputs.append((name, view))
            found.append((view.address, view.dtype == "float64"))
        return found[0], found[1]

    def check_out(self, name: str, out: Any, may_equal: tuple[str, ...]) -> View | None:
        """An optional array to write: exactly one of `may_equal`, or disjoint from every input so far."""
        if out is None:
            return None
        view = self._on_device(name, out)
        self._require_like_x(name, view)
        self._require_writable(name, view)
        self._require_disjoint(name, view, may_equal)
        self.inputs.append((name, view))
        return view

    def _require_writable(self, name: str, view: View) -> None:
        if view.read_only:
            raise ValueError(f"{name} must be writable. Received: a read-only array")

    def _require_disjoint(self, name: str, view: View, may_equal: tuple[str, ...]) -> None:
        for other_name, other in self.inputs:
            same = other_name in may_equal and other.address == view.address
            if not same and view.overlaps(other):
                allowed = " or ".join([f"exactly {each}" for each in may_equal] + ["disjoint from every other array"])
                raise ValueError(f"{name} must be {allowed}. Received: memory that {other_name} has, too")

    def new(self, out: Any = None) -> tuple[Any, int]:
        """`out`, or a new array like x; and its address."""
        array = self.library.empty_like(self.value, self.x, self.stream) if out is None else out
        return array, self.library.address(array) if out is None else view_of("out", array).address

    def new_vector(self, dtype: str = "float64") -> tuple[Any, int]:
        array = self.library.empty(self.geometry.vector_shape, dtype, self.x.device, self.stream)
        return array, self.library.address(array)

    def scratch(self, size: int) -> int:
        """Memory for the launched work. The library keeps it for this stream when it is freed."""
        array = self.library.empty((-(-(size + _SCRATCH_ALIGNMENT) // 4),), "float32", self.x.device, self.stream)
        self._kept.append(array)
        return -(-self.library.address(array) // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT


def _wait(view: View, stream: int) -> None:
    """Waits for the stream: one byte is read back in its order."""
    _cuda.read(view.device, view.address, 1, stream)


def refuse_capture(call: Call, what: str) -> None:
    if _cuda.is_capturing(call.x.device, call.stream):
        raise ValueError(f"{what} waits for the device, which a CUDA graph can't capture")
