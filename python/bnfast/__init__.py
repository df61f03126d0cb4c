"""bnfast: batch normalization on the CPU, training and inference, for NumPy and for Keras 3 (`import bnfast.keras`).

This file is the table of contents. It imports nothing heavier than NumPy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import _thread_pools, functional, runtime
from .functional import *  # noqa: F403  # every function and its result type
from .runtime import *  # noqa: F403  # threads, memory, build_info

if TYPE_CHECKING:
    from .layers.batch_norm import BatchNormalization
    from .layers.conditional import ConditionalBatchNormalization

__all__ = ["BatchNormalization", "ConditionalBatchNormalization", "__version__"]
__all__ += functional.__all__
__all__ += runtime.__all__

__version__: str

_NAMESPACES = ("layers", "keras", "torch", "jax", "cuda")  # all but the first need more than NumPy
# Imported at the first use: half of the time of `import bnfast`, which a user of the functions doesn't need.
_LAYERS = {"BatchNormalization": "batch_norm", "ConditionalBatchNormalization": "conditional"}

_thread_pools.watch()


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext bnfast` in a notebook: from now on Keras's BatchNormalization is bnfast's, as under `bnfast run`.

    A cell that ran `from keras.layers import BatchNormalization` before keeps Keras's. `%unload_ext bnfast` undoes it.
    """
    __getattr__("keras").patch()
    print("bnfast: keras.layers.BatchNormalization is bnfast's layer now (%unload_ext bnfast undoes it)")


def unload_ipython_extension(ipython: Any) -> None:
    """`%unload_ext bnfast`. Layers that were made in between stay as they are."""
    __getattr__("keras").unpatch()


def __getattr__(name: str) -> Any:
    if name == "__version__":  # lazy, because build_info reads the cache sizes, which would slow the import
        return runtime.build_info()["version"]
    if name in _LAYERS:
        layer = getattr(importlib.import_module(f"{__name__}.layers.{_LAYERS[name]}"), name)
        return globals().setdefault(name, layer)
    if name in _NAMESPACES:  # `import bnfast; bnfast.keras.accelerate(model)`: TensorFlow is imported here, no sooner
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'bnfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMESPACES})
