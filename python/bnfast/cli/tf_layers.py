"""`tf.layers.batch_normalization` for a script under `bnfast run`: bnfast.compat.v1's function, counted.

With Keras 3, TensorFlow's `tf.compat.v1.layers` is a lazy loader whose every function raises AttributeError: tf_keras
had them. So a graph of TensorFlow 1 runs under `bnfast run` that doesn't run without. Several modules hold such a
loader, and some are made after the patch; hence its class answers for all of them.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

SUBMODULE = "__internal__.legacy.layers"  # what the loaders of tf.compat.v1.layers stand for

calls = 0  # how often the script called it


def install() -> None:
    """Makes tf.compat.v1.layers.batch_normalization bnfast's. Without effect where TensorFlow has other loaders."""
    with contextlib.suppress(ImportError, AttributeError):
        from tensorflow.python.util.lazy_loader import KerasLazyLoader

        from bnfast.compat.v1 import batch_normalization

        _install(KerasLazyLoader, batch_normalization)


def summary() -> list[str]:
    """A line, if the script called it."""
    return [f"tf.layers.batch_normalization: {calls} in graphs, computed by bnfast"] if calls else []


def _install(loader: Any, function: Any) -> None:
    theirs = loader.__getattr__

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global calls
        y = function(*args, **kwargs)
        calls += 1
        return y

    def look_up(self: Any, name: str) -> Any:
        if name == "batch_normalization" and vars(self).get("_tfll_submodule") == SUBMODULE:
            return counted
        return theirs(self, name)

    loader.__getattr__ = look_up
