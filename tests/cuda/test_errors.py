"""Every error of bnfast.cuda: it names the argument or the cause, and nothing is launched or changed."""

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import bnfast
import numpy as np
import pytest
from bnfast import _cuda, cuda
from bnfast.cuda import libraries
from fake_cuda import STREAM, DlpackArray, Driver, InterfaceArray, Namespace

X = np.arange(12, dtype="float32").reshape(4, 3)


@pytest.fixture
def on(interface: Namespace) -> dict[str, Any]:
    return {
        "x": interface.to(X),
        "C": interface.to(np.ones(3, "float32")),
        "D": interface.to(np.ones(3)),
        "elsewhere": interface.to(np.ones(3, "float32"), device=1),
        "half": interface.to(np.ones(3, "float16")),
        "four": interface.to(np.ones(4, "float32")),
        "other": interface.to(X.astype("float64")),
        "short": interface.to(X[:2]),
        "dy": interface.to(X + 1),
        "cube": interface.to(np.ones((2, 3, 4), "float32")),
        "columns": InterfaceArray(np.asfortranarray(X)),
    }


def with_x(interface: Namespace, array: np.ndarray, **kwargs: Any) -> Any:
    return InterfaceArray(array, **kwargs)


CASES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (
        lambda a: cuda.batch_norm_train(X),
        TypeError,
        "x must be on a CUDA device. Received: ndarray on DLPack device type 1",
    ),
    (lambda a: cuda.batch_norm_train([1.0]), TypeError, "x must be an array on a CUDA device: .*Received: list"),
    (lambda a: cuda.batch_norm_train(None), TypeError, "Received: NoneType"),
    (lambda a: cuda.batch_norm_train(a["x"], X[0]), TypeError, "gamma must be .*CUDA device"),
    (
        lambda a: cuda.batch_norm_train(a["x"], a["four"]),
        ValueError,
        r"gamma must have shape \(3,\) .*Received: \(4,\)",
    ),
    (
        lambda a: cuda.batch_norm_train(a["x"], a["half"]),
        TypeError,
        "gamma must be float32 or float64. Received: float16",
    ),
    (
        lambda a: cuda.batch_norm_train(a["x"], a["elsewhere"]),
        ValueError,
        "gamma must be on CUDA device 0, where x is. Received: device 1",
    ),
    (lambda a: cuda.batch_norm_train(a["x"], None, None, a["C"]), ValueError, "moving_mean without moving_variance"),
    (
        lambda a: cuda.batch_norm_train(a["x"], None, None, a["C"], a["C"]),
        ValueError,
        "moving_variance must be disjoint from every other array. Received: memory that moving_mean has, too",
    ),
    (lambda a: cuda.batch_norm_train(a["x"], a["C"], None, a["C"], a["D"]), ValueError, "memory that gamma has, too"),
    (
        lambda a: cuda.batch_norm_train(a["x"], residual=a["short"]),
        ValueError,
        r"residual must have the shape \(4, 3\)",
    ),
    (lambda a: cuda.batch_norm_train(a["x"], residual=a["other"]), TypeError, "residual must have the dtype float32"),
    (lambda a: cuda.batch_norm_train(a["x"], out=a["other"]), TypeError, "out must have the dtype float32 of x"),
    (
        lambda a: cuda.batch_norm_train(a["x"], residual=a["x"], out=a["x"]),
        ValueError,
        "out must be exactly x or disjoint",
    ),
    (lambda a: cuda.batch_norm_train(a["x"], axis=2), ValueError, r"axis must be in \[-2, 2\)"),
    (lambda a: cuda.batch_norm_train(a["x"], axis=1.0), TypeError, "axis must be an integer"),
    (lambda a: cuda.batch_norm_train(a["x"], axis=(0, 0)), ValueError, "axis must name each axis once"),
    (lambda a: cuda.batch_norm_train(a["x"], momentum=2), ValueError, r"momentum must be in \[0, 1\]. Received: 2"),
    (lambda a: cuda.batch_norm_train(a["x"], epsilon=-1), ValueError, "epsilon must be finite and at least 0"),
    (lambda a: cuda.batch_norm_train(a["x"], correction=2), ValueError, "correction must be 0"),
    (lambda a: cuda.batch_norm_train(a["x"], nan_policy="no"), ValueError, "nan_policy must be one of"),
    (lambda a: cuda.batch_norm_train(a["x"], activation="silly"), ValueError, "activation must be one of"),
    (lambda a: cuda.batch_norm_train(a["x"], activation="silu"), NotImplementedError, "on a CUDA device yet.*'silu'"),
    (
        lambda a: cuda.batch_norm_train(a["x"], mask=a["x"]),
        NotImplementedError,
        "mask is not supported on a CUDA device",
    ),
    (
        lambda a: cuda.batch_norm_grad(a["x"], a["x"], a["C"], a["C"], mask=1),
        NotImplementedError,
        "mask is not supported",
    ),
    (lambda a: cuda.moments(a["x"], mask=a["x"]), NotImplementedError, "mask is not supported"),
    (lambda a: cuda.batch_norm_infer(a["x"], None, a["C"]), TypeError, "moving_mean must be an array. Received: None"),
    (lambda a: cuda.batch_norm_grad(None, a["x"], a["C"], a["C"]), TypeError, "dy must be an array. Received: None"),
    (
        lambda a: cuda.batch_norm_grad(a["short"], a["x"], a["C"], a["C"]),
        ValueError,
        r"dy must have the shape \(4, 3\)",
    ),
    (
        lambda a: cuda.batch_norm_grad(a["x"], a["x"], a["C"], a["C"], residual=a["x"], y=a["x"]),
        ValueError,
        "residual and y must not be given both",
    ),
    (
        lambda a: cuda.batch_norm_grad(a["x"], a["x"], a["C"], a["C"], out_dresidual=a["x"]),
        ValueError,
        "out_dresidual must be None without",
    ),
    (
        lambda a: cuda.batch_norm_grad(a["x"], a["x"], a["C"], a["C"], residual=a["x"], out=a["x"]),
        ValueError,
        "out must be ",
    ),
    (
        lambda a: cuda.batch_norm_grad(a["dy"], a["x"], a["C"], a["C"], residual=a["x"], out=a["dy"]),
        ValueError,
        "out must not be dy without an activation: dresidual is dy itself",
    ),
    (
        lambda a: cuda.batch_norm_train(a["cube"], InterfaceArray(np.ones((4, 3), "float32").T), axis=(1, 2)),
        ValueError,
        r"gamma must be C-contiguous. Received: strides \(1, 3\)",
    ),
    (
        lambda a: cuda.batch_norm_train(a["columns"]),
        ValueError,
        r"out must be given where x is not C-contiguous. Received: strides \(1, 4\)",
    ),
    (lambda a: cuda.compile((4, 3), "int8"), ValueError, "dtype must be one of"),
    (lambda a: cuda.compile((4, -3)), ValueError, "shape must have extents >= 0"),
    (lambda a: cuda.compile((4, 3), device=5), ValueError, r"device must be in \[0, 2\). Received: 5"),
    (lambda a: cuda.compile((4, 3), calls=["fly"]), ValueError, "calls must be one of"),
    (lambda a: cuda.compile((4, 3), activation="mish"), NotImplementedError, "'mish'"),
]


@pytest.mark.parametrize(("call", "error", "text"), CASES, ids=range(len(CASES)))
def test_bad_arguments(
    call: Callable[..., Any],
    error: type[Exception],
    text: str,
    on: dict[str, Any],
    driver: Driver,
    interface: Namespace,
) -> None:
    before, launches = {name: interface.host(array).copy() for name, array in on.items()}, driver.launches
    allocations = driver.allocations
    with pytest.raises(error, match=text):
        call(on)
    assert (driver.launches, driver.allocations) == (launches, allocations)
    for name, array in before.items():
        np.testing.assert_array_equal(interface.host(on[name]), array)


@pytest.mark.usefixtures("driver")
def test_arrays_that_the_kernels_cannot_read(interface: Namespace, on: dict[str, Any]) -> None:
    wide = np.zeros((4, 6), "float32")
    with pytest.raises(ValueError, match=r"x must be contiguous, in any order of its axes.*with strides \(6, 2\)"):
        cuda.batch_norm_train(interface.to(wide).__class__(wide[:, ::2]))
    with pytest.raises(ValueError, match="gamma must be contiguous"):
        cuda.batch_norm_train(on["x"], InterfaceArray(np.ones(6, "float32")[::2]))
    with pytest.raises(ValueError, match="axis must name axes that lie side by side in memory"):
        cuda.batch_norm_train(interface.to(np.zeros((2, 3, 4), "float32")), axis=(0, 2))
    with pytest.raises(TypeError, match=r"x must be float32, float64, float16 or bfloat16. Received: typestr <i4"):
        cuda.batch_norm_train(interface.to(np.zeros((4, 3), "int32")))
    with pytest.raises(ValueError, match=r"x must have at least one axis. Received: shape \(\)"):
        cuda.batch_norm_train(interface.to(np.zeros((), "float32")))
    for name in ("out", "moving_mean"):
        locked = InterfaceArray(np.ones((4, 3) if name == "out" else 3, "float32"), read_only=True)
        kwargs = {"moving_variance": on["C"]} if name == "moving_mean" else {}
        with pytest.raises(ValueError, match=f"{name} must be writable. Received: a read-only array"):
            cuda.batch_norm_train(on["x"], **{name: locked}, **kwargs)
    host = InterfaceArray(X.copy())
    cuda.moments(host)
    Host = type("Host", (), {"__cuda_array_interface__": X.__array_interface__})
    with pytest.raises(
        TypeError, match=r"x must be on a CUDA device. Received: Host, whose pointer is not one of a device"
    ):
        cuda.moments(Host())
    Masked = type("Masked", (), {"__cuda_array_interface__": {**host.__cuda_array_interface__, "mask": host}})
    with pytest.raises(TypeError, match=r"x must have no mask\. Received: a masked __cuda_array_interface__"):
        cuda.moments(Masked())
    Stream = type("Stream", (), {"__module__": "numba.cuda.cudadrv.driver"})
    with pytest.raises(TypeError, match=r"x must be on a CUDA device\. Received: Stream"):
        cuda.moments(Stream())


def test_a_producer_that_fails(driver: Driver) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise BufferError("it is raining")

    for device, text in ((fail, r"x\.__dlpack_device__\(\) failed"), (lambda _: (2, 0), "x could not be read through")):
        Wet = type("Wet", (), {"__dlpack_device__": device, "__dlpack__": fail})
        with pytest.raises(TypeError, match=f"{text}.*: it is raining"):
            cuda.moments(Wet())


def test_a_bfloat16_result_has_dlpack_alone(dlpack: Namespace, bfloat16: Any) -> None:
    y = cuda.batch_norm_train(dlpack.to(X.astype(bfloat16))).y
    assert y.dtype == "bfloat16"
    assert y.__dlpack_device__() == (2, 0)
    with pytest.raises(AttributeError, match="__cuda_array_interface__ has no bfloat16; __dlpack__ does"):
        y.__cuda_array_interface__  # noqa: B018


def test_the_stream_of_torch_with_and_without_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of PyTorch for CUDA give the number."""
    torch = pytest.importorskip("torch")
    stream = SimpleNamespace(cuda_stream=5)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    for raw, wanted in ((None, 5), (lambda device: 7 + device, 8)):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", raw, raising=False)
        assert libraries.Torch(torch).stream(None, 1) == wanted


def test_which_compiler_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named; one of this process; those of NVIDIA's wheels; none that is newer than the driver."""
    monkeypatch.delenv("BNFAST_NVRTC", raising=False)
    nvidia: Any = ModuleType("nvidia")
    nvidia.__path__ = [os.fspath(tmp_path)]
    monkeypatch.setitem(sys.modules, "nvidia", nvidia)
    files = [tmp_path / "cu13" / "lib" / "libnvrtc.so.13", tmp_path / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"]
    for path in files:
        path.parent.mkdir(parents=True)
        path.touch()
    maps = (
        "7f00-7f01 r-xp 0 08:01 1 /opt/cuda/libnvrtc.so.13.0.48\n7f01-7f02 r-xp 0 08:01 2 /opt/cuda/libcudart.so.13\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self: maps)
    assert cuda.compiler.library(13) == "/opt/cuda/libnvrtc.so.13.0.48"
    assert cuda.compiler.library(12) == os.fspath(files[1])

    def unreadable(self: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert [cuda.compiler.library(major) for major in (13, 12, 11)] == [*map(os.fspath, files), None]
    monkeypatch.setenv("BNFAST_NVRTC", "/named/libnvrtc.so.99")
    assert cuda.compiler.library(11) == "/named/libnvrtc.so.99"


@pytest.mark.usefixtures("driver")
def test_torch_tensors(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    xp = Namespace("torch", monkeypatch, driver)
    with pytest.raises(TypeError, match=r"x must be on a CUDA device. Received: a torch tensor on cpu"):
        cuda.batch_norm_train(torch.ones(4, 3))
    with pytest.raises(TypeError, match=r"x must be detached.*Received: requires_grad=True"):
        cuda.batch_norm_train(xp.to(X).requires_grad_())
    with torch.no_grad():
        cuda.batch_norm_train(xp.to(X), xp.to(np.ones(3, "float32")).requires_grad_())
    with pytest.raises(TypeError, match=r"x must be float32, .*Received: int32"):
        cuda.batch_norm_train(xp.to(np.zeros((4, 3), "int32")))
    negated = torch._neg_view(xp.to(np.ones(1, "float32")))
    with pytest.raises(TypeError, match=r"gamma must be resolved by resolve_neg\(\)"):
        cuda.batch_norm_train(xp.to(X[:, :1]), negated)


def test_the_device_of_x_is_current_during_the_call_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    xp = Namespace("cupy", monkeypatch, driver)
    cuda.batch_norm_train(xp.to(X, device=1))
    assert (driver.device, driver.stream, driver.context) == (1, STREAM + 1, 0)
    driver.fail("cuLaunchKernelEx", 719)
    try:
        with pytest.raises(_cuda.CudaError, match="CUDA error 719"):
            cuda.batch_norm_train(xp.to(X, device=1))
    finally:
        driver.fail("cuLaunchKernelEx", 0)
    assert driver.context == 0


def test_the_stream_is_the_arrays(driver: Driver, interface: Namespace) -> None:
    x = interface.to(X)
    for stream, wanted in ((None, 0), (1, 0), (2, 2), (0xABC, 0xABC)):
        x.stream = stream
        cuda.batch_norm_train(x)
        assert driver.stream == wanted


def test_what_is_waited_for(driver: Driver, interface: Namespace) -> None:
    """Nothing on one stream; the other stream where arrays meet; the call's own for memory that is only lent."""
    x, gamma = interface.to(X), interface.to(np.ones(3, "float32"))
    before = driver.waits[0]
    y = cuda.batch_norm_train(x, gamma).y
    y.__dlpack__(stream=STREAM)
    y.__dlpack__(stream=-1)
    assert driver.waits[0] == before
    y.__dlpack__(stream=1)
    assert driver.waits == (before + 1, STREAM)
    gamma.stream = 0xABC
    cuda.batch_norm_train(x, gamma)
    assert driver.waits == (before + 2, 0xABC)
    lent = DlpackArray(X.copy())
    cuda.moments(lent)
    assert driver.waits == (before + 3, 0)
    cuda.batch_norm_train(x, residual=lent)
    assert driver.waits == (before + 5, STREAM)


def test_a_captured_stream_takes_calls_whose_kernels_are_loaded(driver: Driver, interface: Namespace) -> None:
    half = interface.to(X.astype("float16"))
    wide = interface.to(X.astype("float64"))
    driver.capture(STREAM, True)
    try:
        launches = driver.launches
        refused = None
        try:
            cuda.batch_norm_infer(wide, *[interface.to(np.ones(3))] * 2, activation="relu6")
        except _cuda.CudaError as error:
            refused = str(error)
        if refused is None:  # another test of this process has loaded these kernels
            assert driver.launches == launches + 2
        else:
            assert re.search(r"is being captured and bnfast_\w+_float64\w* is not loaded.*compile", refused)
            assert driver.launches == launches
        with pytest.raises(
            ValueError, match="nan_policy='raise' waits for the device, which a CUDA graph can't capture"
        ):
            cuda.batch_norm_train(half, nan_policy="raise")
    finally:
        driver.capture(STREAM, False)
    loaded = cuda.compile(X.shape, "float64", activation="relu6", calls=["infer"])
    assert loaded == [
        "bnfast_sweep_finalize_inference_float64 (fatbin)",
        "bnfast_sweep_apply_float64_relu (fatbin)",
    ]
    loaded = cuda.compile(X.shape, "float16", calls=["train"])
    assert loaded == ["bnfast_resident_train_float16_none (fatbin)"]
    launches = driver.launches
    driver.capture(STREAM, True)
    try:
        cuda.batch_norm_infer(wide, *[interface.to(np.ones(3))] * 2, activation="relu6")
        assert driver.launches == launches + 2
        cuda.batch_norm_train(half)
        assert driver.launches == launches + 3
    finally:
        driver.capture(STREAM, False)


def test_no_memory_is_left(driver: Driver, interface: Namespace) -> None:
    x = interface.to(X)
    driver.set_free_bytes(100)
    try:
        with pytest.raises(MemoryError, match=r"CUDA device 0 has no \d+ bytes left for an array of shape"):
            cuda.batch_norm_train(x, out=interface.to(X))
    finally:
        driver.set_free_bytes(1 << 40)
    driver.fail("cuLaunchKernelEx", 2)
    try:
        with pytest.raises(_cuda.CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            cuda.batch_norm_train(x)
    finally:
        driver.fail("cuLaunchKernelEx", 0)


@pytest.mark.parametrize("form", ["sweeps", "channel", "resident"])
def test_every_allocation_on_the_device_can_fail(
    driver: Driver, interface: Namespace, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first, the second, ...: each is a MemoryError that changes nothing and leaves nothing behind."""
    monkeypatch.setenv("BNFAST_CUDA_FORM", form)
    rng = np.random.default_rng(0)
    x, residual, dy = (interface.to(rng.normal(size=(6, 3, 50)).astype("float32")) for _ in range(3))
    moving = [interface.to(np.full(3, value, "float32")) for value in (0.25, 2)]

    def results() -> list[bytes]:
        train = cuda.batch_norm_train(
            x, None, None, *moving, axis=1, momentum=1.0, residual=residual, activation="relu"
        )
        grad = cuda.batch_norm_grad(dy, x, train.mean, train.invstd, axis=1, residual=residual, activation="relu")
        infer = cuda.batch_norm_infer(x, *moving, axis=1)
        moments = cuda.moments(x, axis=1)
        return [interface.host(array).tobytes() for array in (*train, *grad, infer, *moments[1:])]

    wanted, failed = results(), 0
    gc.collect()
    before = driver.allocations
    for k in range(100):
        driver.fail_allocation(k)
        try:
            assert results() == wanted
            break
        except MemoryError:
            failed += 1
        finally:
            driver.fail_allocation(-1)
        gc.collect()
        assert driver.allocations == before
        assert [interface.host(each)[0] for each in moving] == [0.25, 2]
        assert results() == wanted
    assert failed >= 13  # the results alone


def test_threads_share_the_kernels(interface: Namespace) -> None:
    x = interface.to(X)
    wanted = interface.host(cuda.batch_norm_train(x).y).tobytes()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(interface.host(cuda.batch_norm_train(x).y).tobytes()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * 8


def test_what_is_not_there_is_refused_by_name() -> None:
    for name in ("group_norm", "layer_norm", "weight_norm", "batch_norm_grad_grad"):
        assert hasattr(bnfast, name)
        with pytest.raises(
            AttributeError, match=rf"bnfast.cuda has no {name} yet; bnfast.{name} computes it on the CPU"
        ):
            getattr(cuda, name)
    with pytest.raises(AttributeError, match=r"module 'bnfast.cuda' has no attribute 'fly'"):
        cuda.fly  # noqa: B018


# ---- processes with another machine around them ----------------------------------------------------------------------

HEAD = """
import os, sys
import numpy as np
from bnfast import _cuda, cuda
class Array:
    def __init__(self, host):
        self.host = host
        self.__cuda_array_interface__ = dict(host.__array_interface__, version=3)
x = Array(np.ones((4, 3), "float32"))
def error(f):
    try:
        return f()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
"""


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """The output of a process of its own, with an empty cache folder."""
    env = {**os.environ, "XDG_CACHE_HOME": os.fspath(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake(path: Path) -> str:
    return f"""
import ctypes
_cuda._set_driver_library({os.fspath(path)!r})
fake = ctypes.CDLL({os.fspath(path)!r})
fake.fake_cuda_own(ctypes.c_void_p(x.host.ctypes.data), ctypes.c_size_t(x.host.nbytes), 0)
fake.fake_cuda_image.restype = ctypes.c_char_p
"""


def test_without_a_driver(tmp_path: Path) -> None:
    code = "_cuda._set_driver_library('/nowhere/libcuda.so.1')\n"
    out = run(code + "print(error(lambda: cuda.batch_norm_train(x)))\nprint(cuda.status())", tmp_path)
    first, second = out.splitlines()
    assert first.startswith("CudaError: no NVIDIA driver: /nowhere/libcuda.so.1")
    assert "'driver': None" in second
    assert "no NVIDIA driver" in second


def test_what_else_is_missing_without_a_driver(tmp_path: Path) -> None:
    code = "_cuda._set_driver_library('/nowhere/libcuda.so.1')\nprint(*cuda.status()['missing'], sep='\\n')"
    environment = {"BNFAST_NVRTC": "/nowhere/libnvrtc.so.13", "XDG_CACHE_HOME": "", "HOME": ""}
    first, second, third = run(code, tmp_path, **environment).splitlines()
    assert first.startswith("no NVIDIA driver: /nowhere/libcuda.so.1")
    assert second.startswith("NVRTC, which compiles CUDA kernels, was not found.")
    assert third == "no disk cache: neither XDG_CACHE_HOME nor HOME is an absolute path"


def test_kernels_that_lie_beside_the_module(tmp_path: Path, fake_library: Path) -> None:
    (tmp_path / "bnfast_cuda_float32.fatbin").write_bytes(b"an image")
    code = fake(fake_library) + f"_cuda.__file__ = {os.fspath(tmp_path / '_cuda.so')!r}\n"
    out = run(code + "print(cuda.compile((4, 3), calls=['moments']))", tmp_path, BNFAST_NVRTC="/nowhere/libnvrtc.so.13")
    assert out == "['bnfast_sweep_moments_float32 (fatbin)', 'bnfast_sweep_finalize_train_float32 (fatbin)']\n"


def test_without_a_device(tmp_path: Path, fake_library: Path) -> None:
    code = fake(fake_library) + "fake.fake_cuda_set_devices(0)\nprint(error(lambda: cuda.batch_norm_train(x)))"
    assert run(code, tmp_path) == "CudaError: cuInit failed: CUDA_ERROR_NO_DEVICE\n"


def test_without_a_compiler(tmp_path: Path, fake_library: Path) -> None:
    code = fake(fake_library) + "print(error(lambda: cuda.batch_norm_train(x)))\nprint(cuda.status()['missing'])"
    out = run(code, tmp_path, BNFAST_NVRTC="/nowhere/libnvrtc.so.13")
    assert out.startswith("CompilerError: NVRTC, which compiles CUDA kernels, was not found. pip install")
    assert out.count('pip install "bnfast[cuda]"') == 2


def test_nvrtc_compiles_once_and_then_the_cache_serves(tmp_path: Path, fake_library: Path) -> None:
    """The real compiler, where it is installed. What it makes is loaded by the fake and not run."""
    path = os.environ.get("BNFAST_NVRTC") or cuda.compiler.library(13)
    if path is None:
        pytest.skip("NVRTC is not installed")
    code = fake(fake_library) + "print(cuda.compile((4, 3), calls=['moments']), fake.fake_cuda_image()[1:4])"
    folder = tmp_path / "bnfast" / "cuda"
    for origin in ("NVRTC", "cache"):
        out = run(code, tmp_path, BNFAST_NVRTC=path)
        assert out == (
            f"['bnfast_sweep_moments_float32 ({origin})', 'bnfast_sweep_finalize_train_float32 ({origin})'] b'ELF'\n"
        )
    files = sorted(folder.iterdir())
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1])
    out = run(code, tmp_path, BNFAST_NVRTC=path)
    assert out.count("(NVRTC)") == out.count("(cache)") == 1


def test_importing_bnfast_loads_nothing_of_cuda(tmp_path: Path) -> None:
    code = (
        "import sys, bnfast; assert not [m for m in sys.modules if 'cuda' in m]; print(open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "libcuda" not in done.stdout
    assert "_cuda." not in done.stdout


def test_the_info_command_names_driver_devices_and_what_is_missing(tmp_path: Path, fake_library: Path) -> None:
    """The fake under the driver's own name, found by the loader."""
    (tmp_path / "libcuda.so.1").symlink_to(fake_library)
    environment = {"LD_LIBRARY_PATH": os.fspath(tmp_path), "BNFAST_NVRTC": "/nowhere/libnvrtc.so.13"}
    environment |= {"XDG_CACHE_HOME": os.fspath(tmp_path / "cache"), "BNFAST_BRIDGE": "numpy_function"}
    command = [sys.executable, "-m", "bnfast", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if line.startswith("CUDA"))
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["CUDA driver"] == "13.0"
    assert rows["CUDA devices"] == "0: Emulated device 0 (sm_90), 1: Emulated device 1 (sm_90)"
    assert rows["CUDA compiler"] == "none"
    assert rows["CUDA cache"] == os.fspath(tmp_path / "cache" / "bnfast" / "cuda")
    assert rows["CUDA is missing"].endswith('was not found. pip install "bnfast[cuda]" brings it.')
    assert not (tmp_path / "cache").exists(), "a report makes no folders"
