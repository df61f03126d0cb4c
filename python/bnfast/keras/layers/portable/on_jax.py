"""The backend "jax": training through bnfast.jax, as custom calls of XLA's.

Inference stays with Keras's own ops: XLA fuses them with what is around, and an exported program runs without bnfast.
So does group norm, for which bnfast.jax has no kernels.
"""

from __future__ import annotations

from typing import Any

import jax

from .... import jax as kernels
from . import jax_fusion, reference
from .batch import Batch, Options, constant


def why_not(x: Any, mask: Any, options: Options) -> str | None:
    """Why the kernels can't take this call, or None. (On other devices than a CPU bnfast.jax takes JAX's own ops.)"""
    return absent() or (None if isinstance(options.epsilon, float) else "epsilon is a value that JAX traces")


def absent() -> str | None:
    """Why this process has no kernels for JAX, or None."""
    available, reason = kernels.status()
    return None if available else reason


def has_float64() -> bool:
    return bool(jax.config.jax_enable_x64)


def train_step(
    batch: Batch,
    moving: tuple[Any, Any],
    momentum: Any,
    options: Options,
    *,
    correction: int,
    nan_policy: str,
) -> tuple[Any, Any, Any]:
    """`kernels.train_step`."""
    x, gamma, beta, mask, residual = batch
    if not isinstance(momentum, float):  # a value that JAX traces: the batch's own statistics, and the average here
        y, *statistics = train_step(batch, moving, 0.0, options, correction=correction, nan_policy=nan_policy)
        return y, *reference.average(moving, statistics, momentum)
    result = kernels.batch_norm_train(
        x,
        gamma,
        beta,
        *moving,
        **options._asdict(),
        momentum=momentum,
        mask=mask,
        residual=residual,
        correction=correction,
        nan_policy=nan_policy,
    )
    return result.y, constant(result.moving_mean), constant(result.moving_variance)


def moments(x: Any, mask: Any, options: Options) -> tuple[Any, Any]:
    """`kernels.moments`, without whether they count."""
    mean, variance = kernels.moments(x, axis=options.axis, mask=mask)
    return mean, variance


def infer(batch: Batch, moving: tuple[Any, Any], options: Options) -> Any:
    """`kernels.infer`, in Keras's own ops."""
    return reference.infer(batch, moving, options)


def mark(y: Any, x: Any, run: Any, options: Options, trace: Any) -> None:
    """`jax_fusion.mark`."""
    jax_fusion.mark(y, x, run, options, trace)


def group_norm(x: Any, gamma: Any, beta: Any, norm: Any) -> Any:
    """None: Keras's own ops compute it."""
    return None
