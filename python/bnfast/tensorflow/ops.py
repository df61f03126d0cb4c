"""Batch normalization as TensorFlow operations, in graph and in eager mode. This file only chooses the bridge.

    train       x, gamma, beta -> y, mean, variance; all three are differentiable
    train_step  the same for a layer: moving statistics in, y and the updated moving statistics out
    moments     x -> mean, variance, which pass no gradient on
    gradient    the backward pass alone, with statistics that the caller gives
    infer       y from given statistics, as a rule made of TensorFlow's own ops

The bridge is bnfast's TensorFlow op (`op`) or, where that can't be loaded, a callback (`numpy_callback`); where
TensorFlow sees a GPU, it is TensorFlow's own ops (`own_ops`), and so are their gradients. The other bridges' gradients
are the kernels' own; second and higher derivatives are those of the same formula in TensorFlow's ops (`reference`).
gamma, beta and moving_* have shape (C,) and are float32 or float64; x is float32, float64, float16 or bfloat16; a mask
has the rank of x and extent 1 on the channel axis. Another framework's bridge needs these five functions.
"""

from __future__ import annotations

from typing import Any, Protocol

import tensorflow as tf

from . import numpy_callback, op, own_ops
from .batch import Batch, GradientInputs, Options
from .inference import infer
from .scalars import Scalar

__all__ = ["gradient", "infer", "moments", "train", "train_step"]

_DEFAULT = Options()
_Three = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


class Bridge(Protocol):
    """What a bridge provides; the modules `op`, `numpy_callback` and `own_ops` are the three."""

    def train(
        self, x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, mask: tf.Tensor | None, options: Options
    ) -> _Three: ...

    def train_step(
        self,
        batch: Batch,
        moving: tuple[tf.Tensor, tf.Tensor],
        momentum: Scalar,
        options: Options,
        *,
        correction: int,
        nan_policy: str,
    ) -> _Three: ...

    def moments(self, x: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tuple[tf.Tensor, tf.Tensor]: ...

    def gradient(
        self, inputs: GradientInputs, options: Options
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]: ...


class KernelBridge(Bridge, Protocol):
    """A bridge to bnfast's kernels, `op` or `numpy_callback`: what follows a step in a graph can be fused with it."""

    def train_step(
        self,
        batch: Batch,
        moving: tuple[tf.Tensor, tf.Tensor],
        momentum: Scalar,
        options: Options,
        *,
        correction: int,
        nan_policy: str,
        record: Any = None,
    ) -> _Three: ...

    def step_gradient(
        self, dy: tf.Tensor, batch: Batch, saved: Any, options: Options, y: tf.Tensor | None
    ) -> dict[str, tf.Tensor]: ...


def choose(bridge: str) -> Bridge:
    """The module of the bridge that the word stands for (`op.choose`)."""
    return choose_kernels(bridge) or own_ops


def choose_kernels(bridge: str) -> KernelBridge | None:
    """The same, or None if the step runs on TensorFlow's own ops."""
    return {"op": op, "numpy_function": numpy_callback}.get(op.choose(bridge))


def train(
    x: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    mask: tf.Tensor | None = None,
    options: Options = _DEFAULT,
    bridge: str = "auto",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, mean, variance) of one batch, each differentiable with respect to x, gamma and beta.

    y has the shape and dtype of x. mean and variance (population) have shape (C,) and are float64 for float64 x and
    float32 otherwise.
    """
    return choose(bridge).train(x, gamma, beta, mask, options)


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: Scalar,
    options: Options,
    bridge: str = "auto",
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(y, moving_mean, moving_variance): the kernel updates the moving statistics, which pass no gradient on.

    Args:
        moving: the moving mean and variance before this step.
        momentum: in [0, 1]; like options.epsilon a float or a float64 scalar tensor, which is checked when it is read.
        nan_policy: "propagate" or "skip_update".
    """
    return choose(bridge).train_step(batch, moving, momentum, options, correction=correction, nan_policy=nan_policy)


def moments(
    x: tf.Tensor, *, mask: tf.Tensor | None = None, options: Options = _DEFAULT, bridge: str = "auto"
) -> tuple[tf.Tensor, tf.Tensor]:
    """(mean, variance) of one batch as float64 of shape (C,). They pass no gradient on."""
    mean, variance = choose(bridge).moments(x, mask, options)
    for statistic in (mean, variance):
        statistic.set_shape([x.shape[options.axis]])
    return tf.stop_gradient(mean), tf.stop_gradient(variance)


def gradient(
    inputs: GradientInputs, options: Options = _DEFAULT, bridge: str = "auto"
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """(dx, dgamma, dbeta, dresidual) for xhat = (x - mean)*invstd with any mean and invstd; dresidual only with y.

    Do not differentiate this function; only the gradients of `train` and `train_step` support it. Its derivative would
    be the one that belongs to x's own mean and invstd. The vectors of `inputs` are float64.
    """
    return choose(bridge).gradient(inputs, options)
