"""Describes the machine of a run: processor, cores, caches, memory, versions; no name of a host, user or folder."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

import bnfast


def describe(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """The machine and the software as a JSON object. `versions` gives those of the libraries that are compared."""
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
        "others_busy": others_busy(),
        "compiler": info["compiler"],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
    }


def sentence(machine: dict[str, Any]) -> str:
    """The machine in one line, such as: AMD EPYC, 2 cores, L2 1 MiB, L3 32 MiB, avx512, 2 threads."""
    parts = [machine["cpu"], f"{machine['cores']} cores"]
    for name, key in (("L2", "l2_bytes"), ("L3", "l3_bytes")):
        if machine[key]:
            parts.append(f"{name} {machine[key] / 2**20:g} MiB")
    parts += [machine["isa"], f"{machine['threads']} threads"]
    return ", ".join(parts)


def load_sentence(machine: dict[str, Any]) -> str:
    """How busy the machine was before the run."""
    others = machine.get("others_busy")
    told = "" if others is None else f"; other programs kept {others:.1f} of {machine['cores']} processors busy"
    return f"Load before the run: {machine['load_before']}{told}"


def others_busy(seconds: float = 0.5) -> float | None:
    """How many processors the rest of the machine keeps busy now, stolen time included. None: /proc/stat isn't there.

    The load average would count what this user ran a minute ago.
    """
    try:
        before = _busy_ticks(), time.process_time()
        time.sleep(seconds)
        after = _busy_ticks(), time.process_time()
    except (OSError, ValueError):
        return None
    spent = (after[0] - before[0]) / os.sysconf("SC_CLK_TCK") - (after[1] - before[1])
    return round(max(spent, 0.0) / seconds, 2)


def _busy_ticks() -> int:
    """Of all processors since the start: user, nice, system, irq, softirq and steal; neither idle nor iowait."""
    name, *ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    if name != "cpu" or len(ticks) < 8:
        raise ValueError(f"/proc/stat starts with {name}")
    return sum(int(tick) for i, tick in enumerate(ticks[:8]) if i not in (3, 4))


def _field(path: Path, name: str) -> str:
    """The value of the first line that starts with `name`, in a file of lines "name: value"; "" if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
