"""A CUDA driver for tests without a GPU (csrc/tests/cuda/fake_driver.cpp), and arrays that pass for a device's.

The driver's devices compute on host memory: a launch runs the kernel of that name through the emulator. So everything
is real from bnfast.cuda's arguments to cuLaunchKernelEx's, and the kernels' own text runs; what NVRTC makes of that
text is loaded and not run. torch is the real one, with tensors on the CPU that say they are on a device; CuPy, Numba
and other producers are stand-ins with the attributes that bnfast.cuda reads.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import types
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
STREAM = 0x5EED0  # plus the device's number
SOURCES = ("csrc/tests/cuda", "csrc/cuda/kernels", "csrc/include")


def library(folder: Path) -> Path | None:
    """The driver: BNFAST_FAKE_CUDA names one; else it is compiled into `folder`, once. None: no compiler."""
    given = os.environ.get("BNFAST_FAKE_CUDA")
    if given:
        return Path(given)
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        return None
    files = sorted(path for name in SOURCES for path in (ROOT / name).rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"libcuda-{digest}.so.1"
    with open(folder / "lock", "w") as lock:  # xdist's workers share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_suffix(".part")
            flags = [
                "-std=c++17",
                "-O1",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                f"-I{ROOT}/csrc",
                f"-I{ROOT}/csrc/include",
            ]
            source = os.fspath(ROOT / "csrc/tests/cuda/fake_driver.cpp")
            subprocess.run([compiler, *flags, source, "-o", os.fspath(part), "-ldl"], check=True)
            part.rename(target)
    return target


class Driver:
    """The fake's own functions, which look into it and make it fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(os.fspath(path))
        self.library.fake_cuda_stream.restype = ctypes.c_void_p
        self.library.fake_cuda_image.restype = ctypes.c_char_p
        self.library.fake_cuda_waited.restype = ctypes.c_void_p

    @property
    def launches(self) -> int:
        return int(self.library.fake_cuda_launches())

    @property
    def stream(self) -> int:
        return int(self.library.fake_cuda_stream() or 0)

    @property
    def device(self) -> int:
        """The device of the last launch."""
        return int(self.library.fake_cuda_device())

    @property
    def context(self) -> int:
        """The device whose context is current now."""
        return int(self.library.fake_cuda_context())

    @property
    def waits(self) -> tuple[int, int]:
        """How often a stream was waited for, and the last one."""
        return int(self.library.fake_cuda_waits()), int(self.library.fake_cuda_waited() or 0)

    @property
    def allocations(self) -> int:
        return int(self.library.fake_cuda_allocations())

    def fail(self, function: str, status: int) -> None:
        self.library.fake_cuda_fail(function.encode(), status)

    def capture(self, stream: int, on: bool) -> None:
        self.library.fake_cuda_capture(ctypes.c_void_p(stream), int(on))

    def fail_allocation(self, k: int) -> None:
        """The k-th allocation from now on finds no memory; -1: none."""
        self.library.fake_cuda_fail_allocation(k)

    def set_free_bytes(self, size: int) -> None:
        self.library.fake_cuda_set_free_bytes(ctypes.c_size_t(size))

    def own(self, array: np.ndarray, device: int) -> None:
        """The array's memory passes for the device's as long as the array lives."""
        address, size = array.__array_interface__["data"][0], array.nbytes
        if size:
            self.library.fake_cuda_own(ctypes.c_void_p(address), ctypes.c_size_t(size), device)
            weakref.finalize(array, self.library.fake_cuda_own, ctypes.c_void_p(address), ctypes.c_size_t(0), 0)


def owned(array: np.ndarray) -> np.ndarray:
    """A copy with the same strides, in memory of its own."""
    copy = np.empty_like(array)
    copy[...] = array
    return copy


# ---- arrays of the libraries -----------------------------------------------------------------------------------------


class Base:
    """Wraps a NumPy array as an array of the device."""

    driver: Driver

    def __init__(self, host: np.ndarray, device: int = 0, read_only: bool = False) -> None:
        self.host, self.number, self.read_only = host, device, read_only
        self.driver.own(host, device)


class InterfaceArray(Base):
    """With __cuda_array_interface__ alone."""

    stream: int | None = STREAM

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        facts = self.host.__array_interface__
        data = (facts["data"][0], self.read_only)
        return {"shape": facts["shape"], "typestr": facts["typestr"], "data": data, "strides": facts["strides"],
                "version": 3, "stream": self.stream}  # fmt: skip


class DlpackArray(Base):
    """With DLPack alone, as JAX's arrays have it."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __dlpack__(self, *, stream: Any = None) -> Any:
        from bnfast import _cuda

        assert stream == 1
        assert self.host.flags.c_contiguous
        code = 4 if self.host.dtype.name == "bfloat16" else 2 if self.host.dtype.kind == "f" else 0
        at = self.host.__array_interface__["data"][0]
        return _cuda.make_dlpack(self, at, list(self.host.shape), code, 8 * self.host.itemsize, self.number)


class CupyArray(Base):
    """As cupy.ndarray."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.host.__array_interface__["data"][0])

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    device = property(lambda self: types.SimpleNamespace(id=self.number))


def cupy_module() -> types.ModuleType:
    """The part of cupy that bnfast.cuda uses."""
    module: Any = types.ModuleType("cupy")
    current = [0]

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            current.append(self.number)

        def __exit__(self, *_: object) -> None:
            current.pop()

    def empty(shape: Any, dtype: Any) -> CupyArray:
        return CupyArray(np.empty(shape, numpy_dtype(dtype)), current[-1])

    module.ndarray = CupyArray
    module.empty = empty
    module.empty_like = lambda value: CupyArray(np.empty_like(value.host), current[-1])
    module.cuda = types.SimpleNamespace(
        Device=Device, get_current_stream=lambda: types.SimpleNamespace(ptr=STREAM + current[-1])
    )
    return module


class NumbaArray(InterfaceArray):
    """As numba.cuda's device arrays."""

    stream = None
    shape = property(lambda self: self.host.shape)


NumbaArray.__module__ = "numba.cuda.cudadrv.devicearray"


def numba_module() -> types.ModuleType:
    module: Any = types.ModuleType("numba.cuda")
    module.gpus = [nullcontext(), nullcontext()]
    module.device_array = lambda shape, dtype: NumbaArray(np.empty(shape, dtype))
    return module


def numpy_dtype(name: Any) -> Any:
    if str(name) != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


# ---- torch -----------------------------------------------------------------------------------------------------------


def torch_classes() -> list[Any]:
    """One class per device: real tensors on the CPU that say they are on it."""
    import torch

    def make(number: int) -> Any:
        class CudaTensor(torch.Tensor):
            is_cuda = property(lambda self: True)
            device = property(lambda self: torch.device("cuda", number))

        return CudaTensor

    return [make(0), make(1)]


def patch_torch(monkeypatch: Any, classes: list[Any]) -> None:
    """torch.empty makes such tensors, and each device has a current stream."""
    import torch

    own = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return own(*args, **kwargs)
        return own(*args, **{**kwargs, "device": "cpu"}).as_subclass(classes[torch.device(device).index])

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=STREAM + device))
    if hasattr(torch._C, "_cuda_getCurrentRawStream"):  # in builds for CUDA
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM + device)


class Namespace:
    """Arrays of one library: `to` makes one from a NumPy array, `host` reads it."""

    def __init__(self, name: str, monkeypatch: Any, driver: Driver) -> None:
        self.name, self.driver = name, driver
        Base.driver = driver
        self.kind: Any = {
            "interface": InterfaceArray,
            "dlpack": DlpackArray,
            "cupy": CupyArray,
            "numba": NumbaArray,
        }.get(name)
        if name == "cupy":
            monkeypatch.setitem(sys.modules, "cupy", cupy_module())
        if name == "numba":
            monkeypatch.setitem(sys.modules, "numba.cuda", numba_module())
        if name == "torch":
            self.classes = torch_classes()
            patch_torch(monkeypatch, self.classes)

    @property
    def stream(self) -> int:
        """The stream that device 0's calls run on."""
        return {"dlpack": 0, "numba": 0}.get(self.name, STREAM)

    def supports(self, dtype: str) -> bool:
        return dtype != "bfloat16" or self.name not in ("interface", "numba")

    def to(self, array: np.ndarray, device: int = 0) -> Any:
        copy = owned(array)
        if self.name != "torch":
            return self.kind(copy, device)
        import torch

        if copy.dtype.name == "bfloat16":
            tensor = torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(copy)
        return tensor.as_subclass(self.classes[device])

    def host(self, array: Any) -> np.ndarray:
        from bnfast.cuda import DeviceArray

        if isinstance(array, DeviceArray):
            dtype = numpy_dtype(array.dtype)
            size = int(np.prod(array.shape)) * dtype.itemsize
            data = (ctypes.c_char * size).from_address(array.address) if size else b""
            return np.frombuffer(bytes(data), dtype).reshape(array.shape)
        if self.name != "torch":
            return np.asarray(array.host)
        import torch

        plain = array.detach().as_subclass(torch.Tensor)
        if plain.dtype == torch.bfloat16:
            return plain.contiguous().view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return np.asarray(plain.numpy())

    def check_launch(self) -> None:
        """The last launch was on device 0 and the current stream of the library."""
        assert (self.driver.device, self.driver.stream) == (0, self.stream)


# ---- a real device ---------------------------------------------------------------------------------------------------


class Producer:
    """A torch tensor on a device, behind one protocol alone."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


class InterfaceProducer(Producer):
    __cuda_array_interface__ = property(lambda self: self.tensor.__cuda_array_interface__)


class DlpackProducer(Producer):
    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.tensor.__dlpack__(stream=stream)


class RealNamespace:
    """The same on a GPU (BNFAST_CUDA_DEVICE=1), with the real torch and CuPy. Numba is left out."""

    def __init__(self, name: str) -> None:
        import torch

        self.name, self.torch = name, torch
        self.wrap: Any = {"interface": InterfaceProducer, "dlpack": DlpackProducer}.get(name)

    supports = Namespace.supports

    def to(self, array: np.ndarray, device: int = 0) -> Any:
        bits = array.view(np.int16) if array.dtype.name == "bfloat16" else array
        tensor = self.torch.from_numpy(owned(bits)).to(f"cuda:{device}")
        tensor = tensor.view(self.torch.bfloat16) if array.dtype.name == "bfloat16" else tensor
        if self.wrap is not None:
            return self.wrap(tensor)
        return tensor if self.name == "torch" else __import__("cupy").from_dlpack(tensor)

    def host(self, array: Any) -> np.ndarray:
        self.torch.cuda.synchronize()
        if isinstance(array, Producer):
            array = array.tensor
        if not isinstance(array, self.torch.Tensor):
            array = self.torch.from_dlpack(array)
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            return np.asarray(array.contiguous().view(self.torch.int16)).view(numpy_dtype("bfloat16"))
        return np.asarray(array)

    def check_launch(self) -> None:
        pass
