"""bnfast: batch normalization on the CPU, training and inference, for NumPy and for Keras 3 (`import bnfast.keras`).

This file is the table of contents. It imports nothing heavier than NumPy.
"""

from .functional.batch_norm import GradResult, TrainResult, batch_norm_grad, batch_norm_infer, batch_norm_train, moments
from .functional.group_norm import (
    NormGradResult,
    NormResult,
    group_norm,
    group_norm_grad,
    instance_norm,
    instance_norm_grad,
)
from .functional.layer_norm import layer_norm, layer_norm_grad
from .functional.moments import Moments
from .functional.renorm import renorm_correction
from .functional.second_order import GradGradResult, batch_norm_grad_grad
from .functional.weight_norm import weight_norm, weight_norm_grad
from .layers.batch_norm import BatchNormalization
from .layers.conditional import ConditionalBatchNormalization
from .runtime import build_info, clear_memory, get_num_threads, memory_statistics, set_memory_limit, set_num_threads

__all__ = [
    "BatchNormalization",
    "ConditionalBatchNormalization",
    "GradGradResult",
    "GradResult",
    "Moments",
    "NormGradResult",
    "NormResult",
    "TrainResult",
    "__version__",
    "batch_norm_grad",
    "batch_norm_grad_grad",
    "batch_norm_infer",
    "batch_norm_train",
    "build_info",
    "clear_memory",
    "get_num_threads",
    "group_norm",
    "group_norm_grad",
    "instance_norm",
    "instance_norm_grad",
    "layer_norm",
    "layer_norm_grad",
    "memory_statistics",
    "moments",
    "renorm_correction",
    "set_memory_limit",
    "set_num_threads",
    "weight_norm",
    "weight_norm_grad",
]

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # lazy, because build_info reads the cache sizes, which would slow the import
        return build_info()["version"]
    raise AttributeError(f"module 'bnfast' has no attribute {name!r}")
