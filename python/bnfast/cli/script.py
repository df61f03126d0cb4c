"""A script or module run as under `python SCRIPT ARGS`: as __main__, with its own sys.argv, sys.path[0], tracebacks and
exit status.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bnfast.cli.errors import UserError


def load(command: list[str], *, module: bool, safe_path: bool = False) -> tuple[ModuleType, CodeType]:
    """A new __main__ module for the script or module `command[0]`, and its code. Sets sys.argv, and sys.path[0] unless
    `safe_path` (python -P searches no such folder)."""
    try:
        return (_load_module if module else _load_script)(command, safe_path)
    except FileNotFoundError as error:  # os.getcwd
        raise UserError("run: the working directory was deleted") from error


def execute(module: ModuleType, code: CodeType) -> int:
    """Run the code as __main__ and return the exit status. A SystemExit of the script passes through."""
    try:
        enter(module, code)
    except SystemExit:
        raise
    except BaseException as error:
        traceback = error.__traceback__
        for _ in range(2):  # past this frame and that of `enter`, so that it starts in the script
            traceback = traceback.tb_next if traceback else None
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def enter(module: ModuleType, code: CodeType) -> None:
    """Run the code as __main__. It stays __main__ until the process ends, since pickle, atexit and threads need it."""
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _load_script(command: list[str], safe_path: bool) -> tuple[ModuleType, CodeType]:
    path = Path(command[0]).absolute()  # as in Python's tracebacks; sys.argv keeps the path as given
    sys.argv[:] = command
    spec = importlib.machinery.PathFinder.find_spec("__main__", [str(path)])
    if spec is not None:  # a folder or a zip file with a __main__.py
        _set_search_folder(str(path), safe_path)
        return _from_spec(spec)
    _set_search_folder(str(path.resolve().parent), safe_path)
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(path), __cached__=None, __builtins__=builtins)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(path))
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"run: can't open {command[0]}: {error.strerror}") from error
    with _script_errors():
        return module, compile(source, str(path), "exec", dont_inherit=True)


def _load_module(command: list[str], safe_path: bool) -> tuple[ModuleType, CodeType]:
    """The same for `python -m NAME`; the code of a package is its __main__."""
    name = command[0]
    _set_search_folder(str(Path.cwd()), safe_path)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"run: no module named {command[0]} ({error})") from error
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise UserError(f"run: no module named {name}")
    sys.argv[:] = [spec.origin or name, *command[1:]]
    return _from_spec(spec)


def _from_spec(spec: importlib.machinery.ModuleSpec) -> tuple[ModuleType, CodeType]:
    loader: Any = spec.loader
    module = ModuleType("__main__")
    module.__dict__.update(__file__=spec.origin, __cached__=spec.cached, __builtins__=builtins)
    module.__spec__, module.__loader__, module.__package__ = spec, loader, spec.parent
    with _script_errors():
        code = loader.get_code(spec.name)
    if code is None:  # a module of C, such as sys
        raise UserError(f"run: {spec.name} has no Python code")
    return module, code


def _set_search_folder(folder: str, safe_path: bool) -> None:
    """Make `folder` the first place that imports search, instead of the folder of `bnfast` itself."""
    if not safe_path:
        sys.path[0] = folder


@contextlib.contextmanager
def _script_errors() -> Iterator[None]:
    """Shows an error in the script's syntax as Python does, and ends the process with Python's status."""
    try:
        yield
    except (SyntaxError, ValueError) as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        raise SystemExit(1) from None
