"""Batch norm of torch tensors on a CUDA device with gradients: an autograd function over bnfast.cuda's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .functional import batch_norm_grad, batch_norm_infer, batch_norm_train

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    moving_mean: Tensor | None = None,
    moving_variance: Tensor | None = None,
    *,
    training: bool = True,
    axis: int = 1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
    correction: int = 0,
    nan_policy: str = "propagate",
) -> Tensor:
    """y of `bnfast.cuda.batch_norm_train` or, with training=False, of `batch_norm_infer`; differentiable once.

    x, gamma, beta and residual get gradients. training=True updates the moving statistics in place; training=False
    takes them as constants. With a residual and an activation, y is kept for the backward and not the residual. A dy
    that doesn't lie in memory as x does is copied.

    Args:
        axis: 1 by default, as torch's modules have it.
        momentum: the weight of the old value: 1 minus torch's.
        x, gamma, beta, residual, moving_mean, moving_variance: as in `bnfast.cuda.batch_norm_train`.
        epsilon, activation, negative_slope, correction, nan_policy: as in `bnfast.cuda.batch_norm_train`.

    Raises:
        RuntimeError: the gradient is differentiated again. And everything that `bnfast.cuda.batch_norm_train` raises.

    Example:
        >>> import torch
        >>> from bnfast.cuda.autograd import batch_norm
        >>> x = torch.tensor([[1.0], [5.0]], device="cuda").requires_grad_()
        >>> batch_norm(x, epsilon=0.0, activation="relu").sum().backward()
        >>> x.grad.tolist()
        [[0.0], [0.0]]

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    shared = {"axis": axis, "activation": activation, "negative_slope": negative_slope}
    steps = {"momentum": momentum, "correction": correction, "nan_policy": nan_policy} if training else None
    y: Tensor = _BatchNorm.apply(x, gamma, beta, residual, moving_mean, moving_variance, epsilon, shared, steps)
    return y


class _BatchNorm(Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        moving_mean: Tensor | None,
        moving_variance: Tensor | None,
        epsilon: float,
        shared: dict[str, Any],
        steps: dict[str, Any] | None,
    ) -> Tensor:
        kwargs = {"epsilon": epsilon, "residual": residual, **shared}
        if steps is not None:
            result = batch_norm_train(x, gamma, beta, moving_mean, moving_variance, **steps, **kwargs)
            y, mean, invstd = result.y, result.mean, result.invstd
        else:
            y = batch_norm_infer(x, moving_mean, moving_variance, gamma, beta, **kwargs)
            assert moving_mean is not None
            assert moving_variance is not None
            mean = moving_mean.double().clone()  # may be updated before the backward
            shifted = moving_variance.double() + epsilon
            invstd = torch.where(shifted == 0, 0.0, shifted.rsqrt())
        ctx.gated = residual is not None and shared["activation"] is not None
        ctx.has_residual, ctx.training, ctx.shared = residual is not None, steps is not None, shared
        ctx.save_for_backward(x, gamma, beta, mean, invstd, y if ctx.gated else None)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, mean, invstd, y = ctx.saved_tensors
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        found: Any = batch_norm_grad(dy, x, mean, invstd, gamma, beta, y=y, training=ctx.training, **ctx.shared)
        dgamma = None if gamma is None else found.dgamma.to(gamma.dtype)
        dbeta = None if beta is None else found.dbeta.to(beta.dtype)
        dresidual = dy if ctx.has_residual and not ctx.gated else found.dresidual
        return found.dx, dgamma, dbeta, dresidual, None, None, None, None, None
