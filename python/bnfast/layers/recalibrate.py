"""New moving statistics for a NumPy layer, from batches, masked batches, or moments of batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .._arguments.array_checks import tensor
from .._arguments.arrays import Array
from ..diagnosis.estimate import Estimate
from ..functional.batch_norm import moments
from ..functional.moments import Moments
from .state import Layer

__all__ = ["Found", "statistics"]


class Found:
    """What the batches say. `arrays` are the new values of the layer's arrays, by name; `shape` that of its vectors."""

    def __init__(self, estimate: Estimate, arrays: dict[str, Array], x_dtype: Any) -> None:
        mean, variance = estimate.result()
        self.moments = Moments(estimate.count, mean, variance)
        self.batches = estimate.batches
        self.arrays = arrays
        self.shape = mean.shape
        self.x_dtype = x_dtype


def statistics(layer: Layer, batches: Any, estimator: str, epsilon: float) -> Found:
    """The statistics of the batches. The layer is only read."""
    if not isinstance(batches, Iterable) or isinstance(batches, (np.ndarray, Moments, str, bytes, dict)):
        raise TypeError(
            "batches must be an iterable of arrays, of tuples (x, mask), or of bnfast.Moments; one batch is [x]. "
            f"Received: {type(batches).__name__}"
        )
    estimate, stddevs = Estimate(estimator, 0 if layer.renorm else layer.correction), Estimate(estimator)
    shape = None if layer.moving_mean is None else layer.moving_mean.shape
    x_dtype: Any = None
    for number, batch in enumerate(batches):
        parts, dtype = _moments(layer, batch, number, estimator)
        x_dtype = x_dtype or dtype
        for part in parts:
            if shape is not None and np.shape(part.mean) != shape:
                raise ValueError(f"batch {number} must have {shape} channels. Received: {np.shape(part.mean)}")
            shape = np.shape(part.mean)
            if not (np.isfinite(part.mean).all() and np.isfinite(part.variance).all()):
                raise FloatingPointError(f"batch {number} has a mean or variance that is not finite")
            estimate.add(part)
            if part.count:
                stddevs.add(Moments(part.count, np.sqrt(part.variance + epsilon), np.zeros_like(part.variance)))
    mean, variance = estimate.result()
    arrays = {"moving_mean": mean, "moving_variance": variance}
    if layer.renorm:
        stddev = np.sqrt(variance + epsilon) if estimator == "population" else stddevs.result()[0]
        arrays |= {"moving_stddev": stddev, "renorm_mean": mean, "renorm_stddev": stddev}
        arrays["moving_variance"] = np.maximum(stddev**2 - epsilon, 0)
    return Found(estimate, arrays, x_dtype)


def _moments(layer: Layer, batch: Any, number: int, estimator: str) -> tuple[list[Moments], Any]:
    """The moments of one batch, or those of its ghost batches if they are averaged; and the dtype of x."""
    if isinstance(batch, Moments):
        return [batch], None
    if isinstance(batch, tuple) and len(batch) != 2:
        raise ValueError(f"batch {number} as a tuple must be (x, mask). Received: a tuple of {len(batch)}")
    x, mask = batch if isinstance(batch, tuple) else (batch, None)
    x = tensor("x", x)
    size = layer.virtual_batch_size
    if size is None or estimator != "average":
        return [moments(x, axis=layer.axis, mask=mask)], x.dtype
    if mask is not None:
        raise ValueError("batches must have no mask with virtual_batch_size and the estimator average")
    return [moments(part, axis=layer.axis) for part in _ghosts(layer, x, size)], x.dtype


def _ghosts(layer: Any, x: Array, size: int) -> list[Array]:
    if len(x) % size:
        raise ValueError(f"virtual_batch_size={size} must divide the batch. Received: {len(x)} samples")
    count = len(x) // size
    if layer.virtual_batch_grouping == "strided":
        return [x[ghost::count] for ghost in range(count)]
    return [x[ghost * size : (ghost + 1) * size] for ghost in range(count)]
