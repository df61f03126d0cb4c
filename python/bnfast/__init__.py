"""bnfast: batch normalization on the CPU, training and inference, for NumPy and for Keras 3 (`import bnfast.keras`).

This file is the table of contents. It imports NumPy and nothing heavier.
"""

from .conditional import ConditionalBatchNormalization
from .double_backward import GradGradResult, batch_norm_grad_grad
from .functional import GradResult, TrainResult, batch_norm_grad, batch_norm_infer, batch_norm_train, moments
from .group_norm import (
    NormGradResult,
    NormResult,
    group_norm,
    group_norm_grad,
    instance_norm,
    instance_norm_grad,
)
from .layer_norm import layer_norm, layer_norm_grad
from .layers import BatchNormalization
from .moments import Moments
from .renorm import renorm_correction
from .runtime import (
    build_info,
    clear_memory,
    get_num_threads,
    memory_statistics,
    set_memory_limit,
    set_num_threads,
)
from .weight import weight_norm, weight_norm_grad

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
    if name == "__version__":  # looked up when asked for: build_info reads cache sizes, which an import need not
        return build_info()["version"]
    raise AttributeError(f"module 'bnfast' has no attribute {name!r}")
