"""A script for test_allocations.py: fails every allocation of a call, once and all from the k-th on.

It runs with csrc/tests/failing_malloc.cpp as LD_PRELOAD, and for the functions of `_core` and `_cuda` with
PYTHONMALLOC=malloc, so that Python's objects count too. A call may raise MemoryError, having written nothing, or
succeed with the right bits, and the next call must succeed with the right bits. The allocations of NumPy and of the
CUDA driver (those whose nearest frame in a watched library lies there) succeed and are counted. Python's own, in Python
functions, are left alone: where they fail, PyContextVar_Set of CPython 3.11, which np.errstate calls, dereferences a
null pointer.

    python allocations.py LIBRARY NAME...    the functions to call; prints a line of JSON for each
    python allocations.py LIBRARY cuda DRIVER IMAGES    those of `_cuda` with that driver and folder of images
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import bnfast
import numpy as np
from bnfast import _core

MOST = 4000  # allocations per call: more is no end
ALIVE: list[np.ndarray] = []  # those that calls know by their address
EXEMPT = ("/numpy/", "/libcuda-")  # in the paths of libraries whose allocations succeed


class Case(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    written: tuple[np.ndarray, ...] = ()  # arrays whose addresses stand in `arguments`
    first: bool = False  # the first call loads something: no call succeeds before


Cases = dict[str, Case]


def core() -> Cases:
    """Functions of `_core`."""
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, 300, 24)).astype("float32")
    gamma, beta = np.full(24, 2, "float32"), np.ones(24, "float32")
    mean, variance = np.zeros(24), np.ones(24)
    mask = np.ones(300, "float32")
    groups = rng.standard_normal((5, 6, 24)).astype("float32")
    group_mean, row_mean = np.zeros((5, 4)), np.zeros((5, 6))
    moving = np.zeros((2, 24))
    relu, none = "relu", None
    train = (x, gamma, beta, none, none, -1, 0.5, 1e-3, mask, relu, 0.2, residual, 0, "propagate", none)
    grad = (dy, x, mean, variance, gamma, beta, -1, mask, relu, 0.2, residual, none, True, none, none, none, none)
    infer = (x, mean, variance, gamma, beta, -1, 1e-3, "silu", 0.2, residual, none)
    callback = _core.Callback(
        "train",
        ["x", "gamma", "beta", "moving_mean", "moving_variance"],
        dict(
            axis=-1,
            momentum=0.5,
            epsilon=1e-3,
            negative_slope=0.2,
            correction=0,
            nan_policy="propagate",
            activation="relu",
        ),
        print,
    )
    grad_callback = _core.Callback(
        "grad", ["dy", "x", "mean", "invstd", "gamma"], dict(axis=-1, negative_slope=0.2, training=True), print
    )
    nan = x.copy()
    nan[3, 4] = np.nan
    raising = (nan, gamma, beta, none, none, -1, 0.5, 1e-3, none, none, 0.2, none, 0, "raise", none)
    calls = {
        "train": (_core.train, train),
        "train, moving": (_core.train, (*train[:3], *moving, *train[5:])),
        "train, non-finite": (_core.train, raising),
        "train, declined": (_core.train, (x[:, ::2], *train[1:])),
        "infer": (_core.infer, infer),
        "grad": (_core.grad, grad),
        "grad, no activation": (_core.grad, (*grad[:8], none, *grad[9:])),
        "moments": (_core.moments, (x, -1, mask)),
        "group_norm": (_core.group_norm, (groups, 4, gamma, beta, -1, 1e-3, relu, 0.2, none, none)),
        "group_norm_grad": (
            _core.group_norm_grad,
            (groups, groups, group_mean, group_mean + 1, 4, gamma, beta, -1, relu, 0.2, groups * 2, none, none),
        ),
        "layer_norm": (_core.layer_norm, (groups, gamma, beta, -1, 1e-3, relu, 0.2, none, none)),
        "layer_norm_grad": (
            _core.layer_norm_grad,
            (groups, groups, row_mean, row_mean + 1, gamma, beta, -1, relu, 0.2, none, none, none),
        ),
        "Callback, train": (callback, (x, gamma, beta, *moving)),
        "Callback, grad": (grad_callback, (dy, x, mean, variance, gamma)),
        "Callback()": (lambda: type(_core.Callback("train", ["x", "gamma"], {"axis": -1}, print)).__name__, ()),
        "Callback(), a bad name": (_core.Callback, ("train", ["x", "delta"], {"axis": -1}, print)),
        "empty": (lambda: _core.empty((30, 20), np.dtype("float32")).shape, ()),
        "settings": (
            lambda: [
                _core.set_memory_limit(1 << 30),
                _core.clear_memory(),
                _core.set_num_threads(2),
                _core._last_run(),
            ],
            (),
        ),
        "build_info": (lambda: {k: v for k, v in _core.build_info().items() if k != "memory"}, ()),
    }
    return {name: Case(*call) for name, call in calls.items()}


def public() -> Cases:
    """Functions of the Python API. Of Python's own allocations those above 512 bytes count."""
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 300, 24)).astype("float32")
    groups = rng.standard_normal((5, 6, 24)).astype("float32")
    gamma, beta = np.full(24, 2, "float32"), np.ones(24, "float32")
    result = bnfast.batch_norm_train(x, gamma, beta)
    v, g = rng.standard_normal((7, 24)), np.ones(24)
    calls = {
        "batch_norm_train": (bnfast.batch_norm_train, (x.astype("float64"), gamma)),
        "batch_norm_infer": (bnfast.batch_norm_infer, (x, result.mean, result.variance)),
        "batch_norm_grad": (bnfast.batch_norm_grad, (dy, x, result.mean, result.invstd, gamma)),
        "batch_norm_grad_grad": (bnfast.batch_norm_grad_grad, (dy, dy, x, result.mean, result.invstd, gamma)),
        "moments, public": (bnfast.moments, (x,)),
        "weight_norm": (bnfast.weight_norm, (v, g)),
        "weight_norm_grad": (bnfast.weight_norm_grad, (v, v, g)),
        "group_norm, public": (bnfast.group_norm, (groups, 4)),
        "layer_norm, public": (bnfast.layer_norm, (groups,)),
        "instance_norm": (bnfast.instance_norm, (groups,)),
        "BatchNormalization": (lambda: bnfast.BatchNormalization()(x, training=True), ()),
    }
    return {name: Case(*call) for name, call in calls.items()}


def cuda(driver: str, images: str) -> Cases:
    """Functions of `_cuda`, on host memory that passes for a device's."""
    from bnfast import _cuda

    ctypes.CDLL(driver)  # now, so that Library knows its addresses
    _cuda._set_driver_library(driver)
    _cuda.set_image_folder(images)
    rng = np.random.default_rng(2)

    def at(array: np.ndarray) -> int:
        ALIVE.append(array)
        return int(array.__array_interface__["data"][0])

    scratch = np.zeros(1 << 20, "uint8")
    aligned = -(-at(scratch) // 256) * 256
    place = (0, 0, partial(max, aligned))  # of a number of bytes, in C
    capsule = _cuda.make_dlpack(scratch, aligned, [3, 4], 2, 32, 0)
    cases = {}
    for code, dtype in enumerate(("float32", "float64")):
        x, dy, residual = rng.standard_normal((3, 300, 24)).astype(dtype)
        y, dx, dresidual, vectors, moving = x * 0, x * 0, x * 0, np.zeros((6, 24)), np.ones((2, 24))
        mean, variance, invstd, ones, dgamma, dbeta = ((at(row), True) for row in vectors)
        vectors[2:4] = 1
        shape, written = (300, 24, 1), (y, dx, dresidual, vectors, moving)
        old_mean, old_variance = ((at(row), True) for row in moving)
        train = (*place, at(x), at(y), at(residual), shape, code, ones, None, old_mean, old_variance, 0.5, 1e-3)
        train += (1, 0.2, 0, False, mean[0], variance[0], invstd[0])
        infer = (*place, at(x), at(y), 0, shape, code, old_mean, old_variance, ones, None, 1e-3, 1, 0.2)
        grad = (*place, at(dy), at(x), at(dx), at(residual), 0, at(dresidual), shape, code, mean, invstd, ones)
        grad += (None, 1, 0.2, True, None, None, dgamma, dbeta)
        for function, arguments in ((_cuda.train, train), (_cuda.infer, infer), (_cuda.grad, grad)):
            name = f"_cuda.{function.__name__}, {dtype}"
            cases[f"{name}, first"] = Case(function, arguments, written, first=True)
            cases[name] = Case(function, arguments, written)
    cases["_cuda.moments"] = Case(_cuda.moments, (*place, at(x), shape, 1, mean[0], variance[0]), written)
    cases["_cuda.read"] = Case(_cuda.read, (0, at(x), 800, 0))
    cases["_cuda.write"] = Case(_cuda.write, (0, at(y), b"\1" * 800, 0), (y,))
    cases["_cuda.device"] = Case(_cuda.device, (0,))
    cases["_cuda.load"] = Case(_cuda.load, (0, 1, shape, 1, 0, 0.2))
    # Its address may be another each time.
    cases["_cuda.allocate"] = Case(lambda: len(_cuda.allocate(0, 800, 0)), ())
    cases["_cuda.read_dlpack"] = Case(_cuda.read_dlpack, (capsule,))
    cases["_cuda.make_dlpack"] = Case(_cuda.make_dlpack, (scratch, aligned, [3, 4], 2, 32, 0))
    return cases


def bits(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return value if isinstance(value, int | float | str | dict | None) else type(value)


class Library:
    """The preloaded allocator."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.PyDLL(path)
        pointer = ctypes.c_void_p
        self.live = self._library.failing_malloc_live
        self.live.restype = ctypes.c_long
        self._exempted = self._library.failing_malloc_exempted
        self._exempted.restype = ctypes.c_long
        self._seen = self._library.failing_malloc_disarm
        self._seen.restype = ctypes.c_long
        self._call = self._library.failing_malloc_call
        self._call.restype = ctypes.py_object
        self._call.argtypes = [pointer, ctypes.py_object, ctypes.py_object, pointer, ctypes.c_long, ctypes.c_int]
        self._object_call = ctypes.cast(ctypes.pythonapi.PyObject_Call, pointer)
        with open("/proc/self/maps") as maps:
            for line in maps:
                words = line.split()
                if "x" not in words[1] or len(words) < 6:
                    continue
                exempt = any(part in words[5] for part in EXEMPT)
                if exempt or "/_core." in words[5] or "/_cuda." in words[5]:
                    begin, end = (ctypes.c_size_t(int(word, 16)) for word in words[0].split("-"))
                    assert self._library.failing_malloc_range(begin, end, int(exempt))

    def call(self, f: Callable[..., Any], arguments: tuple[Any, ...], k: int, fail_all: bool) -> Any:
        return self._call(self._object_call, f, arguments, None, k, int(fail_all))

    def counts(self) -> tuple[int, int]:
        """The allocations of the last call, and those of NumPy."""
        return self._seen(), self._exempted()


def attempt(call: Callable[[], Any]) -> Any:
    """The bits of the result, MemoryError, or the text of another error."""
    try:
        return bits(call())
    except MemoryError:
        return MemoryError
    except (TypeError, ValueError, FloatingPointError) as error:  # what this call raises with memory, too
        return str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def sweep(library: Library, case: Case, fail_all: bool) -> dict[str, Any]:
    f, arguments, written, first = case
    kept = [(one, one.copy()) for one in (*arguments, *written) if isinstance(one, np.ndarray)]

    def anew(call: Callable[[], Any]) -> Any:
        """What the call returns and writes, or its error. "changed" after a MemoryError that wrote something."""
        for one, before in kept:
            one[...] = before
        result = attempt(call)
        if result is MemoryError:
            return "changed" if any(one.tobytes() != before.tobytes() for one, before in kept) else result
        return result, bits(written)

    expected = None if first else anew(lambda: f(*arguments))
    found = {"k": 0, "MemoryError": 0, "succeeded": 0, "wrong": [], "exempt": 0}
    results = []
    for k in range(1, MOST):
        result = anew(partial(library.call, f, arguments, k, fail_all))
        seen, found["exempt"] = library.counts()
        results.append(result)
        if not first and anew(lambda: f(*arguments)) != expected:
            found["wrong"].append([k, "the next call has other bits"])
        if seen < k:
            break
        found["k"] = k
    else:
        found["wrong"].append([MOST, "no end"])
    expected = expected or anew(lambda: f(*arguments))
    found["MemoryError"] = results.count(MemoryError)
    found["succeeded"] = results.count(expected)
    found["wrong"] += [
        [k, str(result)[:200]] for k, result in enumerate(results, 1) if result not in (MemoryError, expected)
    ]
    return found


def main(path: str, names: list[str]) -> None:
    _core._set_serial_bytes(0)
    bnfast.set_num_threads(2)
    on_device = names[:1] == ["cuda"]
    cases = cuda(*names[1:]) if on_device else core() | public()
    library = Library(path)
    for name, case in cases.items():
        if not on_device and name not in names:
            continue
        for fail_all in (False, True):
            print(json.dumps({"begins": name, "all": fail_all}), flush=True)
            lost = []
            while len(lost) < 12:  # Python's and NumPy's caches fill up at first; what is lost is lost every time
                gc.collect()
                before = library.live()
                found = sweep(library, case, fail_all)
                gc.collect()
                lost.append(library.live() - before)
                if case.first or lost[-1] < max(2, found["k"] // 4):
                    break
            print(json.dumps(found | {"name": name, "all": fail_all, "first": case.first, "lost": lost}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
