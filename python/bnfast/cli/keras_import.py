"""Calls a function once a script has imported Keras, and no earlier.

So environment variables that the script sets first (KERAS_BACKEND, TF_CPP_MIN_LOG_LEVEL, CUDA_VISIBLE_DEVICES) still
count, and a script without Keras does not pay for its import. Keras and TensorFlow import each other while they start
up, so the function waits for whichever ends last.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

WATCHED = ("tensorflow", "keras")


class AfterImport(importlib.abc.MetaPathFinder):
    """Entered in sys.meta_path, it calls `action` when the imports of Keras and TensorFlow are complete."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._importing: set[str] = set()
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders return, with a loader that calls the action after the import."""
        if name not in WATCHED or name in self._importing:
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
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                self._action()

        loader.exec_module = exec_module
