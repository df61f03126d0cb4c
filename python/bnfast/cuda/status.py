"""`status`: what CUDA there is for bnfast, and what is missing. `bnfast info` prints it."""

from __future__ import annotations

from typing import Any

from .. import _cuda
from . import compiler


def status() -> dict[str, Any]:
    """What bnfast.cuda finds on this machine. Never raises.

    Returns:
        driver: "13.0" or None; devices: a list of dicts (name, architecture, sms, l2_bytes, shared_bytes_per_block);
        nvrtc: "13.0 (path)" or None; cache: the folder of compiled kernels or None; missing: for everything that isn't
        there, why, and what brings it.

    Example:
        >>> import bnfast.cuda
        >>> sorted(bnfast.cuda.status())
        ['cache', 'devices', 'driver', 'missing', 'nvrtc']
    """
    facts: dict[str, Any] = {"driver": None, "devices": [], "nvrtc": None, "cache": None, "missing": []}
    missing: list[str] = facts["missing"]
    try:
        version = _cuda.driver_version()
        facts["driver"] = f"{version // 1000}.{version % 1000 // 10}"
        facts["devices"] = [_cuda.device(i) for i in range(_cuda.device_count())]
        compiler.find()
    except _cuda.CudaError as error:
        missing.append(str(error))
        version = 10**6  # no driver refuses a compiler
    try:
        path = compiler.library(version // 1000)
        if facts["driver"] is None and path is not None:
            _cuda.set_compiler_library(path)
        major, minor = _cuda.compiler_version()
        facts["nvrtc"] = f"{major}.{minor} ({path or 'found by the loader'})"
    except _cuda.CompilerError as error:
        missing.append(str(error).splitlines()[0])
    folder, reason = _cuda.cache_folder()
    facts["cache"] = folder or None
    if not folder:
        missing.append(f"no disk cache: {reason}")
    return facts
