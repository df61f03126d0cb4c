"""bnfast on CUDA devices: batch norm over arrays of torch, CuPy, JAX, Numba, DLPack or `__cuda_array_interface__`.

    batch_norm_train, batch_norm_infer, batch_norm_grad, moments   as in bnfast, over device arrays
    compile                                                        loads the kernels of a shape ahead of the first call
    status                                                         driver, devices, compiler, cache, what is missing
    DeviceArray                                                    results where the caller's library can't make arrays

Nothing of CUDA is linked: the driver and NVRTC (`pip install "bnfast[cuda]"`) are looked up at the first call. Calls
run on the caller's current stream and return at once; nothing is copied. Results have the same bits in every run, on
every device and stream; they aren't the CPU's bits, to which they are equal within rounding.
The kernels were tested in an emulator on the CPU. They have not run on a GPU yet, and their speed there is unknown.
"""

from __future__ import annotations

from typing import Any

from .. import functional as _cpu

try:
    from .. import _cuda as _cuda
except ImportError as error:
    raise ImportError(f"bnfast.cuda is built on Linux alone, and its compiled part was not found: {error}") from error

from .compiler import compile
from .device_array import DeviceArray
from .functional import batch_norm_grad, batch_norm_infer, batch_norm_train, moments
from .status import status

__all__ = [
    "DeviceArray",
    "batch_norm_grad",
    "batch_norm_infer",
    "batch_norm_train",
    "compile",
    "moments",
    "status",
]


def __getattr__(name: str) -> Any:
    if name in _cpu.__all__:
        raise AttributeError(f"bnfast.cuda has no {name} yet; bnfast.{name} computes it on the CPU")
    raise AttributeError(f"module 'bnfast.cuda' has no attribute {name!r}")
