"""Batch norm over any axis, with weights of the statistics: what a layer of Keras's needs of PyTorch.

    train_step  x, parameters, moving statistics -> y and the updated moving statistics
    moments     x -> mean, variance, which pass no gradient on
    infer       y from given statistics
    why_not     why the kernels can't take a tensor

x is read where it lies: `View` gives it the shape that the core takes. A step with a mask, without values or with
epsilon 0 runs on bnfast's NumPy functions, over the same memory; all others on `kernels`. First derivatives are those
of the kernels; second ones are those of the same formula in PyTorch's ops. Under torch.compile the ops of library.py
take the place of the autograd functions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from .. import functional as core
from . import functional, functions, group_functional, kernels, reference
from .kernels import Declined
from .tensors import COMPUTE_DTYPES, dense, is_channels_last, memory_format

__all__ = ["Options", "Update", "group_norm", "infer", "moments", "train_step", "why_not"]


class Options(NamedTuple):
    """What a batch norm computes, its tensors aside. Names and meaning are those of bnfast.batch_norm_train."""

    axis: int = -1
    epsilon: float = 1e-3
    activation: str | None = None
    negative_slope: float = 0.2

    def of_kernels(self, training: bool = True) -> kernels.Options:
        return kernels.Options(training, 0.0, self.epsilon, self.activation, self.negative_slope)


class Update(NamedTuple):
    """How a step updates the moving statistics. momentum: the weight of the old value."""

    momentum: Any  # a float or a scalar tensor
    correction: int = 0
    nan_policy: str = "propagate"


Vector: TypeAlias = Tensor | None
_Two: TypeAlias = tuple[Tensor, Tensor]


class View(NamedTuple):
    """x as the core takes it: channels on axis 1, and dense. A view, unless the strides of x allow none."""

    moved: int | None  # the axis that moves to 1; None: no axis moves
    whole: tuple[int, ...]  # the shape after that
    shape: tuple[int, ...]  # the shape for the core: `whole`, or (N, C, S), or (N, C)

    @staticmethod
    def of(x: Tensor, axis: int) -> View:
        axis %= x.dim()
        if not x.is_contiguous():
            if axis == 1 and is_channels_last(x):
                return View(None, tuple(x.shape), tuple(x.shape))
            if axis != 1 and x.dim() > 1:
                first = x.movedim(axis, 1)
                if first.is_contiguous() or is_channels_last(first):
                    return View(axis, tuple(first.shape), tuple(first.shape))
        inner = (math.prod(x.shape[axis + 1 :]),) if axis + 1 < x.dim() else ()
        return View(None, tuple(x.shape), (math.prod(x.shape[:axis]), x.shape[axis], *inner))

    def to_core(self, t: Tensor) -> Tensor:
        return (t if self.moved is None else t.movedim(self.moved, 1)).reshape(self.shape)

    def from_core(self, t: Tensor) -> Tensor:
        t = t.reshape(self.whole)
        return t if self.moved is None else t.movedim(1, self.moved)


def why_not(x: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the kernels can't take x, or None."""
    reason = functional.why_not_input(x)
    if reason is None and mask is not None and functional.is_recorded(x):
        return "a compiler records the call, and the recorded ops take no mask"
    return reason


def train_step(
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    mask: Tensor | None,
    residual: Tensor | None,
    moving: _Two,
    options: Options,
    update: Update,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, moving_mean, moving_variance): new tensors; the given moving statistics are not written.

    Args:
        x: any rank and strides, of a dtype and device that `why_not` accepts.
        gamma, beta: shape (C,), a float dtype.
        mask: weights >= 0 with the rank of x, extent 1 on the axis, and extents that broadcast to x; or None.
        residual: the shape and dtype of x; added before the activation.
        moving: the moving mean and variance, float32 or float64. A batch without weight leaves them as they are.
    """
    gamma, beta = (None if v is None else v.to(COMPUTE_DTYPES[x.dtype]) for v in (gamma, beta))
    if mask is None and x.numel() and options.epsilon > 0:
        if functional.is_recorded(x):
            y, statistics = _recorded(x, gamma, beta, residual, options)
            return y, *_updated(moving, statistics, x, options, update)
        found: list[Any] = []
        try:
            y = _OnKernels.apply(x, gamma, beta, residual, options, found)
        except Declined:
            pass
        else:
            return y, *_updated(moving, torch.from_numpy(found[0]), x, options, update)
    new = [statistic.detach().clone() for statistic in moving]
    y = _OnArrays.apply(x, gamma, beta, residual, mask, options, new, update)
    return y, new[0], new[1]


def moments(x: Tensor, mask: Tensor | None, axis: int) -> _Two:
    """(mean, variance) of one batch as float64 of shape (C,)."""
    if functional.is_recorded(x):
        _, statistics = _recorded(x.detach(), None, None, None, Options(axis, 1.0))
        return statistics[0], statistics[1]
    view = View.of(x, axis) if mask is None else None
    values, axis = (x, axis) if view is None else (view.to_core(x), 1)
    _, mean, variance = core.moments(_array(values), axis=axis, mask=None if mask is None else _array(mask))
    return torch.from_numpy(mean), torch.from_numpy(variance)


def infer(x: Tensor, gamma: Vector, beta: Vector, residual: Tensor | None, moving: _Two, options: Options) -> Tensor:
    """y from given statistics, differentiable with respect to x, gamma, beta and residual."""
    dtype, view = COMPUTE_DTYPES[x.dtype], View.of(x, options.axis)
    gamma, beta = (None if v is None else v.to(dtype) for v in (gamma, beta))
    mean, variance = (statistic.to(dtype) for statistic in moving)
    y = functional.batch_norm(
        view.to_core(x),
        mean,
        variance,
        gamma,
        beta,
        eps=options.epsilon,
        activation=options.activation,
        negative_slope=options.negative_slope,
        residual=None if residual is None else view.to_core(residual),
    )
    return view.from_core(y)


def group_norm(
    x: Tensor, gamma: Vector, beta: Vector, axes: tuple[int, ...], groups: int | None, epsilon: float
) -> Tensor | None:
    """y of a group norm with channels on `axes`, or, without groups, of a layer norm over them.

    None for axes that the kernels don't take: a layer norm over other axes than the last ones, channels on axis 0.
    gamma and beta have the extents of `axes`, in float32, or in float64 for float64 x.
    """
    rank = x.dim()
    if groups is None:
        if axes != tuple(range(rank - len(axes), rank)) or not x.numel():
            return None
        return group_functional.layer_norm(x, x.shape[rank - len(axes) :], gamma, beta, epsilon)
    (axis,) = axes
    if axis == 0 or not x.numel():
        return None
    x = x.movedim(axis, 1)
    return group_functional.group_norm(x, groups, gamma, beta, epsilon).movedim(1, axis)


def _recorded(
    x: Tensor, gamma: Vector, beta: Vector, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(y, statistics) of a step that a compiler records."""
    view = View.of(x, options.axis)
    added = None if residual is None else view.to_core(residual)
    _, *rest = options
    y, statistics, *_ = torch.ops.bnfast.batch_norm_train(view.to_core(x), gamma, beta, added, None, None, 0.0, *rest)
    return view.from_core(y), statistics


def _updated(moving: _Two, statistics: Tensor, x: Tensor, options: Options, update: Update) -> _Two:
    """The moving statistics after a batch with these statistics, in the operations and the order of the core."""
    momentum, correction, nan_policy = update
    mean, variance, _ = statistics.detach()
    count = x.numel() // x.shape[options.axis]
    sample = variance * (count / (count - 1)) if correction and count > 1 else variance
    finite = torch.isfinite(mean) & torch.isfinite(variance) if nan_policy == "skip_update" else None

    def moved(old: Tensor, batch: Tensor) -> Tensor:
        old = old.detach()
        new = (old.double() * momentum + batch * (1 - momentum)).to(old.dtype)
        return new if finite is None else torch.where(finite, new, old)

    return moved(moving[0], mean), moved(moving[1], sample)


def _array(t: Tensor) -> Any:
    """The memory of a CPU tensor as an array; bfloat16 as that of ml_dtypes."""
    t = t.detach().resolve_neg()
    if t.dtype != torch.bfloat16:
        return t.numpy()
    import ml_dtypes

    return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _arrays(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else _array(t) for t in tensors]


class _OnKernels(Function):  # type: ignore[misc]
    """A step on `kernels`; its statistics are appended to `found`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Vector, beta: Vector, residual: Tensor | None, options: Options, found: list[Any]
    ) -> Tensor:
        view = View.of(x, options.axis)
        values = dense(view.to_core(x))
        added = None if residual is None else dense(view.to_core(residual), memory_format(values))
        of_core, statistics = kernels.train(values, gamma, beta, added, (None, None), options.of_kernels())
        y = view.from_core(of_core)
        found.append(statistics)
        kept = None if residual is None else kernels.keeps(options.activation, y, residual)
        ctx.save_for_backward(x, gamma, beta, kept)
        ctx.statistics, ctx.options, ctx.view, ctx.has_residual = statistics, options, view, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, kept = ctx.saved_tensors
        view, options = ctx.view, ctx.options.of_kernels()
        x, upstream, kept = (None if t is None else view.to_core(t) for t in (x, dy, kept))
        x = dense(x)
        kept = None if kept is None else dense(kept, memory_format(x))
        gradient = functions.Gradient.apply if torch.is_grad_enabled() else functions.gradient
        dx, dgamma, dbeta, dresidual = gradient(upstream, x, gamma, beta, kept, ctx.statistics, options)
        dresidual = None if dresidual is None else view.from_core(dresidual)
        if ctx.has_residual and options.activation is None:
            dresidual = dy
        return view.from_core(dx), dgamma, dbeta, dresidual, None, None


class _OnArrays(Function):  # type: ignore[misc]
    """A step on bnfast's NumPy functions, which updates the moving statistics in `moving` in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Vector,
        beta: Vector,
        residual: Tensor | None,
        mask: Tensor | None,
        options: Options,
        moving: list[Tensor],
        update: Update,
    ) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        momentum, correction, nan_policy = update
        _, mean, _, invstd = core.batch_norm_train(
            *_arrays(x, gamma, beta, *moving),
            **options._asdict(),
            momentum=float(momentum),
            correction=correction,
            nan_policy=nan_policy,
            mask=None if mask is None else _array(mask),
            residual=None if residual is None else _array(residual),
            out=_array(y),
        )
        ctx.save_for_backward(x, gamma, beta, residual, mask)
        ctx.statistics, ctx.options = (mean, invstd), options
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, gamma, beta, residual, mask = ctx.saved_tensors
        gradient = _GradientOfArrays.apply if torch.is_grad_enabled() else _gradient_of_arrays
        found = gradient(dy, x, gamma, beta, residual, mask, ctx.statistics, ctx.options)
        return *found, None, None, None, None


def _gradient_of_arrays(
    dy: Tensor, x: Tensor, gamma: Vector, beta: Vector, residual: Tensor | None, mask: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """(dx, dgamma, dbeta, dresidual), each None where its tensor is."""
    (mean, invstd), (axis, _, *activation) = rest
    dx = torch.empty(x.shape, dtype=x.dtype)
    upstream, values, *vectors, added, weights = _arrays(dy.to(x.dtype), x, gamma, beta, residual, mask)
    result = core.batch_norm_grad(
        upstream,
        values,
        mean,
        invstd,
        *vectors,
        axis=axis,
        mask=weights,
        activation=activation[0],
        negative_slope=activation[1],
        residual=added,
        out=_array(dx),
    )
    dgamma, dbeta = (
        None if vector is None else torch.from_numpy(made).to(vector.dtype)
        for vector, made in ((gamma, result.dgamma), (beta, result.dbeta))
    )
    dresidual = None
    if residual is not None:
        dresidual = dy if activation[0] is None else _tensor(result.dresidual)
    return dx, dgamma, dbeta, dresidual


def _tensor(array: Any) -> Tensor:
    """The tensor of an array's memory; the inverse of `_array`."""
    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


class _GradientOfArrays(Function):  # type: ignore[misc]
    """That gradient, for a loss that contains it. Its own derivatives are those of the formula."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *tensors, statistics, options = args
        ctx.save_for_backward(*tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _gradient_of_arrays(*tensors, statistics, options)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        dy, *primals, mask = ctx.saved_tensors
        options = ctx.options

        def forward(inner: Any) -> Tensor:
            return _formula(inner, mask, options)

        found = reference.derivative_of_gradient(forward, dy, primals, cotangents)
        return *found, None, None, None


def _formula(primals: Any, mask: Tensor | None, options: Options) -> Tensor:
    """y of x, gamma, beta and residual in PyTorch's ops."""
    x, gamma, beta, residual = primals
    values = x if x.dtype == torch.float64 else x.float()
    axis = options.axis % x.dim()
    axes = [i for i in range(x.dim()) if i != axis]

    def summed(t: Tensor) -> Tensor:
        return t.sum(axes, keepdim=True) if axes else t  # no axes mean all axes to PyTorch

    weights = torch.ones_like(values) if mask is None else mask.to(values.dtype).expand(values.shape)
    total = summed(weights)
    share = torch.where(weights > 0, weights / torch.where(total > 0, total, 1), 0)
    counted = torch.where(weights > 0, values, 0)  # 0*NaN is NaN
    centered = values - summed(share * counted)
    squares = torch.where(weights > 0, centered, 0) ** 2
    shifted = summed(share * squares) + options.epsilon
    z = centered * torch.where(shifted > 0, torch.where(shifted > 0, shifted, 1).rsqrt(), 0)
    shape = [-1 if i == axis else 1 for i in range(x.dim())]
    z = z if gamma is None else z * gamma.to(z.dtype).reshape(shape)
    z = z if beta is None else z + beta.to(z.dtype).reshape(shape)
    z = z if residual is None else z + residual.to(z.dtype)
    return reference.activate(z, options.activation, options.negative_slope).to(x.dtype)
