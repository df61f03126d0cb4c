"""A layer's vectors: from NumPy to a device and back, and copies there. Values only; no kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _cuda
from .._arguments.arrays import Array
from .call import Call
from .libraries import library_of, view_of


def to_device(array: Array, call: Call) -> Any:
    """A vector with these values, of x's library and device. Waits for the stream."""
    made = call.library.empty(array.shape, array.dtype.name, call.x.device, call.stream)
    _cuda.write(call.x.device, view_of("vector", made).address, np.ascontiguousarray(array).tobytes(), call.stream)
    return made


def to_host(value: Any) -> Array:
    """The values as a NumPy array. Waits for the stream."""
    library = library_of("vector", value)
    view = library.view("vector", value)
    data = _cuda.read(view.device, view.address, view.bytes, library.stream(value, view.device))
    return np.frombuffer(data, view.dtype).reshape(view.shape).copy()


def copied(value: Any, call: Call) -> Any:
    """A copy on the device, in the order of x's stream."""
    view = view_of("vector", value)
    made = call.library.empty(view.shape, view.dtype, view.device, call.stream)
    _cuda.copy(view.device, view_of("vector", made).address, view.address, view.bytes, call.stream)
    return made
