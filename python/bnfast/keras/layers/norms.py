"""Layer and group normalization as TensorFlow ops: in training a callback each way, elsewhere plain ops.

    normalize   x, gamma, beta -> y, differentiable as often as anyone likes

The callbacks are bnfast.layer_norm and bnfast.group_norm and their gradients through `host`: no copies, nothing but x,
mean and invstd kept for the way back. The derivative of the gradient is that of the same formula in plain TensorFlow
ops (`norms_formula`), which also is what inference runs, so that an exported graph needs no bnfast, and small tensors.
As inference (32, 128, 768) takes 3.9 ms, Keras's ops for a layer norm 5.1; a group norm takes as long as Keras's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import bnfast

from ...tensorflow import group_norm_reference as formula
from ...tensorflow import numpy_callback as host
from ...tensorflow.group_norm_reference import Norm
from ...tensorflow.reference import compute_dtype
from ...tensorflow.training import mode as freezing
from ..models.report import SMALL_BYTES, USUAL_BATCH

__all__ = ["Norm", "check", "normalize", "takes"]

_DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def check(layer: Any) -> None:
    """What the layers' constructors have in common: the backend, epsilon, no XLA."""
    name = type(layer).__name__
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"bnfast.keras.{name} needs the TensorFlow backend of Keras (KERAS_BACKEND=tensorflow). "
            f"Received: {keras.backend.backend()}"
        )
    if not (layer.epsilon >= 0 and math.isfinite(layer.epsilon)):
        raise ValueError(f"epsilon must be finite and >= 0. Received: {layer.epsilon}")
    layer.supports_jit = False  # XLA has no kernel for a callback


def takes(x: Any) -> bool:
    """Whether `normalize` computes on this dtype; what it doesn't take (integers) is left to Keras's own code."""
    return tf.as_dtype(x.dtype) in _DTYPES


def normalize(x: Any, gamma: Any, beta: Any, norm: Norm, training: Any) -> tf.Tensor:
    """y in x's shape and dtype. gamma and beta: None, or float tensors or variables with the extents of norm.axes."""
    x = tf.convert_to_tensor(x)
    dtype, extents = compute_dtype(x), [x.shape[axis] for axis in norm.axes]
    primal = {"x": x}
    for name, variable in (("gamma", gamma), ("beta", beta)):
        if variable is not None:  # custom_gradient takes no None, and treats variables apart
            primal[name] = tf.reshape(tf.cast(tf.convert_to_tensor(variable), dtype), extents)
    if not freezing.possible(training) or _small(x, norm):
        return formula.normalize(**{"gamma": None, "beta": None, **primal}, norm=norm)

    def op(*values: tf.Tensor) -> Any:
        given = dict(zip(primal, values, strict=True))
        dtypes = [x.dtype, tf.float64, tf.float64]
        y, mean, invstd = host.call(partial(_forward, norm=norm), given, dtypes, outs={"out": "x"})
        y.set_shape(x.shape)
        saved = {"mean": mean, "invstd": invstd}
        return y, lambda dy: _gradient({"dy": tf.convert_to_tensor(dy), **given}, saved, norm)

    return tf.custom_gradient(op)(*primal.values())


def _small(x: tf.Tensor, norm: Norm) -> bool:
    """Whether a callback each way costs more than it gains: by the size that `report` names, a layer norm by four.

    Both ways in a graph, in Keras's time: a layer norm of 256 KiB 1.3, 1 MiB 0.8, 2 MiB 0.6, 12 MiB 0.23; a group norm
    of 256 KiB 0.94, 1 MiB 0.53, 12 MiB 0.14. A batch of unknown size counts as in `report`, any other unknown
    extent as large.
    """
    batch, *others = x.shape
    size = x.dtype.size * (USUAL_BATCH if batch is None else batch)
    least = SMALL_BYTES if norm.groups else 4 * SMALL_BYTES
    return 0 in others or (None not in others and size * math.prod(others) < least)


def _gradient(given: dict[str, tf.Tensor], saved: dict[str, tf.Tensor], norm: Norm) -> Any:
    """dx, dgamma, dbeta, those whose primal `given` has, in its order; its other: dy."""

    def op(*values: tf.Tensor) -> Any:
        tensors = dict(zip(given, values, strict=True))
        primal = {name: tensors[name] for name in formula.PRIMAL if name in tensors}
        dtypes = {name: tensor.dtype.as_numpy_dtype for name, tensor in primal.items()}
        passed = {name: tensor for name, tensor in {**tensors, **saved}.items() if name != "beta"}
        function = partial(_backward, norm=norm, dtypes=dtypes)
        gradients = host.call(function, passed, [tensor.dtype for tensor in primal.values()], outs={"out": "dy"})
        for gradient, tensor in zip(gradients, primal.values(), strict=True):
            gradient.set_shape(tensor.shape)
        return tuple(gradients), lambda *cotangents: formula.derivative_of_gradient(tensors, cotangents, norm)

    return tf.custom_gradient(op)(*given.values())


def _forward(x: np.ndarray, gamma: Any = None, beta: Any = None, out: Any = None, *, norm: Norm) -> list[np.ndarray]:
    """y, mean, invstd."""
    words: dict[str, Any] = {"epsilon": norm.epsilon, "out": out}
    if norm.groups is None:
        return list(bnfast.layer_norm(x, gamma, beta, axis=norm.axes, **words))
    return list(bnfast.group_norm(x, norm.groups, gamma, beta, axis=norm.axes[0], **words))


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
    """dx, dgamma and dbeta as far as `dtypes` has them, in those."""
    if norm.groups is None:
        result = bnfast.layer_norm_grad(dy, x, mean, invstd, gamma, axis=norm.axes, out=out)
    else:
        result = bnfast.group_norm_grad(dy, x, mean, invstd, norm.groups, gamma, axis=norm.axes[0], out=out)
    gradients = {"x": result.dx, "gamma": result.dgamma, "beta": result.dbeta}
    return [gradients[name].astype(dtype, copy=False) for name, dtype in dtypes.items()]
