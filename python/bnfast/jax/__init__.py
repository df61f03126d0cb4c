"""bnfast.jax: batch norm for JAX on bnfast's kernels, as pure functions.

This file is the table of contents. `functional` has the functions, `nnx` (not imported here, because it needs Flax) the
module `BatchNorm`.
"""

try:
    import jax as _jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise  # another package is missing: its own message is clearer
    raise ImportError('bnfast.jax needs JAX, which is not installed: pip install "bnfast[jax]"') from error

from .functional import GradResult, TrainResult, batch_norm_grad, batch_norm_infer, batch_norm_train, moments
from .support import own_ops, status

__all__ = [
    "GradResult",
    "TrainResult",
    "batch_norm_grad",
    "batch_norm_infer",
    "batch_norm_train",
    "moments",
    "own_ops",
    "status",
]

del _jax
