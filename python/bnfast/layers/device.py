"""The NumPy layer over arrays of a CUDA device: the same call on bnfast.cuda, where all its features are there.

The layer's arrays follow x: a call with a device array moves those that are NumPy's to x's library and device, a call
with a NumPy array moves them back. Each move waits for the device once; between calls on one side nothing moves.
bnfast.cuda is imported by the first device array.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from .._arguments import checks
from ..functional.batch_norm import GradResult

__all__ = ["call", "host_copy", "is_on_device", "to_host"]

_CUDA_DEVICES = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged


def is_on_device(value: Any) -> bool:
    """Whether a value shows that its memory is a CUDA device's. Imports nothing."""
    if isinstance(value, np.ndarray) or value is None:
        return False
    try:
        if hasattr(value, "is_cuda"):
            return bool(value.is_cuda)
        if hasattr(value, "__dlpack_device__"):
            return int(value.__dlpack_device__()[0]) in _CUDA_DEVICES
        return hasattr(value, "__cuda_array_interface__")
    except Exception:  # a producer may raise anything: the checks of the arguments will name it
        return False


def call(layer: Any, x: Any, training: Any, mask: Any, residual: Any, labels: Any) -> Any:
    """One call of a layer: y, and layer._backward and layer.batches are set. As BatchNormalization.__call__."""
    from ..cuda import vectors
    from ..cuda.call import Call

    _refuse(layer, mask, labels)
    trains = checks.boolean("training", training) and layer.trainable
    place = Call("x", x, layer.axis)
    shape = place.geometry.vector_shape
    if layer.moving_mean is not None and shape != tuple(layer.moving_mean.shape):
        wanted = f"{layer.channels} channels on axis {layer.axis}, which this layer was built with"
        raise ValueError(f"x must have {wanted}. Received: shape {place.x.shape}")
    before = {name: getattr(layer, name) for name in layer._names()}
    if not layer.built:
        layer.build(shape if len(shape) > 1 else shape[0], "float64" if place.x.dtype == "float64" else "float32")
    try:
        for name in layer._names():
            if isinstance(getattr(layer, name), np.ndarray):
                setattr(layer, name, vectors.to_device(getattr(layer, name), place))
        use_batch = trains if layer.use_batch_statistics is None else layer.use_batch_statistics
        update = trains and layer.update_statistics
        y, backward = _run(layer, x, residual, use_batch, update, place)
    except BaseException:
        for name, array in before.items():
            setattr(layer, name, array)
        raise
    layer._backward = backward
    return y, bool(update and math.prod(place.x.shape))


def _run(layer: Any, x: Any, residual: Any, use_batch: bool, update: bool, place: Any) -> tuple[Any, Any]:
    from .. import cuda
    from ..cuda import vectors

    mean, variance = layer.moving_mean, layer.moving_variance
    fused = {"axis": layer.axis, "activation": layer.activation, "negative_slope": layer.negative_slope}
    fused["residual"] = residual
    policy = {"momentum": layer._momentum(), "epsilon": layer.epsilon, "correction": layer.correction}
    policy["nan_policy"] = layer.nan_policy
    if use_batch:
        updated = {"moving_mean": mean, "moving_variance": variance} if update else {}
        result = cuda.batch_norm_train(x, layer.gamma, layer.beta, **updated, **policy, **fused)
        return result.y, partial(_gradient, x, result.mean, result.invstd, layer.gamma, layer.beta, True, fused)
    y = cuda.batch_norm_infer(x, mean, variance, layer.gamma, layer.beta, epsilon=layer.epsilon, **fused)
    kept = [vectors.copied(vector, place) for vector in (mean, variance)]  # may be updated before the backward call
    if update:
        cuda.batch_norm_train(x, None, None, mean, variance, axis=layer.axis, **policy)
    return y, partial(_frozen_gradient, x, kept, layer.epsilon, layer.gamma, layer.beta, fused)


def _gradient(
    x: Any, mean: Any, invstd: Any, gamma: Any, beta: Any, training: bool, fused: dict[str, Any], dy: Any
) -> GradResult:
    from .. import cuda

    return cuda.batch_norm_grad(dy, x, mean, invstd, gamma, beta, training=training, **fused)


def _frozen_gradient(
    x: Any, moving: list[Any], epsilon: float, gamma: Any, beta: Any, fused: dict[str, Any], dy: Any
) -> GradResult:
    """invstd is computed on the CPU: (C,) values there and back."""
    from ..cuda import vectors
    from ..cuda.call import Call

    variance = vectors.to_host(moving[1]).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        invstd = np.where(variance + epsilon == 0, 0.0, 1 / np.sqrt(variance + epsilon))
    on_device = vectors.to_device(invstd, Call("x", x, fused["axis"]))
    return _gradient(x, moving[0], on_device, gamma, beta, False, fused, dy)


def to_host(layer: Any) -> None:
    """Moves the layer's arrays to NumPy, if a call has moved them to a device."""
    if layer.moving_mean is None or isinstance(layer.moving_mean, np.ndarray):
        return
    for name in layer._names():
        array = getattr(layer, name)
        if array is not None and not isinstance(array, np.ndarray):
            setattr(layer, name, host_copy(array))


def host_copy(array: Any) -> Any:
    """A NumPy copy of one of the layer's arrays."""
    if isinstance(array, np.ndarray):
        return array.copy()
    from ..cuda import vectors

    return vectors.to_host(array)


def _refuse(layer: Any, mask: Any, labels: Any) -> None:
    features = {
        "mask": mask is not None,
        "renorm": layer.renorm,
        "virtual_batch_size": layer.virtual_batch_size is not None,
        "adjustment": layer.adjustment is not None,
        "labels": labels is not None,
    }
    for name, used in features.items():
        if used:
            raise NotImplementedError(f"{name} is not supported on a CUDA device yet")
