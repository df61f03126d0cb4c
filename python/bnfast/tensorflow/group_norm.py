"""Layer and group normalization as TensorFlow operations: in training one callback each way, else TensorFlow's ops.

    normalize   x, gamma, beta -> y, differentiable to any order

The callbacks are bnfast.layer_norm, bnfast.group_norm and their gradients, called without copies; only x, mean and
invstd are kept for the backward pass. Inference, small tensors, machines with a GPU (`op.choose`) and the derivative of
the gradient run the same formula in TensorFlow's own ops (`group_norm_reference`), so an exported graph doesn't need
bnfast. In inference (32, 128, 768)
takes 3.9 ms, Keras's ops for a layer norm 5.1 ms; a group norm takes as long as Keras's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from .. import functional
from . import group_norm_reference as reference
from . import numpy_callback, op
from .batch import compute_dtype
from .custom_gradient import custom_gradient
from .group_norm_reference import Norm
from .mode import may_train
from .numpy_callback import USUAL_BATCH

__all__ = ["Norm", "accepts", "normalize"]

SMALL_BYTES = numpy_callback.SMALL_BYTES

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def accepts(x: Any) -> bool:
    """Whether `normalize` computes on this dtype. Others (integers) are left to Keras's own code."""
    return tf.as_dtype(x.dtype) in _DTYPES


def normalize(x: Any, gamma: Any, beta: Any, norm: Norm, training: Any, dtype: str) -> tf.Tensor:
    """y in the shape of x and in `dtype`. gamma and beta: None, or float tensors with the extents of norm.axes."""
    x = tf.convert_to_tensor(x)
    extents = [x.shape[axis] for axis in norm.axes]
    primals = {"x": x}
    for name, variable in (("gamma", gamma), ("beta", beta)):
        if variable is not None:  # custom_gradient accepts no None and treats variables differently
            primals[name] = tf.reshape(tf.cast(tf.convert_to_tensor(variable), compute_dtype(x)), extents)
    if not may_train(training) or _is_small(x, norm) or op.on_own_ops("auto"):
        return tf.cast(reference.normalize(**{"gamma": None, "beta": None, **primals}, norm=norm), dtype)

    def forward(*values: tf.Tensor) -> Any:
        given = dict(zip(primals, values, strict=True))
        dtypes = [x.dtype, tf.float64, tf.float64]
        y, mean, invstd = numpy_callback.call(partial(_forward, norm=norm), given, dtypes, outs={"out": "x"})
        y.set_shape(x.shape)
        saved = {"mean": mean, "invstd": invstd}
        return y, lambda dy: _gradient({"dy": tf.convert_to_tensor(dy), **given}, saved, norm)

    return tf.cast(custom_gradient(forward, *primals.values()), dtype)


def _is_small(x: tf.Tensor, norm: Norm) -> bool:
    """Whether a callback each way costs more than it gains: below 256 KiB for a group norm, 1 MiB for a layer norm.

    Forward and backward in a graph, relative to Keras: a layer norm of 256 KiB 1.3x, 1 MiB 0.8x, 2 MiB 0.6x, 12 MiB
    0.23x; a group norm of 256 KiB 0.94x, 1 MiB 0.53x, 12 MiB 0.14x. A batch of unknown size counts as 32 samples; any
    other unknown extent counts as large.
    """
    batch, *others = x.shape
    size = x.dtype.size * (USUAL_BATCH if batch is None else batch)
    least = SMALL_BYTES if norm.groups else 4 * SMALL_BYTES
    return 0 in others or (None not in others and size * math.prod(others) < least)


def _gradient(given: dict[str, tf.Tensor], saved: dict[str, tf.Tensor], norm: Norm) -> Any:
    """dx, dgamma and dbeta, those whose primal is in `given`, in its order. `given` also holds dy."""

    def backward(*values: tf.Tensor) -> Any:
        tensors = dict(zip(given, values, strict=True))
        primals = {name: tensors[name] for name in reference.PRIMALS if name in tensors}
        dtypes = {name: tensor.dtype.as_numpy_dtype for name, tensor in primals.items()}
        passed = {name: tensor for name, tensor in {**tensors, **saved}.items() if name != "beta"}
        gradients = numpy_callback.call(
            partial(_backward, norm=norm, dtypes=dtypes),
            passed,
            [tensor.dtype for tensor in primals.values()],
            outs={"out": "dy"},
        )
        for gradient, tensor in zip(gradients, primals.values(), strict=True):
            gradient.set_shape(tensor.shape)
        return tuple(gradients), lambda *cotangents: reference.derivative_of_gradient(tensors, cotangents, norm)

    return custom_gradient(backward, *given.values())


def _forward(x: np.ndarray, gamma: Any = None, beta: Any = None, out: Any = None, *, norm: Norm) -> list[np.ndarray]:
    """y, mean, invstd."""
    kwargs: dict[str, Any] = {"epsilon": norm.epsilon, "out": out}
    if norm.groups is None:
        return list(functional.layer_norm(x, gamma, beta, axis=norm.axes, **kwargs))
    return list(functional.group_norm(x, norm.groups, gamma, beta, axis=norm.axes[0], **kwargs))


def _backward(
    dy: np.ndarray,
    x: np.ndarray,
    gamma: Any = None,
    out: Any = None,
    *,
    mean: np.ndarray,
    invstd: np.ndarray,
    norm: Norm,
    dtypes: dict[str, Any],
) -> list[np.ndarray]:
    """The gradients that `dtypes` names (of x, gamma, beta), in those dtypes."""
    if norm.groups is None:
        result = functional.layer_norm_grad(dy, x, mean, invstd, gamma, axis=norm.axes, out=out)
    else:
        result = functional.group_norm_grad(dy, x, mean, invstd, norm.groups, gamma, axis=norm.axes[0], out=out)
    gradients = {"x": result.dx, "gamma": result.dgamma, "beta": result.dbeta}
    return [gradients[name].astype(dtype, copy=False) for name, dtype in dtypes.items()]
