"""Convert array-like arguments to NumPy arrays over the same memory.

NumPy arrays, the buffer protocol (array.array, memoryview, eager TensorFlow tensors) and DLPack on the CPU (torch, JAX)
are read in place. NumPy's DLPack reader has no bfloat16, so bfloat16 tensors take another path, also without a copy.
"""

from __future__ import annotations

import operator
import struct
import sys
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import _core

__all__ = ["Array", "as_array", "contiguous", "overlap", "same_memory"]

Array: TypeAlias = npt.NDArray[Any]

HOST_DEVICES = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost (pinned memory)


def as_array(name: str, value: Any) -> Array:
    """`value` as an ndarray, without a copy. Raises a TypeError that names the argument if this is not possible."""
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a plain array, with weights in mask=. Received: {type(value).__name__}")
        return _native_byte_order(np.asarray(value))
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _from_dlpack(name, value)
    # No buffer has a format for bfloat16, and TensorFlow 2.18's tensors have no __dlpack__.
    if "bfloat16" in str(getattr(value, "dtype", "")) and hasattr(value, "__array__"):
        return _from_bfloat16(name, value)
    if fault := _core._buffer_fault(value):
        raise TypeError(f"{name} must have a buffer whose shape and size agree. Received: {fault}")
    try:
        view = memoryview(value)
    except (TypeError, ValueError, BufferError):
        raise TypeError(
            f"{name} must be a NumPy array or have the buffer protocol or __dlpack__. Received: {type(value).__name__}"
        ) from None
    return _native_byte_order(_from_buffer(name, view))


def _from_buffer(name: str, view: memoryview) -> Array:
    """A producer's words are checked: NumPy believes the format and warns at most."""
    try:
        size = struct.calcsize(view.format)
    except struct.error:
        size = view.itemsize  # a format of PEP 3118 that `struct` doesn't know: NumPy reads it or raises
    if size != view.itemsize:
        raise TypeError(
            f"{name} must have items of {size} bytes, as its format {view.format!r} says. Received: {view.itemsize}"
        )
    try:
        array = np.asarray(view)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise TypeError(f"{name} has a buffer that NumPy can't read: {error}") from error
    return _borrowed(name, array)


def _borrowed(name: str, array: Array) -> Array:
    """The array, if its memory is the producer's. For a null pointer NumPy allocates memory that holds anything."""
    if array.size and array.flags.owndata:
        raise TypeError(f"{name} must have memory of its own. Received: a null pointer for shape {array.shape}")
    return array


def _native_byte_order(array: Array) -> Array:
    """ctypes arrays have dtype '<f4': the machine's byte order, but _core accepts only the spelling '=f4'."""
    if array.dtype.isnative and array.dtype.byteorder in "<>":
        return array.view(array.dtype.newbyteorder("="))
    return array


def _from_dlpack(name: str, value: Any) -> Array:
    if getattr(value, "requires_grad", False):
        raise TypeError(f"{name} must be detached, as bnfast records no gradients. Received: requires_grad=True")
    if _is_negated(value):
        raise TypeError(
            f"{name} must hold its values, which DLPack doesn't negate. Received: is_neg(); use resolve_neg()"
        )
    device = _device_of(name, value)
    if device[0] not in HOST_DEVICES:
        raise TypeError(f"{name} must be in the CPU's memory. Received: DLPack device {device}")
    if "bfloat16" in str(getattr(value, "dtype", "")):
        return _from_bfloat16(name, value)
    try:
        array = np.from_dlpack(value)
    except Exception as error:  # a producer may raise anything
        raise TypeError(f"{name} could not be read through DLPack ({type(value).__name__}): {error}") from error
    return _borrowed(name, array)


def _is_negated(value: Any) -> bool:
    """Whether a torch tensor holds the opposite of its values, as z.conj().imag does: its DLPack doesn't say so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor) and value.is_neg()


def _device_of(name: str, value: Any) -> tuple[int, int]:
    received: Any = None
    try:
        received = value.__dlpack_device__()
        kind, index = received
        return operator.index(kind), operator.index(index)
    except Exception as error:  # a producer may raise anything
        text = f"{received!r}" if received is not None else f"{type(error).__name__}: {error}"
        raise TypeError(f"{name}.__dlpack_device__() must return two integers. Received: {text}") from error


def _from_bfloat16(name: str, value: Any) -> Array:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise TypeError(f"{name} has dtype bfloat16, for which NumPy needs ml_dtypes: pip install ml_dtypes") from None
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            bits: Array = np.from_dlpack(value.view(torch.int16))
            return bits.view(bfloat16)
        array = np.asarray(value)  # JAX's __array__ returns a view of its buffer with dtype bfloat16
    except Exception as error:  # a producer may raise anything
        raise TypeError(f"{name} could not be read as bfloat16 ({type(value).__name__}): {error}") from error
    if array.dtype != bfloat16:
        raise TypeError(f"{name} must be readable as bfloat16. Received: {type(value).__name__} read as {array.dtype}")
    return array


def contiguous(array: Array | None, dtype: npt.DTypeLike | None = None) -> Array | None:
    """The array itself if it is C-contiguous and aligned (and has `dtype`), else one copy that is."""
    if array is None or (array.flags.c_contiguous and array.flags.aligned and (dtype is None or array.dtype == dtype)):
        return array
    return np.require(array, dtype, ("C_CONTIGUOUS", "ALIGNED"))


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share a byte. If NumPy cannot decide within the work limit, the answer is True."""
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # NumPy's stubs: 0 or -1
    except np.exceptions.TooHardError:
        return True


def same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )
