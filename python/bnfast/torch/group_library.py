"""Group norm and layer norm as dispatched ops: the compiled way, as library.py is for batch norm.

bnfast::group_norm        x, parameters -> y, statistics
bnfast::group_norm_grad   dy and what the forward op kept -> dx, dgamma, dbeta, dresidual
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import group_functions, kernels
from .kernels import Grouping, Options
from .library import EPILOGUE, LIBRARY, TAGS, absent, own
from .tensors import is_channels_last

__all__ = ["dense_group_input", "normalize"]

LIBRARY.define(
    f"group_norm(Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, int groups, int axes, {EPILOGUE}) "
    "-> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "group_norm_grad(Tensor dy, Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor statistics, "
    f"int groups, int axes, {EPILOGUE}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_ops = torch.ops.bnfast
Vector: TypeAlias = Tensor | None


def normalize(x: Tensor, gamma: Vector, beta: Vector, residual: Vector, grouping: Grouping, options: Options) -> Tensor:
    """`group_functions.normalize` through the ops; it takes any strides and half parameters, too."""
    return _ops.group_norm(x, gamma, beta, residual, *grouping, *options[2:])[0]


def dense_group_input(x: Tensor, grouping: Grouping) -> Tensor:
    """x, or a contiguous copy. Only group norm reads and writes channels_last, as PyTorch's does."""
    x = x.resolve_neg()
    return x if grouping.groups and is_channels_last(x) else x.contiguous()


def _options(rest: tuple[Any, ...]) -> Options:
    return Options(True, 0.0, *rest)


def _forward(
    x: Tensor, gamma: Vector, beta: Vector, residual: Vector, groups: int, axes: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    grouping = Grouping(groups, axes)
    x = dense_group_input(x, grouping)
    residual = None if residual is None else group_functions.in_order_of(residual, x)
    y, statistics = kernels.group_norm(x, own(gamma, x), own(beta, x), residual, grouping, _options(rest))
    return y, torch.from_numpy(statistics)


def _grad(
    dy: Tensor,
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    residual: Vector,
    statistics: Tensor,
    groups: int,
    axes: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    grouping = Grouping(groups, axes)
    x = dense_group_input(x, grouping)
    residual = None if residual is None else group_functions.in_order_of(residual, x)
    saved = statistics.contiguous().numpy()
    dy = group_functions.in_order_of(dy, x)
    found = kernels.group_norm_gradient(dy, x, own(gamma, x), own(beta, x), residual, saved, grouping, _options(rest))
    dx, dgamma, dbeta, dresidual = found
    vectors = (
        absent(x) if made is None or given is None else made.to(given.dtype)
        for made, given in ((dgamma, gamma), (dbeta, beta))
    )
    return dx, *vectors, absent(x) if dresidual is None else dresidual


def _fake_output(x: Tensor, grouping: Grouping) -> Tensor:
    keeps = grouping.groups and is_channels_last(x)
    return torch.empty_like(x) if keeps else torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(x: Tensor, gamma: Vector, beta: Vector, residual: Vector, groups: int, axes: int, *_: Any) -> Any:
    rows = x.shape[0] * groups
    if not groups:
        rows = 1
        for extent in x.shape[: x.dim() - axes]:
            rows = rows * extent
    return _fake_output(x, Grouping(groups, axes)), x.new_empty((2, rows), dtype=torch.float64)


def _fake_grad(
    dy: Tensor, x: Tensor, gamma: Vector, beta: Vector, residual: Vector, _: Tensor, groups: int, axes: int, *rest: Any
) -> Any:
    form = torch.contiguous_format
    vectors = (absent(x) if v is None else torch.empty_like(v, memory_format=form) for v in (gamma, beta))
    dx, dresidual = (_fake_output(x, Grouping(groups, axes)) for _ in range(2))
    return dx, *vectors, absent(x) if residual is None else dresidual


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, beta, None if rest[3] is None else residual, output[1])
    ctx.rest, ctx.has_residual = rest, residual is not None


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    nothing = (None,) * len(ctx.rest)
    if dy is None:
        return (None,) * 4 + nothing
    x, gamma, beta, residual, statistics = ctx.saved_tensors
    dx, dgamma, dbeta, dresidual = _ops.group_norm_grad(dy, x, gamma, beta, residual, statistics, *ctx.rest)
    if residual is None:
        dresidual = dy if ctx.has_residual else None
    return dx, None if gamma is None else dgamma, None if beta is None else dbeta, dresidual, *nothing


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, gamma, beta, residual, _, groups, axes, *rest = inputs
    ctx.save_for_backward(dy, x, gamma, beta, residual)
    ctx.grouping, ctx.options = Grouping(groups, axes), _options(tuple(rest))
    ctx.set_materialize_grads(False)


def _backward_grad(ctx: Any, *cotangents: Tensor | None) -> Any:
    dy, *primals = ctx.saved_tensors
    given = [None if t is None else c for t, c in zip(primals, cotangents, strict=True)]
    return (*group_functions.second_order(dy, primals, ctx.grouping, ctx.options, given), *(None,) * 6)


LIBRARY.impl("group_norm", _forward, "CPU")
LIBRARY.impl("group_norm_grad", _grad, "CPU")
torch.library.register_fake("bnfast::group_norm", _fake_forward, lib=LIBRARY)
torch.library.register_fake("bnfast::group_norm_grad", _fake_grad, lib=LIBRARY)
torch.library.register_autograd("bnfast::group_norm", _backward, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("bnfast::group_norm_grad", _backward_grad, setup_context=_keep_grad, lib=LIBRARY)
