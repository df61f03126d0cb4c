"""`bnfast run SCRIPT [ARGS]`: an unmodified Keras script with bnfast's batch norm in place of Keras's.

The script runs as `python SCRIPT ARGS` would run it: as __main__, with its own sys.argv and sys.path[0], tracebacks and
exit status. Keras is patched the moment the script has imported it, not before: what a script sets up first
(KERAS_BACKEND, TF_CPP_MIN_LOG_LEVEL, CUDA_VISIBLE_DEVICES) still counts, and one that never imports it doesn't pay for
it. All that bnfast says goes to stderr: a line at the start, a summary at the end.
"""

from __future__ import annotations

import argparse
import atexit
import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from bnfast.cli.errors import UserError, require

USAGE = "bnfast run [--quiet | --no-summary] (SCRIPT | -m MODULE) [ARGS ...]"
HELP = f"""usage: {USAGE}

Run a Python script or module in which keras.layers.BatchNormalization is bnfast's.

options:
  -h, --help    show this help message and exit
  -m MODULE     run a module, as python -m does
  --no-summary  no summary at the end
  --quiet       neither the line at the start nor the summary
"""


def register(subparsers: Any) -> None:
    """Add `run` to the command line. Its options end where the script begins, so it reads them itself."""
    # No argument starts with a "\0", so argparse takes none for an option and hands them all on.
    parser = subparsers.add_parser(
        "run", help="run a Keras script with bnfast's layer", prefix_chars="\0", add_help=False
    )
    parser.add_argument("words", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the script. Returns the exit status; a SystemExit of the script passes through."""
    options, words = _split(arguments.words)
    if "-h" in options or "--help" in options:
        print(HELP, end="")
        return 0
    if not words:
        raise UserError(f"run: a script or -m MODULE is needed. usage: {USAGE}")
    require("tensorflow", "keras", extra="keras")
    module, code = _load_module(words) if "-m" in options else _load_script(words)
    watcher = _PatchOnImport()
    sys.meta_path.insert(0, watcher)
    if "--quiet" not in options:
        print(f"bnfast: running {words[0]} with bnfast's batch norm in place of Keras's", file=sys.stderr)
        if "--no-summary" not in options:
            atexit.register(lambda: print(watcher.summary(), file=sys.stderr, flush=True))
    return _execute(module, code)


def _split(words: Sequence[str]) -> tuple[set[str], list[str]]:
    """Our options, up to the script or the module's name; and the words from there on."""
    options: set[str] = set()
    for index, word in enumerate(words):
        if not word.startswith("-") or word == "-":
            return options, list(words[index:])
        if word == "--":
            return options, list(words[index + 1 :])
        if word not in ("-h", "--help", "--quiet", "--no-summary", "-m"):
            raise UserError(f"run: unknown option {word}. usage: {USAGE}")
        options.add(word)
        if word == "-m":
            return options, list(words[index + 1 :])
    return options, []


def _load_script(words: list[str]) -> tuple[ModuleType, CodeType]:
    """A new __main__ for the script, and its code; sys.argv and sys.path[0] as it expects them."""
    path = Path(words[0]).absolute()  # tracebacks name it so; sys.argv doesn't
    sys.argv[:] = words
    inside = importlib.machinery.PathFinder.find_spec("__main__", [str(path)])
    if inside is not None:  # a folder or a zip file with a __main__.py in it
        _search_first(str(path))
        return _from_spec(inside)
    _search_first(str(path.resolve().parent))
    module = ModuleType("__main__")
    module.__dict__.update(__file__=str(path), __cached__=None, __builtins__=builtins)
    module.__loader__ = importlib.machinery.SourceFileLoader("__main__", str(path))
    try:
        with io.open_code(str(path)) as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"run: can't open {words[0]}: {error.strerror}") from error
    return module, _compile(source, str(path))


def _load_module(words: list[str]) -> tuple[ModuleType, CodeType]:
    """The same for `python -m NAME`; for a package its __main__."""
    name = words[0]
    _search_first(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name += ".__main__"
            spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"run: no module named {words[0]} ({error})") from error
    if spec is None or not hasattr(spec.loader, "get_code"):
        raise UserError(f"run: no module named {name}")
    sys.argv[:] = [spec.origin or name, *words[1:]]
    return _from_spec(spec)


def _from_spec(spec: importlib.machinery.ModuleSpec) -> tuple[ModuleType, CodeType]:
    loader: Any = spec.loader
    module = ModuleType("__main__")
    module.__dict__.update(__file__=spec.origin, __cached__=spec.cached, __builtins__=builtins)
    module.__spec__, module.__loader__, module.__package__ = spec, loader, spec.parent
    return module, loader.get_code(spec.name)


def _search_first(folder: str) -> None:
    """The folder where imports look first, in place of the one of `bnfast` itself."""
    if not sys.flags.safe_path:  # python -P: there is none
        sys.path[0] = folder


def _compile(source: bytes, path: str) -> CodeType:
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        raise SystemExit(1) from None


def _execute(module: ModuleType, code: CodeType) -> int:
    """Run the code as __main__, which it stays until the process ends: pickle, atexit and threads look there."""
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        below = error.__traceback__.tb_next if error.__traceback__ else None  # from the script's own frame on
        sys.excepthook(type(error), error.with_traceback(below), below)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches Keras as soon as Keras is imported and neither it nor TensorFlow is in the middle of that.

    TensorFlow imports Keras while it starts up, and Keras TensorFlow: whichever is done last counts.
    """

    WATCHED = ("tensorflow", "keras")

    def __init__(self) -> None:
        self.reason: str | None = "the script didn't import Keras"  # why nothing is patched
        self._running: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders have, its loader replaced by one that tells us."""
        if name not in self.WATCHED or name in self._running:
            return None
        self._running.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._running.discard(name)
        if spec is not None and spec.loader is not None:
            self._watch(name, spec.loader)
        return spec

    def _watch(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            self._running.add(name)
            try:
                execute(module)
            finally:
                self._running.discard(name)
                del loader.exec_module
            if "keras" in sys.modules and not self._running:
                self._patch()

        loader.exec_module = exec_module

    def _patch(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        try:
            import keras

            if keras.backend.backend() != "tensorflow":  # don't load TensorFlow for nothing
                self.reason = f"Keras runs on {keras.backend.backend()}"
                return
            import bnfast.keras

            bnfast.keras.patch()
            self.reason = None
        except Exception as error:  # the script itself must run whatever we can't do
            self.reason = f"{type(error).__name__}: {error}"

    def summary(self) -> str:
        """What ran on what, as lines to print."""
        if self.reason is not None:
            legacy = " (tf_keras is not Keras 3)" if "tf_keras" in sys.modules else ""
            return f"bnfast: nothing was replaced: {self.reason}{legacy}"
        from bnfast.keras.models.patch import summary

        return "\n".join(f"bnfast: {line}" for line in summary().splitlines())
