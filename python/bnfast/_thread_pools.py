"""bnfast among the thread pools that threadpoolctl lists and limits, if threadpoolctl is imported, before or after.

`threadpoolctl.threadpool_limits(n)` then limits bnfast too, `user_api="bnfast"` limits it alone, and
`threadpoolctl.threadpool_info()` has a row for it. Nothing is imported for it: the controller is registered where
threadpoolctl is loaded, or when it becomes so. `python -m threadpoolctl` runs a copy of that module as `__main__`,
which bnfast leaves alone: it doesn't list bnfast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import _core

NAME = "threadpoolctl"


def watch() -> None:
    """Register the controller now if threadpoolctl is loaded, else when it is."""
    loaded = sys.modules.get(NAME)
    if loaded is not None:
        _register(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(threadpoolctl: ModuleType) -> None:
    if not hasattr(threadpoolctl, "register") or "bnfast" in getattr(threadpoolctl, "_ALL_USER_APIS", ()):
        return  # older than 3.2, half imported, or done
    base: Any = threadpoolctl.LibController

    class BnfastController(base):  # type: ignore[misc]
        user_api = "bnfast"
        internal_api = "bnfast"
        filename_prefixes = ("_core.",)
        check_symbols = ("bnfast_get_num_threads", "bnfast_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.bnfast_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.bnfast_set_num_threads(num_threads)

        def get_version(self) -> str:
            return _core.build_info()["version"]

    threadpoolctl.register(BnfastController)


class _Finder:
    """Finds threadpoolctl as the other finders do, until it is imported. Somebody may look without importing it.

    Not a subclass of importlib.abc's, which take half of the time of `import bnfast`.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Registering:
    """A loader that registers the controller once the module has run, and takes the finder away."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:  # what others ask of a loader: get_source, is_package, ...
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register(module)
