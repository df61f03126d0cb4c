"""bnfast: batch normalization on the CPU, training and inference, for NumPy and for Keras 3 (`import bnfast.keras`).

This file is the table of contents. It imports nothing heavier than NumPy.
"""

from . import functional
from .functional import *  # noqa: F403  # every function and its result type
from .layers.batch_norm import BatchNormalization
from .layers.conditional import ConditionalBatchNormalization
from .runtime import build_info, clear_memory, get_num_threads, memory_statistics, set_memory_limit, set_num_threads

__all__ = [
    "BatchNormalization",
    "ConditionalBatchNormalization",
    "__version__",
    "build_info",
    "clear_memory",
    "get_num_threads",
    "memory_statistics",
    "set_memory_limit",
    "set_num_threads",
]
__all__ += functional.__all__

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # lazy, because build_info reads the cache sizes, which would slow the import
        return build_info()["version"]
    raise AttributeError(f"module 'bnfast' has no attribute {name!r}")
