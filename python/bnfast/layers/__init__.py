"""The NumPy layers: parameters, moving statistics, and the record that `backward` needs."""

from .batch_norm import BatchNormalization
from .conditional import ConditionalBatchNormalization

__all__ = ["BatchNormalization", "ConditionalBatchNormalization"]
