"""Group norm and layer norm as autograd functions on the kernels: the eager way, as functions.py is for batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import kernels, reference
from .kernels import Declined, Grouping, Options, Statistics
from .tensors import is_batched

__all__ = ["gradient", "in_order_of", "normalize", "second_order"]


class GroupNorm(Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        grouping: Grouping,
        options: Options,
    ) -> Tensor:
        y, ctx.statistics = kernels.group_norm(x, gamma, beta, residual, grouping, options)
        ctx.save_for_backward(x, gamma, beta, None if options.activation is None else residual)
        ctx.grouping, ctx.options, ctx.has_residual = grouping, options, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, residual = ctx.saved_tensors
        given = dy, x, gamma, beta, residual, ctx.statistics, ctx.grouping, ctx.options
        found = GroupNormGradient.apply(*given) if torch.is_grad_enabled() else gradient(*given)
        dx, dgamma, dbeta, dresidual = found
        if ctx.has_residual and ctx.options.activation is None:
            dresidual = dy
        return dx, dgamma, dbeta, dresidual, None, None


class GroupNormGradient(Function):  # type: ignore[misc]
    """The backward pass, for a loss that contains a gradient. Its own derivatives are those of the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        statistics: Statistics,
        grouping: Grouping,
        options: Options,
    ) -> Any:
        ctx.save_for_backward(dy, x, gamma, beta, residual)
        ctx.grouping, ctx.options = grouping, options
        ctx.set_materialize_grads(False)
        return gradient(dy, x, gamma, beta, residual, statistics, grouping, options)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        dy, *primals = ctx.saved_tensors
        return (*second_order(dy, primals, ctx.grouping, ctx.options, cotangents), None, None, None)


def gradient(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    statistics: Statistics,
    grouping: Grouping,
    options: Options,
) -> Any:
    """`kernels.group_norm_gradient`, with one copy of a dy that isn't dense or not in the order of x.

    By the formula for many gradients at once.
    """
    if not dy.is_neg():
        try:
            return kernels.group_norm_gradient(dy, x, gamma, beta, residual, statistics, grouping, options)
        except Declined:
            pass
    if is_batched(dy):
        primals = x, gamma, beta, residual
        return reference.gradient(lambda inner: reference.group_norm(inner, grouping, options), dy, primals)
    dy = in_order_of(dy, x)
    return kernels.group_norm_gradient(dy, x, gamma, beta, residual, statistics, grouping, options)


def in_order_of(tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor, or a copy, with the strides of x, which is dense."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


def second_order(
    dy: Tensor, primals: Any, grouping: Grouping, options: Options, cotangents: Any
) -> list[Tensor | None]:
    """The gradients with respect to dy and the primals, from those with respect to `gradient`'s results."""
    return reference.derivative_of_gradient(
        lambda inner: reference.group_norm(inner, grouping, options), dy, primals, cotangents
    )


_apply = super(Function, GroupNorm).apply


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, grouping: Grouping, options: Options
) -> Tensor:
    """y, recorded by autograd if a gradient is wanted.

    Raises:
        Declined: the core doesn't take a tensor as it is; nothing has changed.
    """
    if x.is_neg() or (residual is not None and residual.is_neg()):
        raise Declined
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (gamma is not None and gamma.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, gamma, beta, residual, grouping, options)
    return kernels.group_norm(x, gamma, beta, residual, grouping, options)[0]
