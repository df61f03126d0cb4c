"""Batch norm as autograd functions on the kernels: the eager way.

A dispatched op whose kernel or gradient is Python costs 20 us and more per call. This costs 4 us, less than PyTorch's
own batch norm spends around its kernel. Under torch.compile the ops of library.py take its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..functional import batch_norm_infer
from . import kernels, reference
from .kernels import GATED_BY_Y, Declined, Moving, Options, Statistics
from .tensors import PLAIN, dense, is_batched, memory_format

__all__ = ["gradient", "normalize", "second_order"]


class BatchNorm(Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        moving: Moving,
        options: Options,
    ) -> Tensor:
        step = kernels.train if options.training else kernels.infer
        y, ctx.statistics = step(x, gamma, beta, residual, moving, options)
        kept = None if residual is None else kernels.keeps(options.activation, y, residual)
        ctx.save_for_backward(x, gamma, beta, kept)
        ctx.options, ctx.has_residual = options, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = Gradient.apply(dy, x, gamma, beta, kept, ctx.statistics, ctx.options)
        else:
            found = gradient(dy, x, gamma, beta, kept, ctx.statistics, ctx.options)
        dx, dgamma, dbeta, dresidual = found
        if ctx.has_residual and ctx.options.activation is None:
            dresidual = dy
        return dx, dgamma, dbeta, dresidual, None, None


class Gradient(Function):  # type: ignore[misc]
    """The backward pass, for a loss that contains a gradient. Its own derivatives are those of the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        kept: Tensor | None,
        statistics: Statistics,
        options: Options,
    ) -> Any:
        ctx.save_for_backward(dy, x, gamma, beta, kept)
        ctx.statistics, ctx.options = statistics, options
        ctx.set_materialize_grads(False)
        return gradient(dy, x, gamma, beta, kept, statistics, options)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        dy, *primals = ctx.saved_tensors
        statistics = torch.from_numpy(ctx.statistics)
        return (*second_order(dy, primals, statistics, ctx.options, cotangents), None, None)


def gradient(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    statistics: Statistics,
    options: Options,
) -> Any:
    """`kernels.gradient`, with one copy of a dy that isn't dense or not in the order of x, as that of a sum is.

    By the formula for many gradients at once.
    """
    if not dy.is_neg():
        try:
            return kernels.gradient(dy, x, gamma, beta, kept, statistics, options)
        except Declined:
            pass
    if is_batched(dy):
        return _gradient_by_formula(dy, x, gamma, beta, kept, torch.from_numpy(statistics), options)
    dy = dense(dy, memory_format(x))
    return kernels.gradient(dy, x, gamma, beta, kept, statistics, options)


def _gradient_by_formula(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    kept: Tensor | None,
    statistics: Tensor,
    options: Options,
) -> Any:
    by_y = kept is not None and options.activation in GATED_BY_Y
    if by_y:
        assert kept is not None
        dy, options = dy * _slopes(kept, options), options._replace(activation=None)
    primals = x, gamma, beta, None if by_y else kept
    *found, dresidual = reference.gradient(lambda inner: reference.batch_norm(inner, statistics, options), dy, primals)
    return *found, dy if by_y else dresidual


def second_order(
    dy: Tensor, primals: Any, statistics: Tensor, options: Options, cotangents: Any
) -> list[Tensor | None]:
    """The gradients with respect to dy and the primals, from those with respect to `gradient`'s results.

    primals: x, gamma, beta and what `kernels.keeps` kept.
    """
    x, gamma, beta, y = primals
    if options.activation in GATED_BY_Y:
        y = _output(x, gamma, beta, statistics, options) if y is None else y
        if y is not None:
            return _second_order_by_y(dy, (x, gamma, beta, y), statistics, options, cotangents)
    return reference.derivative_of_gradient(
        lambda inner: reference.batch_norm(inner, statistics, options), dy, primals, cotangents
    )


def _output(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, statistics: Tensor, options: Options
) -> Tensor | None:
    """y anew, with its bits: the formula's rounding could put a z near 0 on the other side of a ReLU's gate.

    None where NumPy doesn't know the tensor: a half type, or one that a compiler traces.
    """
    if type(x) not in PLAIN or x.dtype not in (torch.float32, torch.float64):
        return None
    mean, variance = statistics[0].numpy(), statistics[1].numpy()
    arrays = [None if v is None else v.detach().numpy() for v in (gamma, beta)]
    _, _, epsilon, activation, slope = options
    y = batch_norm_infer(
        x.detach().numpy(),
        mean,
        variance,
        *arrays,
        axis=1,
        epsilon=epsilon,
        activation=activation,
        negative_slope=slope,
    )
    return torch.from_numpy(y)


def _second_order_by_y(
    dy: Tensor, primals: Any, statistics: Tensor, options: Options, cotangents: Any
) -> list[Tensor | None]:
    """With a ReLU: its slopes, which y tells, are constants, and z is linear in the residual."""
    x, gamma, beta, y = primals
    slopes = _slopes(y.detach(), options)
    linear = options._replace(activation=None)
    ddz, *rest = reference.derivative_of_gradient(
        lambda inner: reference.batch_norm((*inner, None), statistics, linear),
        dy * slopes,
        (x, gamma, beta),
        cotangents[:3],
    )
    parts = [part for part in (ddz, cotangents[3]) if part is not None]
    ddy = None if not parts else sum(parts[1:], parts[0]) * slopes
    return [ddy, *rest, None]


def _slopes(y: Tensor, options: Options) -> Tensor:
    """activation'(z) of a ReLU from y; as in the kernels, NaN passes."""
    if options.activation == "leaky_relu":
        return torch.where(y > 0, 1.0, options.negative_slope).to(y.dtype)
    closed = (y <= 0) | (y >= 6) if options.activation == "relu6" else y <= 0
    return torch.where(closed, 0.0, 1.0).to(y.dtype)


# Function.apply in Python only looks for torch.func, whose calls functional.py leaves to PyTorch: 1.7 us less.
_apply = super(Function, BatchNorm).apply


def normalize(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, moving: Moving, options: Options
) -> Tensor:
    """y, recorded by autograd if a gradient is wanted.

    Raises:
        Declined: the core doesn't take a tensor as it is; nothing has changed.
    """
    if x.is_neg() or x.is_mkldnn or (residual is not None and residual.is_neg()):
        raise Declined
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (gamma is not None and gamma.requires_grad)
        or (beta is not None and beta.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, gamma, beta, residual, moving, options)
    if options.training:
        return kernels.train(x, gamma, beta, residual, moving, options)[0]
    return kernels.infer(x, gamma, beta, residual, moving, options, keep=False)[0]
