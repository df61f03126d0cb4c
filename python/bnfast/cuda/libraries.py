"""The libraries whose arrays bnfast.cuda takes: how each says where an array lies, names its stream, makes arrays.

torch, CuPy and Numba are looked up in sys.modules, never imported: an array of theirs can't exist before. Anything else
is read through DLPack, else through `__cuda_array_interface__`, and gets its results as `DeviceArray`s.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Protocol

from .. import _cuda
from .arrays import DTYPES, ITEM_BYTES, View
from .device_array import DeviceArray

_LEGACY = 1  # the default stream in DLPack and in __cuda_array_interface__; a null pointer elsewhere
_CUDA, _CUDA_MANAGED = 2, 13  # of DLPack
_FLOATS = {(2, 16): "float16", (2, 32): "float32", (2, 64): "float64", (4, 16): "bfloat16"}
_TYPESTR = {"<f2": "float16", "<f4": "float32", "<f8": "float64"}


class Library(Protocol):
    """What a library does for a call.

    lends: its arrays may be freed, and their memory reused on any stream, right after the call.
    """

    lends: bool

    def view(self, name: str, value: Any) -> View:
        """Raises a TypeError that names the argument if it is no array on a device, or has another dtype."""
        ...

    def address(self, value: Any) -> int:
        """Where an array lies that `empty` or `empty_like` made."""
        ...

    def stream(self, value: Any, device: int) -> int: ...

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any: ...

    def empty_like(self, value: Any, view: View, stream: int) -> Any:
        """An array with the shape, dtype and order of axes of `value`."""
        ...


def library_of(name: str, value: Any) -> Library:
    """The library that an array belongs to."""
    known = _BY_TYPE.get(type(value))
    return known if known is not None else _library_of(name, value)


def _library_of(name: str, value: Any) -> Library:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch(torch)
    if cupy is not None and isinstance(value, cupy.ndarray):
        return _cupy(cupy)
    if isinstance(value, DeviceArray):
        return Own()
    if type(value).__module__.split(".")[0] in ("numba", "numba_cuda"):
        return Numba()
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return Dlpack()
    if hasattr(value, "__cuda_array_interface__"):
        return Interface()
    raise TypeError(
        f"{name} must be an array on a CUDA device: of torch, CuPy, JAX, Numba, or with __dlpack__ or "
        f"__cuda_array_interface__. Received: {type(value).__name__}"
    )


def view_of(name: str, value: Any) -> View:
    return library_of(name, value).view(name, value)


def _checked_dtype(name: str, dtype: str) -> str:
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16. Received: {dtype}")
    return dtype


def _not_on_device(name: str, received: str) -> TypeError:
    return TypeError(f"{name} must be on a CUDA device. Received: {received}")


# Of types whose instances all belong to one library.
_BY_TYPE: dict[type, Library] = {}


@functools.cache
def _torch(torch: Any) -> Torch:
    library = Torch(torch)
    _BY_TYPE.update({torch.Tensor: library, torch.nn.Parameter: library})
    return library


class Torch:
    lends = False

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.names = {getattr(torch, name): name for name in DTYPES}
        self.dtypes = {name: dtype for dtype, name in self.names.items()}
        self.device = functools.cache(functools.partial(torch.device, "cuda"))
        # The stream's number without a Stream object around it, where this build of PyTorch has that.
        self.raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def view(self, name: str, value: Any) -> View:
        if not value.is_cuda:
            raise _not_on_device(name, f"a torch tensor on {value.device}")
        if value.requires_grad and self.torch.is_grad_enabled():
            raise TypeError(
                f"{name} must be detached, as bnfast.cuda records no gradients (bnfast.cuda.autograd does). Received: "
                "requires_grad=True"
            )
        if value.is_neg():
            raise TypeError(f"{name} must be resolved by resolve_neg(). Received: a tensor with is_neg() true")
        strides = None if value.is_contiguous() else tuple(value.stride())
        dtype = self.names.get(value.dtype) or _checked_dtype(name, str(value.dtype).removeprefix("torch."))
        return View(value.data_ptr(), tuple(value.shape), strides, dtype, value.device.index, False, value)

    def address(self, value: Any) -> int:
        return int(value.data_ptr())

    def stream(self, value: Any, device: int) -> int:
        if self.raw_stream is not None:
            return int(self.raw_stream(device))
        return int(self.torch.cuda.current_stream(device).cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        return self.torch.empty(shape, dtype=self.dtypes[dtype], device=self.device(device))

    def empty_like(self, value: Any, view: View, stream: int) -> Any:
        return self.torch.empty_like(value)


@functools.cache
def _cupy(cupy: Any) -> Cupy:
    return Cupy(cupy)


class Cupy:
    lends = False

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy

    def view(self, name: str, value: Any) -> View:
        dtype = _checked_dtype(name, value.dtype.name)
        strides = tuple(stride // ITEM_BYTES[dtype] for stride in value.strides)
        return View(value.data.ptr, tuple(value.shape), strides, dtype, value.device.id, False, value)

    def address(self, value: Any) -> int:
        return int(value.data.ptr)

    def stream(self, value: Any, device: int) -> int:
        with self.cupy.cuda.Device(device):
            return int(self.cupy.cuda.get_current_stream().ptr)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        with self.cupy.cuda.Device(device):
            return self.cupy.empty(shape, dtype)

    def empty_like(self, value: Any, view: View, stream: int) -> Any:
        with self.cupy.cuda.Device(view.device):
            return self.cupy.empty_like(value)


class Interface:
    """`__cuda_array_interface__`, versions 2 and 3. The pointer tells the device."""

    lends = False

    def view(self, name: str, value: Any) -> View:
        facts = value.__cuda_array_interface__
        if facts.get("mask") is not None:
            raise TypeError(f"{name} must have no mask. Received: a masked __cuda_array_interface__")
        typestr = facts["typestr"]
        dtype = _checked_dtype(name, _TYPESTR.get(typestr, f"typestr {typestr}"))
        shape = tuple(facts["shape"])
        address, read_only = facts["data"]
        steps = facts.get("strides")
        strides = None if steps is None else tuple(step // ITEM_BYTES[dtype] for step in steps)
        device = _cuda.device_of_pointer(address) if address else -1
        if device < 0 and 0 in shape:
            device = 0  # an empty array lies nowhere
        if device < 0:
            raise _not_on_device(name, f"{type(value).__name__}, whose pointer is not one of a device")
        return View(address, shape, strides, dtype, device, bool(read_only), value)

    def address(self, value: Any) -> int:
        return view_of("result", value).address

    def stream(self, value: Any, device: int) -> int:
        given = value.__cuda_array_interface__.get("stream")
        return 0 if given in (None, _LEGACY) else int(given)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        return DeviceArray(shape, dtype, device, stream)

    def empty_like(self, value: Any, view: View, stream: int) -> Any:
        _require_order(view)
        return self.empty(view.shape, view.dtype, view.device, stream)


class Own(Interface):
    def view(self, name: str, value: Any) -> View:
        return View(value.address, value.shape, None, value.dtype, value.device, False, value)

    def stream(self, value: Any, device: int) -> int:
        return int(value.stream)


class Numba(Interface):
    def view(self, name: str, value: Any) -> View:
        if not hasattr(value, "__cuda_array_interface__"):
            raise _not_on_device(name, type(value).__name__)
        return super().view(name, value)

    def empty(self, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        cuda = sys.modules["numba.cuda"]
        with cuda.gpus[device]:
            return cuda.device_array(shape, dtype)


class Dlpack(Interface):
    """DLPack on the default stream: the producer's work comes before what is launched there. The call waits for the
    device, because a capsule's memory is the producer's again when it is dropped."""

    lends = True

    def view(self, name: str, value: Any) -> View:
        try:
            kind, _ = value.__dlpack_device__()
        except Exception as error:  # a producer may raise anything
            raise TypeError(f"{name}.__dlpack_device__() failed: {error}") from error
        if kind not in (_CUDA, _CUDA_MANAGED):
            raise _not_on_device(name, f"{type(value).__name__} on DLPack device type {int(kind)}")
        try:
            capsule = value.__dlpack__(stream=_LEGACY)
        except Exception as error:
            raise TypeError(f"{name} could not be read through DLPack ({type(value).__name__}): {error}") from error
        address, shape, strides, code, bits, lanes, _, device, read_only = _cuda.read_dlpack(capsule)
        found = _FLOATS.get((code, bits)) if lanes == 1 else None
        dtype = _checked_dtype(name, found or f"DLPack type ({code}, {bits}, {lanes})")
        immutable = type(value).__module__.split(".")[0] in ("jax", "jaxlib")
        return View(address, shape, strides, dtype, device, read_only or immutable, capsule)

    def stream(self, value: Any, device: int) -> int:
        return 0


def _require_order(view: View) -> None:
    """DeviceArrays are C-contiguous, and a result has the order of x."""
    step = 1
    for extent, stride in zip(reversed(view.shape), reversed(view.strides or ()), strict=False):
        if extent != 1 and stride != step and view.size:
            raise ValueError(f"out must be given where x is not C-contiguous. Received: strides {view.strides}")
        step *= extent
