"""Batch normalization layers over NumPy arrays: parameters, moving statistics, and what `backward` needs."""

from .batch_norm import BatchNormalization
from .conditional import ConditionalBatchNormalization

__all__ = ["BatchNormalization", "ConditionalBatchNormalization"]
