"""bnfast.functional as TensorFlow ops, in graph and in eager mode: one callback forward, one backward.

    train       x, gamma, beta -> y, mean, variance; gradients may arrive at all three
    train_step  the same for a layer: moving statistics in, y and the updated moving statistics out

Gradients are the kernels' own (batch_norm_grad); their derivative, for second and higher orders, is that of the same
formula in plain TensorFlow ops. Callbacks keep nothing and write nothing but arrays of their own, so they are
stateless; moving statistics are updated on copies. gamma, beta and moving_* are float32 or float64 of shape (C,), x is
float32, float64, float16 or bfloat16; mask, where given, has x's rank and extent 1 on the channel axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from .. import functional
from . import formula, host
from .formula import Options

__all__ = ["Options", "train", "train_step"]

_DEFAULT = Options()


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    mask: tf.Tensor | None = None,
    options: Options = _DEFAULT,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, mean, variance) of one batch, each differentiable in x, gamma and beta.

    y has x's shape and dtype; mean and variance (population) are (C,), float64 for float64 x and float32 otherwise.
    """
    y, mean, variance = _train(_given(x=x, gamma=gamma, beta=beta), _given(mask=mask), options, {})
    dtype = formula.compute_dtype(x)
    return y, tf.cast(mean, dtype), tf.cast(variance, dtype)


def train_step(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    moving_mean: tf.Tensor,
    moving_variance: tf.Tensor,
    mask: tf.Tensor | None,
    momentum: float,
    options: Options,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, moving_mean, moving_variance), the latter two updated by the kernel and without a gradient."""
    constants = _given(mask=mask, moving_mean=moving_mean, moving_variance=moving_variance)
    return _train(_given(x=x, gamma=gamma, beta=beta), constants, options, {"momentum": momentum})


def _given(**tensors: tf.Tensor | None) -> dict[str, tf.Tensor]:
    """Those that are there, as tensors: numpy_function and custom_gradient take no None, and treat variables apart."""
    return {name: tf.convert_to_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}


def _train(
    primal: dict[str, tf.Tensor], constants: dict[str, tf.Tensor], options: Options, update: dict[str, Any]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """y, mean, variance; with `update`, y and the new moving statistics, which pass no gradient on."""

    def op(*values: tf.Tensor) -> Any:
        given = dict(zip(primal, values, strict=True))
        x = given["x"]
        moving = [constants[name].dtype for name in ("moving_mean", "moving_variance") if update]
        y, mean, variance, invstd, *new = host.call(
            partial(_train_callback, **options._asdict(), **update),
            {**given, **constants},
            [x.dtype, tf.float64, tf.float64, tf.float64, *moving],
        )
        y.set_shape(x.shape)
        for statistic in (mean, variance, invstd, *new):
            statistic.set_shape([x.shape[options.axis]])
        saved = {"mean": mean, "invstd": invstd, **_given(mask=constants.get("mask"))}

        def gradient(dy: tf.Tensor, dmean: tf.Tensor, dvariance: tf.Tensor) -> Any:
            upstream = {"dy": dy} if update else {"dy": dy, "dmean": dmean, "dvariance": dvariance}
            return _gradient({**upstream, **given}, saved, options)

        return (y, *(new if update else (mean, variance))), gradient

    return tuple(tf.custom_gradient(op)(*primal.values()))


def _gradient(given: dict[str, tf.Tensor], saved: dict[str, tf.Tensor], options: Options) -> Any:
    """dx, dgamma, dbeta, as many of them as `given` has of x, gamma, beta; its others: dy, dmean, dvariance."""

    def op(*values: tf.Tensor) -> Any:
        tensors = dict(zip(given, values, strict=True))
        primal = _given(x=tensors["x"], gamma=tensors.get("gamma"), beta=tensors.get("beta"))
        words = {name: value for name, value in options._asdict().items() if name != "epsilon"}  # it is in invstd
        gradients = host.call(
            partial(_gradient_callback, **words), {**tensors, **saved}, [tensor.dtype for tensor in primal.values()]
        )
        for gradient, tensor in zip(gradients, primal.values(), strict=True):
            gradient.set_shape(tensor.shape)

        def derivative(*cotangents: tf.Tensor) -> Any:
            return formula.derivative_of_gradient(tensors, cotangents, saved.get("mask"), options)

        return tuple(gradients), derivative

    return tf.custom_gradient(op)(*given.values())


def _train_callback(x: np.ndarray, **words: Any) -> list[np.ndarray]:
    """y, mean, variance, invstd and, where moving statistics were given, their updated copies."""
    moving = [words[name].copy() for name in ("moving_mean", "moving_variance") if name in words]
    words.update(zip(("moving_mean", "moving_variance"), moving, strict=False))
    return [*functional.batch_norm_train(x, **words), *moving]


def _gradient_callback(dy: np.ndarray, x: np.ndarray, **words: Any) -> list[np.ndarray]:
    """dx and, where gamma and beta were given, dgamma and dbeta in their dtypes."""
    result = functional.batch_norm_grad(dy, x, **words)
    parameters = {"gamma": result.dgamma, "beta": result.dbeta}
    return [
        result.dx,
        *(array.astype(words[name].dtype, copy=False) for name, array in parameters.items() if name in words),
    ]
