"""The file of the TensorFlow op, bnfast/_tf.so: where it lies, whether it is whole, whether a TensorFlow can load it;
and whether it is wanted. It is built on Linux alone. Nothing here imports TensorFlow; `bnfast.tensorflow.op` does.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
from pathlib import Path

from .. import _child_process

PATH = Path(__file__).parents[1] / "_tf.so"  # beside _core, where CMake installs it
BRIDGES = ("auto", "numpy_function", "op", "tensorflow")

# Arguments: TensorFlow's library, ours. A process of its own: whatever is wrong with them can end no other.
_PROBE = """
import ctypes
from bnfast import _core
framework, op = sys.argv[1:]
try:
    libraries = [ctypes.CDLL(framework), ctypes.CDLL(op)]
    print(_core._connect_tf(op))
except OSError as error:
    print(error)
"""


# Prints the GPUs that TensorFlow sees.
_GPUS = """
import tensorflow as tf
print(*(device.name.rpartition("device:")[2] for device in tf.config.list_physical_devices("GPU")), sep=", ")
"""
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd")  # NVIDIA's, AMD's


def gpus() -> str:
    """The names of the GPUs that the installed TensorFlow sees, "" for none. Asks in a process of its own, which takes
    seconds, and only where a GPU's driver is."""
    if not any(os.path.exists(path) for path in _DRIVERS) or importlib.util.find_spec("tensorflow") is None:
        return ""
    try:
        result = _child_process.run(_GPUS)
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def wanted(bridge: str = "auto") -> str:
    """The bridge to try first: the environment's BNFAST_BRIDGE decides for "auto". ValueError for any other word."""
    if bridge not in BRIDGES:
        raise ValueError(f"bridge must be one of {BRIDGES}. Received: {bridge!r}")
    if bridge != "auto":
        return bridge
    named = os.environ.get("BNFAST_BRIDGE") or "auto"
    if named not in BRIDGES:
        raise ValueError(f"BNFAST_BRIDGE must be one of {BRIDGES}. Received: {named!r}")
    return named


def defect(path: Path | None = None) -> str:
    """Why the file can't be loaded by anyone, or "". A truncated library passes dlopen and ends the process later."""
    path = path or PATH
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return f"{path} is not there" + ("" if sys.platform == "linux" else " (it is built on Linux alone)")
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    if len(data) < 64 or data[:6] != b"\x7fELF\x02\x01":
        return f"{path} is not a 64-bit ELF library"
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    if size < 56 or table + size * count > len(data):
        return f"{path} is truncated"
    for i in range(count):
        kind, _, offset, _, _, in_file = struct.unpack_from("<IIQQQQ", data, table + i * size)
        if kind == 1 and offset + in_file > len(data):  # PT_LOAD: mapped, and touched beyond the file's end
            return f"{path} is truncated"
    return ""


def probe() -> tuple[bool, str]:
    """Whether the installed TensorFlow's library and ours fit, and why (not); TensorFlow itself is not imported."""
    found = importlib.util.find_spec("tensorflow")
    if found is None or not found.submodule_search_locations:
        return False, "TensorFlow is not installed"
    reason = defect()
    if reason:
        return False, reason
    framework = Path(found.submodule_search_locations[0]) / "libtensorflow_framework.so.2"
    if not framework.exists():
        return False, f"{framework} is not there"
    try:
        result = _child_process.run(_PROBE, os.fspath(framework), os.fspath(PATH))
    except OSError as error:
        return False, f"no process could be started to test {PATH.name}: {error.strerror}"
    reason = (result.stdout if result.returncode == 0 else result.stderr or f"status {result.returncode}").strip()
    if reason:
        return False, reason.splitlines()[-1]
    return True, f"{PATH.name} fits the installed TensorFlow"
