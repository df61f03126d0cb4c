"""`bnfast run SCRIPT [ARGS]`: runs an unmodified Keras script with bnfast's batch norm in place of Keras's.

The script runs as under `python SCRIPT ARGS`: as __main__, with its own sys.argv, sys.path[0], tracebacks and exit
status. Keras is patched right after the script has imported it, not earlier. So environment variables that the script
sets first (KERAS_BACKEND, TF_CPP_MIN_LOG_LEVEL, CUDA_VISIBLE_DEVICES) still count, and a script without Keras does not
pay for its import. bnfast writes only to stderr: one line at the start and a summary at the end.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bnfast.cli import tf_layers
from bnfast.cli.errors import UserError, require
from bnfast.cli.output import say, show

USAGE = "bnfast run [--quiet | --no-summary] (SCRIPT | -m MODULE) [ARGS ...]"
HELP = f"""usage: {USAGE}

Run a Python script or module with bnfast's batch norm in place of keras.layers.BatchNormalization.

options:
  -h, --help    show this help message and exit
  -m MODULE     run a module, as python -m does
  --no-summary  don't print the summary at the end
  --quiet       print neither the line at the start nor the summary

Only this process and its forks use bnfast. Processes that the script starts anew, such as those that multiprocessing
spawns, use Keras's own layer.
"""


# multiprocessing imports one of these when it starts its first process that is not a fork.
STARTERS = (
    "multiprocessing.popen_spawn_posix",
    "multiprocessing.popen_spawn_win32",
    "multiprocessing.popen_forkserver",
)


def register(subparsers: Any) -> None:
    """Add `run` to the command line. Its own options end where the script begins, so `run` parses them itself."""
    # No argument can start with "\0", so argparse finds no options and passes on all arguments.
    parser = subparsers.add_parser(
        "run", help="run a Keras script with bnfast's batch norm", prefix_chars="\0", add_help=False
    )
    parser.add_argument("command_line", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the script and return the exit status. A SystemExit of the script passes through."""
    options, command = _split(arguments.command_line)
    if "-h" in options or "--help" in options:
        show(HELP.removesuffix("\n"))
        return 0
    if not command:
        raise UserError(f"run: a script or -m MODULE is needed. usage: {USAGE}")
    other = os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow"
    require(*([] if other else ["tensorflow"]), "keras", extra="keras")
    try:
        module, code = _load_module(command) if "-m" in options else _load_script(command)
    except FileNotFoundError as error:  # os.getcwd
        raise UserError("run: the working directory was deleted") from error
    watcher = _PatchOnImport()
    sys.meta_path.insert(0, watcher)
    if "--quiet" not in options:
        say(f"bnfast: running {command[0]} with bnfast's batch norm in place of Keras's")
        if "--no-summary" not in options:
            atexit.register(_print_summary, watcher, os.getpid())
    return _execute(module, code)


def _print_summary(watcher: _PatchOnImport, process: int) -> None:
    if os.getpid() == process:  # a forked child that ends by sys.exit runs its parent's exit functions, too
        say(watcher.summary())


def _split(command_line: Sequence[str]) -> tuple[set[str], list[str]]:
    """The options of `bnfast run`, and the command: the script or module name with its own arguments."""
    options: set[str] = set()
    for index, argument in enumerate(command_line):
        if not argument.startswith("-") or argument == "-":
            return options, list(command_line[index:])
        if argument == "--":
            return options, list(command_line[index + 1 :])
        if argument not in ("-h", "--help", "--quiet", "--no-summary", "-m"):
            raise UserError(f"run: unknown option {argument}. usage: {USAGE}")
        options.add(argument)
        if argument == "-m":
            return options, list(command_line[index + 1 :])
    return options, []


def _load_script(command: list[str]) -> tuple[ModuleType, CodeType]:
    """A new __main__ module for the script, and its code. Sets sys.argv and sys.path[0] as Python does."""
    path = Path(command[0]).absolute()  # as in Python's tracebacks; sys.argv keeps the path as given
    sys.argv[:] = command
    spec = importlib.machinery.PathFinder.find_spec("__main__", [str(path)])
    if spec is not None:  # a folder or a zip file with a __main__.py
        _set_search_folder(str(path))
        return _from_spec(spec)
    _set_search_folder(str(path.resolve().parent))
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(path), __cached__=None, __builtins__=builtins)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(path))
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"run: can't open {command[0]}: {error.strerror}") from error
    return module, _compile(source, str(path))


def _load_module(command: list[str]) -> tuple[ModuleType, CodeType]:
    """The same for `python -m NAME`; the code of a package is its __main__."""
    name = command[0]
    _set_search_folder(str(Path.cwd()))
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


def _set_search_folder(folder: str) -> None:
    """Make `folder` the first place that imports search, instead of the folder of `bnfast` itself."""
    if not sys.flags.safe_path:  # python -P searches no such folder
        sys.path[0] = folder


def _compile(source: bytes, path: str) -> CodeType:
    with _script_errors():
        return compile(source, path, "exec", dont_inherit=True)


@contextlib.contextmanager
def _script_errors() -> Iterator[None]:
    """Shows an error in the script's syntax as Python does, and ends the process with Python's status."""
    try:
        yield
    except (SyntaxError, ValueError) as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        raise SystemExit(1) from None


def _execute(module: ModuleType, code: CodeType) -> int:
    """Run the code as __main__. It stays __main__ until the process ends, since pickle, atexit and threads need it."""
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        traceback = error.__traceback__.tb_next if error.__traceback__ else None  # starts in the script
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches Keras once the imports of Keras and TensorFlow are complete.

    Each of them imports the other while it starts up, so the patch waits for whichever ends last.
    """

    WATCHED = ("tensorflow", "keras")

    def __init__(self) -> None:
        self.reason: str | None = "the script didn't import Keras"  # why Keras is not patched; None: it is
        self._importing: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders return, with a loader that calls `_patch` after the import."""
        if name not in self.WATCHED or name in self._importing:
            return None
        self._importing.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._importing.discard(name)
        if spec is not None and spec.loader is not None:
            self._watch(name, spec.loader)
        return spec

    def _watch(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._importing.add(name)
            try:
                execute(module)
            finally:
                self._importing.discard(name)
                del loader.exec_module
            if "keras" in sys.modules and not self._importing:
                self._patch()

        loader.exec_module = exec_module

    def _patch(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        try:
            import keras

            if keras.backend.backend() not in ("tensorflow", "torch", "jax"):
                self.reason = f"Keras runs on {keras.backend.backend()}"
                return
            import bnfast.keras

            bnfast.keras.patch()
            if "tensorflow" in sys.modules:
                tf_layers.install()
            self.reason = None
        except Exception as error:  # the script must run all the same
            self.reason = f"{type(error).__name__}: {error}"

    def summary(self) -> str:
        """The lines to print at the end: how many layers ran on what, or why nothing was replaced."""
        if self.reason is not None:
            legacy = " (tf_keras is not Keras 3)" if "tf_keras" in sys.modules else ""
            lines = [f"nothing was replaced: {self.reason}{legacy}"]
        else:
            from bnfast.keras.models.patch import made, summary

            lines = tf_layers.summary()
            if made or not lines:
                lines = [*summary().splitlines(), *lines]
        if not sys.modules.keys().isdisjoint(STARTERS):
            lines.append("processes that multiprocessing spawned aren't covered: Keras's own layer runs there")
        return "\n".join(f"bnfast: {line}" for line in lines)
