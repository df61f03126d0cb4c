"""Starts a Python process that imports the same modules as this one, and nothing from the working directory.

`python -c` and `python -m` search the working directory first: a `ctypes.py` or `json.py` that lies there would be
executed. Here the interpreter runs with -P (-I, if this one runs with it) and gets sys.path from this process, without
the entry "" that stands for the working directory. The package bnfast is loaded from the files that run here, however
they were found (a folder in PYTHONPATH, an installed package, an editable installation's finder).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Mapping

__all__ = ["run", "run_module"]

_PRELUDE = """
import sys
sys.path[:] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location("bnfast", {file!r}, submodule_search_locations={folders!r})
sys.modules["bnfast"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""


def run(
    code: str, *arguments: str, folder: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` with sys.argv[1:] = arguments, and bnfast imported. It reads nothing from stdin; its output is kept.
    `folder` is its working directory (None: this one's), `environment` is added to this process's.

    Raises OSError if no process can be started.
    """
    if not sys.executable:
        raise OSError(errno.ENOENT, "the path of the Python interpreter is unknown")
    package = sys.modules["bnfast"]
    path = [folder for folder in sys.path if folder]
    prelude = _PRELUDE.format(path=path, file=package.__file__, folders=list(package.__path__))
    command = [sys.executable, *_flags(), "-c", prelude + code, *arguments]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
        env={**os.environ, **(environment or {})},
    )


def run_module(
    name: str, *arguments: str, folder: str | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `main(arguments)` of the module `name`, one of bnfast's, and exit with what it returns."""
    code = f"from {name} import main\nsys.exit(main(sys.argv[1:]))\n"
    return run(code, *arguments, folder=folder, environment=environment)


def _flags() -> list[str]:
    """The child trusts the environment and the user's site-packages exactly as this process does."""
    if sys.flags.isolated:
        return ["-I"]
    inherited = {"-E": sys.flags.ignore_environment, "-s": sys.flags.no_user_site}
    return ["-P", *(flag for flag, is_set in inherited.items() if is_set)]
