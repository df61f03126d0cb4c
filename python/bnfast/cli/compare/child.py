"""The process that runs the script once: seeds, bnfast's layer or Keras's, and the recorder around it."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from bnfast.cli import run, script
from bnfast.cli.compare.recorder import End, Recorder
from bnfast.cli.errors import UserError
from bnfast.cli.keras_import import AfterImport

SEED = 0


def main(arguments: Sequence[str]) -> NoReturn:
    """`arguments` is one JSON object: command, module, safe_path, folder, steps, bnfast, move."""
    task = json.loads(arguments[0])
    folder = Path(task["folder"])
    process = os.getpid()
    recorder, patcher = Recorder(folder, task["steps"], task["move"]), run.Patcher()
    record = recorder.record

    def after_import() -> None:
        if task["bnfast"]:
            patcher.patch()
        seed_framework()
        recorder.install()

    AfterImport(after_import)
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  # what scripts use
    record.error = run_script(task, process)
    if os.getpid() != process:  # a fork of the script that came to its end
        sys.exit()
    if task["bnfast"]:
        record.untouched = patcher.reason is not None
        record.summary = patcher.summary()
    record.legacy = run.legacy_keras()
    recorder.finish()
    leave()


def run_script(task: dict[str, Any], process: int) -> str | None:
    """Runs it, and returns the error that ended it, in one line; None if it ended well or was stopped. What ends a fork
    of this process is raised, so that the script sees its fork's status."""
    errors: list[BaseException] = []
    sys.excepthook = lambda kind, error, where: errors.append(error)  # for an error in the script's syntax
    try:
        module, code = script.load(task["command"], module=task["module"], safe_path=task["safe_path"])
    except UserError as error:
        return str(error).removeprefix("run: ")
    except SystemExit:
        return " ".join(f"{type(error).__name__}: {error}" for error in errors)
    sys.excepthook = sys.__excepthook__
    try:
        script.enter(module, code)
    except End:
        pass
    except BaseException as error:
        if os.getpid() != process:
            raise
        if not isinstance(error, SystemExit):
            return told(error, module)
        if error.code in (None, 0):
            return None
        return f"it ended with status {error.code}" if isinstance(error.code, int) else f"it ended with {error.code!r}"
    return None


def seed_framework() -> None:
    """Seeds for scripts that set none. One that does sets them later, so its own count."""
    if tensorflow := sys.modules.get("tensorflow"):
        tensorflow.random.set_seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


def told(error: BaseException, module: ModuleType) -> str:
    """The error in one line, with the line of the script that raised it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:200]} ..."
    frames = traceback.extract_tb(error.__traceback__)
    line = next((each.lineno for each in reversed(frames) if each.filename == module.__file__), None)
    return f"{type(error).__name__}{f': {text}' if text else ''}" + (f" (line {line})" if line else "")


def leave() -> NoReturn:
    """Ends the process though the script, which was stopped, may have left threads and processes."""
    for process in multiprocessing.active_children():
        process.terminate()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
