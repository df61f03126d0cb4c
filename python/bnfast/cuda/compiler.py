"""Where NVRTC is, and `compile`, which loads the kernels of a shape ahead of its first call.

Candidates in this order: BNFAST_NVRTC (a path), one that this process has loaded already, those of installed wheels
(nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12), the loader's own search. One whose major version exceeds the driver's is
passed over: the driver would refuse its code.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import _cuda
from .._arguments import checks
from .arrays import DTYPES, Geometry, View
from .options import scalars

PIP_LINE = 'pip install "bnfast[cuda]"'
CALLS = ("train", "infer", "grad", "moments")  # in the order of bnfast/cuda.h

_lock = threading.Lock()
_found = False


def find() -> None:
    """Tells the launcher where NVRTC and fatbins are. Without effect after the first time."""
    global _found
    if _found:
        return
    with _lock:
        if _found:
            return
        folder = Path(_cuda.__file__).parent
        if any(folder.glob("bnfast_cuda_*.fatbin")):
            _cuda.set_image_folder(os.fspath(folder))
        path = library(_cuda.driver_version() // 1000)
        if path is not None:
            _cuda.set_compiler_library(path)
        _found = True


def library(driver_major: int) -> str | None:
    """The path of the NVRTC to take; None: the loader's own search."""
    named = os.environ.get("BNFAST_NVRTC")
    if named:
        return named
    for path in (*_loaded(), *_installed()):
        version = re.search(r"libnvrtc\.so\.(\d+)", path)
        if version is not None and int(version[1]) <= driver_major:
            return path
    return None


def _loaded() -> Iterator[str]:
    """The NVRTC libraries in this process's memory (torch and CuPy load theirs)."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    yield from dict.fromkeys(re.findall(r"(/\S*libnvrtc\.so\.\d\S*)", maps))


def _installed() -> Iterator[str]:
    """Those of NVIDIA's wheels, the newest first."""
    for module in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            found = importlib.util.find_spec(module)
        except ImportError:
            continue
        for folder in (found.submodule_search_locations or ()) if found is not None else ():
            yield from sorted(map(os.fspath, Path(folder, "lib").glob("libnvrtc.so.*")), reverse=True)


def compile(
    shape: Sequence[int],
    dtype: str = "float32",
    *,
    axis: int | Sequence[int] = -1,
    activation: str | None = None,
    negative_slope: float = 0.2,
    calls: Sequence[str] = CALLS,
    device: int = 0,
) -> list[str]:
    """Loads the kernels of C-contiguous arrays of this shape, so that the first call doesn't wait for the compiler and
    a CUDA graph can capture it.

    Args:
        shape, dtype, axis, activation, negative_slope: of the calls to come. dtype is a word, as "bfloat16".
        calls: some of "train", "infer", "grad", "moments".
        device: the number of the CUDA device.

    Returns:
        The kernels, each with its origin: "fatbin", "cache" (on disk, ~/.cache/bnfast/cuda) or "NVRTC".

    Raises:
        ValueError, TypeError, NotImplementedError: an argument is wrong, or not there yet.
        RuntimeError: the driver or NVRTC is missing or fails.

    Example:
        >>> import bnfast.cuda
        >>> kernels = bnfast.cuda.compile((32, 56, 56, 64), calls=["train"])
        >>> len(kernels) > 0
        True
    """
    options = scalars(activation, negative_slope)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}. Received: {dtype!r}")
    extents = tuple(checks.integer("shape", extent) for extent in shape)
    if any(extent < 0 for extent in extents):
        raise ValueError(f"shape must have extents >= 0. Received: {extents}")
    wanted = [CALLS.index(str(checks.choice("calls", each, CALLS))) for each in calls]
    view = View(0, extents, None, dtype, device, False, None)
    nsc: Any = Geometry.of("shape", view, axis).extents
    find()
    number = checks.integer("device", device)
    if not 0 <= number < _cuda.device_count():
        raise ValueError(f"device must be in [0, {_cuda.device_count()}). Received: {device}")
    loaded = [_cuda.load(number, call, nsc, DTYPES.index(dtype), *options) for call in wanted]
    return list(dict.fromkeys(kernel for kernels in loaded for kernel in kernels))
