"""`bnfast info`: how bnfast was built, what it uses on this machine, and why. `--json` prints one JSON object."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import bnfast
from bnfast.cli.output import show
from bnfast.tensorflow import op_library

CACHES = (("L1d", "l1d_bytes"), ("L2", "l2_bytes"), ("L3", "l3_bytes"))
PACKAGES = ("numpy", "ml_dtypes", "tensorflow", "keras")


def register(subparsers: Any) -> None:
    """Add `info` to the command line."""
    parser = subparsers.add_parser("info", help="version, instruction set, threads, caches, compiler")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    facts = gather()
    show(json.dumps(facts, indent=2, default=list) if arguments.json else describe(facts))
    return 0


def version() -> str:
    """The version of the loaded C++ core."""
    return str(bnfast.build_info()["version"])


def gather() -> dict[str, Any]:
    """`bnfast.build_info()`, and the interpreter, the platform, the packages bnfast works with, the Keras bridge."""
    return {
        **bnfast.build_info(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "bridge": bridge(),
        "cuda": cuda(),
    }


def cuda() -> dict[str, Any] | None:
    """`bnfast.cuda.status()`; None where bnfast.cuda was not built."""
    try:
        from bnfast.cuda import status
    except ImportError:
        return None
    return status()


def bridge() -> dict[str, str | None]:
    """How a Keras layer with `bridge="auto"` reaches the kernels, and why. The name is None if it cannot."""
    try:
        wanted = op_library.wanted()
    except ValueError as error:
        return {"name": None, "reason": str(error)}
    if wanted in ("numpy_function", "tensorflow"):
        return {"name": wanted, "reason": "BNFAST_BRIDGE"}
    if wanted == "auto" and (gpus := op_library.gpus()):
        return {"name": "tensorflow", "reason": f"TensorFlow sees {gpus}, where bnfast's kernels can't run"}
    fits, reason = op_library.probe()
    if fits:
        return {"name": "op", "reason": reason}
    installed = importlib.util.find_spec("tensorflow") is not None
    return {"name": "numpy_function" if wanted == "auto" and installed else None, "reason": reason}


def package_version(module: str) -> str | None:
    """The version of the distribution that provides `module`, or None if there is none. Does not import the module.

    It searches by module because TensorFlow's distribution has several names (tensorflow, tensorflow-cpu, ...).
    """
    if importlib.util.find_spec(module) is None:
        return None
    for name in importlib.metadata.packages_distributions().get(module, ()):
        return importlib.metadata.version(name)
    return "unknown"


def describe(facts: dict[str, Any]) -> str:
    """The report as aligned lines of text."""
    memory = facts["memory"]
    rows = {
        "version": f"{facts['version']} (Python {facts['python']}, {facts['platform']})",
        "instruction set": f"{facts['isa']} ({facts['isa_reason']})",
        "also supported": ", ".join(isa for isa in facts["isas"] if isa != facts["isa"]) or "none",
        "threads": f"{facts['threads']} ({facts['threads_reason']})",
        "caches": ", ".join(f"{level} {_size(facts[key]) if facts[key] else 'unknown'}" for level, key in CACHES),
        "output memory": f"{_size(memory['held_bytes'])} kept for reuse, at most {_size(memory['limit_bytes'])}",
        "compiler": facts["compiler"],
        "flags": facts["flags"],
        "threading": facts["threading"],
        "Keras bridge": f"{facts['bridge']['name'] or 'none'} ({facts['bridge']['reason']})",
    }
    rows |= _cuda_rows(facts["cuda"])
    rows |= {name: found or "not installed" for name, found in facts["packages"].items()}
    return "\n".join(f"{label:<16} {text}" for label, text in rows.items())


def _cuda_rows(facts: dict[str, Any] | None) -> dict[str, str]:
    if facts is None:
        return {"CUDA": "not built (it is built on Linux alone)"}
    if not facts["driver"]:  # most machines; --json has what else is missing
        return {"CUDA": "none (no NVIDIA driver)"}
    devices = [f"{i}: {each['name']} (sm_{each['architecture']})" for i, each in enumerate(facts["devices"])]
    rows = {
        "CUDA driver": facts["driver"],
        "CUDA devices": ", ".join(devices) or "none",
        "CUDA compiler": f"NVRTC {facts['nvrtc']}" if facts["nvrtc"] else "none",
        "CUDA cache": facts["cache"] or "none",
    }
    return rows | ({"CUDA is missing": "; ".join(facts["missing"])} if facts["missing"] else {})


def _size(count: int) -> str:
    """A number of bytes in the usual unit: 48 KiB, 1.5 MiB, 5.89 GiB."""
    if count >= 2**30:
        return f"{count / 2**30:.3g} GiB"
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"
