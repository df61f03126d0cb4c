"""`DeviceArray`: memory on a device for results, where the library of x can't make an array that is written (JAX)."""

from __future__ import annotations

import math
from typing import Any

from .. import _cuda
from .arrays import ITEM_BYTES

_TYPESTR = {"float32": "<f4", "float64": "<f8", "float16": "<f2"}
_FLOAT, _BFLOAT = 2, 4  # DLPack's type codes
_CUDA = 2  # DLPack's kDLCUDA


class DeviceArray:
    """A C-contiguous array on a CUDA device. Other libraries adopt it without a copy: it has `__dlpack__` and, but for
    bfloat16, `__cuda_array_interface__`.

    Its values are written by work on `stream`, in whose order the memory is also freed.

    Example:
        >>> import bnfast.cuda
        >>> import jax.numpy as jnp
        >>> bnfast.cuda.batch_norm_train(jnp.ones((8, 3))).y  # jax.dlpack.from_dlpack adopts it
        DeviceArray(shape=(8, 3), dtype=float32, device=0)
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> None:
        self.shape, self.dtype, self.device, self.stream = shape, dtype, device, stream
        size = math.prod(shape) * ITEM_BYTES[dtype]
        try:
            self.address, self._owner = _cuda.allocate(device, size, stream)  # address 0: an empty array
        except MemoryError:
            raise MemoryError(f"CUDA device {device} has no {size} bytes left for an array of shape {shape}") from None

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype not in _TYPESTR:
            raise AttributeError(f"__cuda_array_interface__ has no {self.dtype}; __dlpack__ does")
        typestr, stream = _TYPESTR[self.dtype], self.stream or 1  # 0 is not allowed: 1 is the default stream
        return {"shape": self.shape, "typestr": typestr, "data": (self.address, False), "version": 3, "stream": stream}

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self.device

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        """Waits for the array's stream, unless the consumer's is the same or the consumer asks for no order (-1)."""
        own = self.stream or 1
        if stream not in (own, -1) and self.address:
            _cuda.read(self.device, self.address, 1, self.stream)
        code = _BFLOAT if self.dtype == "bfloat16" else _FLOAT
        bits = 8 * ITEM_BYTES[self.dtype]
        return _cuda.make_dlpack(self, self.address, list(self.shape), code, bits, self.device)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device})"
