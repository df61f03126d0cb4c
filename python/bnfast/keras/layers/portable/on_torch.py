"""The backend "torch": the kernels through bnfast.torch.ops, on tensors in the CPU's memory."""

from __future__ import annotations

from typing import Any

from ....torch import ops
from .batch import Batch, Options


def why_not(x: Any, mask: Any, options: Options) -> str | None:
    """Why the kernels can't take this call, or None."""
    return ops.why_not(x, mask)


def absent() -> str | None:
    """None: bnfast.torch has kernels wherever PyTorch runs on a CPU."""
    return None


def has_float64() -> bool:
    return True


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
    return ops.train_step(*batch, moving, ops.Options(*options), ops.Update(momentum, correction, nan_policy))


def moments(x: Any, mask: Any, options: Options) -> tuple[Any, Any]:
    """`kernels.moments`, without whether they count."""
    return ops.moments(x, mask, options.axis)


def infer(batch: Batch, moving: tuple[Any, Any], options: Options) -> Any:
    """`kernels.infer`."""
    x, gamma, beta, _, residual = batch
    return ops.infer(x, gamma, beta, residual, moving, ops.Options(*options))


def mark(y: Any, x: Any, run: Any, options: Options, trace: Any) -> None:
    """Without effect: nothing is fused."""


def group_norm(x: Any, gamma: Any, beta: Any, norm: Any) -> Any:
    """`kernels.Framework.group_norm`."""
    return ops.group_norm(x, gamma, beta, norm.axes, norm.groups, norm.epsilon)
