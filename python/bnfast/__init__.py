"""bnfast: batch normalization on the CPU, training and inference, for NumPy and for Keras 3 (`import bnfast.keras`).

This file is the table of contents. It imports nothing heavier than NumPy.
"""

from . import _thread_pools, functional, runtime
from .functional import *  # noqa: F403  # every function and its result type
from .layers.batch_norm import BatchNormalization
from .layers.conditional import ConditionalBatchNormalization
from .runtime import *  # noqa: F403  # threads, memory, build_info

__all__ = ["BatchNormalization", "ConditionalBatchNormalization", "__version__"]
__all__ += functional.__all__
__all__ += runtime.__all__

__version__: str

_thread_pools.watch()


def __getattr__(name: str) -> str:
    if name == "__version__":  # lazy, because build_info reads the cache sizes, which would slow the import
        return runtime.build_info()["version"]
    raise AttributeError(f"module 'bnfast' has no attribute {name!r}")
