"""`bnfast info`: what was built, what runs on this machine, and why. `--json` gives the same as one JSON object."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from typing import Any

import bnfast

from ..tensorflow import op_library as _tf_library

PACKAGES = ("numpy", "ml_dtypes", "tensorflow", "keras")


def register(subparsers: Any) -> None:
    """Add `info` to the command line."""
    parser = subparsers.add_parser("info", help="version, instruction set, threads, caches, compiler")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report."""
    facts = gather()
    print(json.dumps(facts, indent=2, default=list) if arguments.json else describe(facts))
    return 0


def version() -> str:
    """The version of the core that is loaded."""
    return str(bnfast.build_info()["version"])


def gather() -> dict[str, Any]:
    """`bnfast.build_info()` with the interpreter, the platform and the packages bnfast can work with."""
    return {
        **bnfast.build_info(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "bridge": bridge(),
    }


def bridge() -> dict[str, str | None]:
    """How a Keras layer with `bridge="auto"` would reach the kernels, and why; no name where none would."""
    try:
        wanted = _tf_library.wanted()
    except ValueError as error:
        return {"name": None, "reason": str(error)}
    if wanted == "numpy_function":
        return {"name": wanted, "reason": "BNFAST_BRIDGE"}
    fits, reason = _tf_library.probe()
    if fits:
        return {"name": "op", "reason": reason}
    installed = importlib.util.find_spec("tensorflow") is not None
    return {"name": "numpy_function" if wanted == "auto" and installed else None, "reason": reason}


def package_version(module: str) -> str | None:
    """The version of the distribution that provides `module`, which is not imported; None where there is none.

    TensorFlow comes from distributions of several names (tensorflow, tensorflow-cpu, ...), hence the look-up by module.
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
        "available here": ", ".join(facts["isas"]),
        "threads": f"{facts['threads']} ({facts['threads_reason']})",
        "caches": ", ".join(f"{level} {_size(facts[key]) if facts[key] else 'unknown'}" for level, key in _CACHES),
        "output memory": f"{_size(memory['held_bytes'])} kept for reuse, of at most {_size(memory['limit_bytes'])}",
        "compiler": facts["compiler"],
        "flags": facts["flags"],
        "threads run by": facts["openmp"],
        "Keras bridge": f"{facts['bridge']['name'] or 'none'} ({facts['bridge']['reason']})",
    }
    rows |= {name: found or "not installed" for name, found in facts["packages"].items()}
    return "\n".join(f"{label:<16} {text}" for label, text in rows.items())


_CACHES = (("L1d", "l1d_bytes"), ("L2", "l2_bytes"), ("L3", "l3_bytes"))


def _size(count: int) -> str:
    """Bytes as people name caches: 48 KiB, 1 MiB, 1.5 MiB."""
    return f"{count / 2**20:g} MiB" if count >= 2**20 else f"{count / 2**10:g} KiB"
