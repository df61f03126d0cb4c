"""Producers of arrays that say what they like: DLPack capsules and buffers of our own making."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

KEPT: list[Any] = []  # what the capsules and buffers point to


class Liar:
    """A DLPack producer that says what it likes."""

    def __init__(self, device: Any = (1, 0), **fields: Any) -> None:
        self.device, self.fields = device, fields

    def __dlpack_device__(self) -> Any:
        if isinstance(self.device, Exception):
            raise self.device
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        return capsule(**self.fields)


class Managed(ctypes.Structure):
    """DLManagedTensor of DLPack, version 0."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    )  # fmt: skip


def capsule(
    data: int = 0,
    shape: tuple[int, ...] | None = (4, 3),
    bits: int = 32,
    code: int = 2,
    lanes: int = 1,
    ndim: int | None = None,
) -> Any:
    extents = None if shape is None else (ctypes.c_int64 * len(shape))(*shape)
    axes = ndim if ndim is not None else len(shape or ())
    tensor = Managed(data, 1, 0, axes, code, bits, lanes, extents, None, 0, None, None)
    KEPT.extend((extents, tensor))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(tensor), b"dltensor", None)


class Buffer(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        *((name, ctypes.c_void_p) for name in ("shape", "strides", "suboffsets", "internal")),
    )


def exporter(**fields: Any) -> Any:
    """An object whose buffer says what a C extension could say: twelve float32, but for these fields."""
    values = np.arange(12, dtype="float32")
    extents = fields.pop("shape", (4, 3))
    shape = None if extents is None else (ctypes.c_ssize_t * len(extents))(*extents)
    address = None if shape is None else ctypes.addressof(shape)

    @ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
    def export(self: Any, view: int, flags: int) -> int:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        told = Buffer(values.ctypes.data, id(self), 48, 4, 1, 2, b"f", address)
        for name, value in fields.items():
            setattr(told, name, value)
        ctypes.memmove(view, ctypes.addressof(told), ctypes.sizeof(Buffer))
        return 0

    class Exporter:
        pass

    procedures = (ctypes.c_void_p * 2)(ctypes.cast(export, ctypes.c_void_p).value, None)
    KEPT.extend((values, shape, export, procedures, Exporter))
    # tp_as_buffer of CPython's type objects (64 bits); the tests read a right buffer, too
    ctypes.c_void_p.from_address(id(Exporter) + 20 * 8).value = ctypes.addressof(procedures)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(Exporter))
    return Exporter()
