"""The functions that a framework provides, and Keras's own ops where it can't. This file only chooses.

    train_step  x, gamma, beta, moving statistics -> y and the updated moving statistics
    moments     x -> mean, variance and whether they count, which pass no gradient on
    infer       y from given statistics

A `Framework` has them for one backend. It says why it can't take a call; the call then runs on Keras's own ops
(`reference`), and the logger `bnfast` says so, once per reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Protocol

import keras
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from . import reference
from .batch import Batch, Options, has_values, mask_varies_by_channel

NAMES = {"torch": "PyTorch", "jax": "JAX"}

_logger = logging.getLogger("bnfast")
_logged: set[str] = set()


class Framework(Protocol):
    """What the modules `on_torch` and `on_jax` have."""

    def why_not(self, x: Any, mask: Any, options: Options) -> str | None:
        """Why the kernels can't take this call, or None."""

    def absent(self) -> str | None:
        """Why this process has no kernels for the backend at all, or None."""

    def has_float64(self) -> bool: ...

    def train_step(
        self,
        batch: Batch,
        moving: tuple[Any, Any],
        momentum: Any,
        options: Options,
        *,
        correction: int,
        nan_policy: str,
    ) -> tuple[Any, Any, Any]: ...

    def moments(self, x: Any, mask: Any, options: Options) -> tuple[Any, Any]: ...

    def infer(self, batch: Batch, moving: tuple[Any, Any], options: Options) -> Any: ...

    def mark(self, y: Any, x: Any, run: Any, options: Options, trace: Any) -> None:
        """Marks y, the output of `train_step`, where the framework fuses what reads it: jax_fusion.mark."""

    def group_norm(self, x: Any, gamma: Any, beta: Any, norm: Any) -> Any:
        """y of the `group_norm.Norm`, or None if these axes aren't for the kernels."""


@functools.cache
def framework() -> Framework:
    """The module of Keras's backend."""
    module: Any = importlib.import_module(f"{__package__}.on_{keras.backend.backend()}")
    return module  # type: ignore[no-any-return]


def name() -> str:
    """The backend, or "keras.ops" where Keras's own ops compute all."""
    return "keras.ops" if framework().absent() else keras.backend.backend()


def count_dtype() -> str:
    """The dtype of counters: JAX has int64 only where it has float64."""
    return "int64" if framework().has_float64() else "int32"


def wide(vector: Any) -> Any:
    """In float64; in float32 where JAX has only that (jax_enable_x64 is off)."""
    return ops.cast(vector, "float64" if framework().has_float64() else "float32")


def train_step(
    batch: Batch,
    moving: tuple[Any, Any],
    momentum: Any,
    options: Options,
    *,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> tuple[Any, Any, Any]:
    """(y, moving_mean, moving_variance): the moving statistics pass no gradient on.

    Args:
        moving: the moving mean and variance before this step.
        momentum: in [0, 1]; like options.epsilon a float or a scalar tensor.
        nan_policy: "propagate" or "skip_update".
    """
    step: Any = framework().train_step if _takes(batch.x, batch.mask, options) else reference.train_step
    return step(batch, moving, momentum, options, correction=correction, nan_policy=nan_policy)  # type: ignore[no-any-return]


def moments(x: Any, mask: Any, options: Options) -> tuple[Any, Any, Any]:
    """(mean, variance, valid) of one batch: `wide` vectors of shape (C,), and whether the batch has any value."""
    if not mask_varies_by_channel(mask, options) and _takes(x, mask, options):
        mean, variance = framework().moments(x, mask, options)
        return wide(mean), wide(variance), has_values(x, mask)
    mean, variance, total = reference.moments(x, mask, options)
    return wide(mean), wide(variance), total > 0


def infer(batch: Batch, moving: tuple[Any, Any], options: Options) -> Any:
    """y in the shape and dtype of x; the mask of the batch is ignored."""
    return (framework().infer if _takes(batch.x, None, options, quiet=True) else reference.infer)(
        batch, moving, options
    )


def mark(y: Any, batch: Batch, run: Any, options: Options, trace: Any) -> None:
    """Marks y, the output of `train_step` of this batch, if the kernels computed it: jax_fusion.mark."""
    if framework().why_not(batch.x, batch.mask, options) is None:
        framework().mark(y, batch.x, run, options, trace)


def group_norm(x: Any, gamma: Any, beta: Any, norm: Any) -> Any:
    """y of a layer or group norm in the shape and dtype of x, or None where Keras's ops have to compute it."""
    return framework().group_norm(x, gamma, beta, norm) if _takes(x, None, Options(epsilon=norm.epsilon)) else None


def _takes(x: Any, mask: Any, options: Options, quiet: bool = False) -> bool:
    """Whether the kernels take this call. If not, the reason is logged, unless only shapes are computed."""
    reason = framework().why_not(x, mask, options)
    if reason is not None and not quiet and reason not in _logged and not in_symbolic_scope():
        _logged.add(reason)
        where = NAMES[keras.backend.backend()]
        _logger.warning("bnfast.keras leaves batch norm to Keras's own ops on %s, because %s", where, reason)
    return reason is None
