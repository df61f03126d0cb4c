"""Training-mode batch norm as TensorFlow ops, in graph and in eager mode: one op forward, one backward.

    train       x, gamma, beta -> y, mean, variance; gradients may arrive at all three
    train_step  the same for a layer: moving statistics in, y and the updated moving statistics out
    moments     x -> mean, variance, which pass no gradient on
    gradient    the backward op alone, with statistics of the caller's

Either goes through TensorFlow ops of bnfast's own (`op`) or, wherever these can't be had, through bnfast.functional
in a numpy_function: this file. Gradients are the kernels' own (batch_norm_grad); their derivative, for second and
higher orders, is that of the same formula in plain TensorFlow ops. Callbacks keep nothing and write nothing but arrays
of their own and those made for them (`outs`), so they are stateless; moving statistics are updated on copies. gamma,
beta and moving_* are float32 or float64 of shape (C,), x is float32, float64, float16 or bfloat16; mask, where given,
has x's rank and extent 1 on the channel axis.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from .. import _core
from ..functional import batch_norm as functional
from . import numpy_callback as host
from . import op
from . import reference as formula
from .reference import Batch, Options

__all__ = ["Batch", "Options", "gradient", "moments", "train", "train_step"]

_DEFAULT = Options()
_NO_UPDATE = {"momentum": 0.99, "correction": 0, "nan_policy": "propagate"}  # of moving statistics that aren't there


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    mask: tf.Tensor | None = None,
    options: Options = _DEFAULT,
    bridge: str = "auto",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, mean, variance) of one batch, each differentiable in x, gamma and beta.

    y has x's shape and dtype; mean and variance (population) are (C,), float64 for float64 x and float32 otherwise.
    """
    if op.choose(bridge) == "op":
        return op.train(x, gamma, beta, mask, options)
    y, mean, variance = _train(_given(x=x, gamma=gamma, beta=beta), _given(mask=mask), options, {})
    dtype = formula.compute_dtype(x)
    return y, tf.cast(mean, dtype), tf.cast(variance, dtype)


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: float,
    options: Options,
    bridge: str = "auto",
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, moving mean, moving variance), the latter two updated by the kernel and without a gradient.

    moving: mean and variance so far. nan_policy: "propagate" or "skip_update".
    """
    words: dict[str, Any] = {"correction": correction, "nan_policy": nan_policy}
    if op.choose(bridge) == "op":
        return op.train_step(batch, moving, momentum, options, **words)
    constants = _given(mask=batch.mask, moving_mean=moving[0], moving_variance=moving[1])
    return _train(_given(**batch.primal), constants, options, {"momentum": momentum, **words})


def moments(
    x: tf.Tensor, *, mask: tf.Tensor | None = None, options: Options = _DEFAULT, bridge: str = "auto"
) -> tuple[tf.Tensor, tf.Tensor]:
    """(mean, variance) of one batch, float64 of shape (C,), as constants to the gradient."""
    if op.choose(bridge) == "op":
        mean, variance = op.moments(x, mask, options)
    else:
        tensors = {name: tf.stop_gradient(tensor) for name, tensor in _given(x=x, mask=mask).items()}
        mean, variance = host.call(partial(_moments_callback, axis=options.axis), tensors, [tf.float64, tf.float64])
    for statistic in (mean, variance):
        statistic.set_shape([x.shape[options.axis]])
    return tf.stop_gradient(mean), tf.stop_gradient(variance)


def gradient(
    dy: tf.Tensor,
    x: tf.Tensor,
    mean: tf.Tensor,
    invstd: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    dmean: tf.Tensor,
    dvariance: tf.Tensor,
    *,
    mask: tf.Tensor | None = None,
    y: tf.Tensor | None = None,
    options: Options = _DEFAULT,
    bridge: str = "auto",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """dx, dgamma, dbeta, dresidual (None without y), for xhat = (x - mean)*invstd with any mean and invstd.

    y: of a forward with residual and activation; without either no gradient needs it. The (C,) vectors are float64.
    Other than a train's own, this isn't to be differentiated: it would give the derivative that goes with x's own mean
    and invstd.
    """
    if op.choose(bridge) == "op":
        vectors = mean, invstd, gamma, beta, dmean, dvariance
        return op.gradient(dy, x, *vectors, mask, y, options)
    saved = {"mean": mean, "invstd": invstd, **_given(mask=mask)}
    upstream = {"dy": dy, "dmean": dmean, "dvariance": dvariance}
    primal = _given(x=x, gamma=gamma, beta=beta, y=y)
    dx, dgamma, dbeta, *dresidual = _gradient({**upstream, **primal}, saved, options)
    return dx, dgamma, dbeta, dresidual[0] if dresidual else None


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
        words = {**_NO_UPDATE, **options._asdict(), **update}
        y, mean, invstd, *rest = host.call(
            partial(_train_callback, **words),
            {**given, **constants},
            [x.dtype, tf.float64, tf.float64, *(moving or [tf.float64])],
            _direct("train", words, constants),
            outs={"out": "x"},
        )
        y.set_shape(x.shape)
        for statistic in (mean, invstd, *rest):
            statistic.set_shape([x.shape[options.axis]])
        saved = {"mean": mean, "invstd": invstd, **_given(mask=constants.get("mask"))}

        def gradient(dy: tf.Tensor, dmean: tf.Tensor, dvariance: tf.Tensor) -> Any:
            arriving = {"dy": dy} if update else {"dy": dy, "dmean": dmean, "dvariance": dvariance}
            upstream = {name: tf.convert_to_tensor(d) for name, d in arriving.items()}  # tf.gather's are IndexedSlices
            gradients = _gradient({**upstream, **formula.kept(given, y, options)}, saved, options)
            straight = options.activation is None and "residual" in given
            return (*gradients, upstream["dy"]) if straight else gradients  # without an activation dresidual is dy

        return (y, *(rest if update else (mean, *rest))), gradient

    return tuple(tf.custom_gradient(op)(*primal.values()))


def _gradient(given: dict[str, tf.Tensor], saved: dict[str, tf.Tensor], options: Options) -> Any:
    """dx, dgamma, dbeta, dresidual, those whose primal `given` has (y for residual), in its order.

    Its others: dy, dmean, dvariance.
    """

    def op(*values: tf.Tensor) -> Any:
        tensors = dict(zip(given, values, strict=True))
        passed = {**tensors, **saved}
        primal = [passed[name] for name in (*formula.PRIMAL, "y") if name in passed]
        words = {name: value for name, value in options._asdict().items() if name != "epsilon"}  # it is in invstd
        dtypes = [tensor.dtype for tensor in primal]
        direct = _direct("grad", {**words, "training": True}, saved)
        outs = {"out": "dy", **({"out_dresidual": "dy"} if "y" in passed and options.activation else {})}
        gradients = host.call(partial(_gradient_callback, **words), passed, dtypes, direct, outs)
        for gradient, tensor in zip(gradients, primal, strict=True):
            gradient.set_shape(tensor.shape)

        def derivative(*cotangents: tf.Tensor) -> Any:
            return formula.derivative_of_gradient(tensors, cotangents, saved.get("mask"), options)

        return tuple(gradients), derivative

    return tf.custom_gradient(op)(*given.values())


def _direct(kernel: str, words: dict[str, Any], others: dict[str, tf.Tensor]) -> host.Direct | None:
    """The callback below without its Python frames; it falls back on it. Masks need what functional does to them."""
    return None if "mask" in others else lambda names, slow: _core.Callback(kernel, names, words, slow)


def _train_callback(x: np.ndarray, **words: Any) -> list[np.ndarray]:
    """y, mean, invstd and either the variance or, where moving statistics were given, their updated copies."""
    moving = [words[name].copy() for name in ("moving_mean", "moving_variance") if name in words]
    words.update(zip(("moving_mean", "moving_variance"), moving, strict=False))
    y, mean, variance, invstd = functional.batch_norm_train(x, **words)
    return [y, mean, invstd, *(moving or [variance])]


def _moments_callback(x: np.ndarray, **words: Any) -> list[np.ndarray]:
    _, mean, variance = functional.moments(x, **words)
    return [mean, variance]


def _gradient_callback(dy: np.ndarray, x: np.ndarray, **words: Any) -> list[np.ndarray]:
    """dx and, of dgamma, dbeta and dresidual, those whose primal was given (y for residual), in its dtype."""
    result = functional.batch_norm_grad(dy, x, **words)
    others: dict[str, Any] = {"gamma": result.dgamma, "beta": result.dbeta, "y": result.dresidual}
    return [
        result.dx,
        *(array.astype(words[name].dtype, copy=False) for name, array in others.items() if name in words),
    ]
