"""What the figures were measured on: processor, cores, caches, memory, versions. No name of a host, user or folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

import bnfast


def describe(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """The machine and the software as one JSON object."""
    info = bnfast.build_info()
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "isa": info["isa"],
        "l1d_bytes": info["l1d_bytes"],
        "l2_bytes": info["l2_bytes"],
        "l3_bytes": info["l3_bytes"],
        "memory": _field(Path("/proc/meminfo"), "MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "compiler": info["compiler"],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
    }


def sentence(machine: dict[str, Any]) -> str:
    """One line for people: AMD EPYC, 2 cores, L2 1 MiB a core, L3 32 MiB, AVX-512, 2 threads."""
    caches = ", ".join(f"{name} {machine[key] / 2**20:g} MiB" for name, key in _CACHES if machine[key])
    parts = [machine["cpu"], f"{machine['cores']} cores", caches, machine["isa"], f"{machine['threads']} threads"]
    return ", ".join(part for part in parts if part)


_CACHES = (("L2", "l2_bytes"), ("L3", "l3_bytes"))


def _field(path: Path, name: str) -> str:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
