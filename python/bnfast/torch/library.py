"""Batch norm as dispatched ops (torch.library): the compiled way.

    bnfast::batch_norm_train   x, parameters, moving statistics -> y, statistics, new moving statistics
    bnfast::batch_norm_infer   x, parameters, moving statistics -> y, statistics
    bnfast::batch_norm_grad    dy and what the forward op kept -> dx, dgamma, dbeta, dresidual

The ops are functional and deterministic. The new moving statistics are results, which `normalize` copies into the
buffers, so that a compiler sees what is written. Absent results are empty tensors.
torch.compile, make_fx and fake tensors take the ops whole: each has a fake kernel and an autograd formula.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import functions, kernels, reference
from .kernels import ACTIVATIONS, Options
from .tensors import COMPUTE_DTYPES, dense, memory_format, output_like

__all__ = ["EPILOGUE", "LIBRARY", "TAGS", "absent", "check_epilogue", "epilogue", "normalize", "own"]

LIBRARY = torch.library.Library("bnfast", "DEF")
# The strides that a trace saw are those the op gets: a fake kernel's strides depend on them.
TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
EPILOGUE = "float epsilon, str? activation, float negative_slope"
LIBRARY.define(
    "batch_norm_train(Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor? moving_mean, "
    f"Tensor? moving_variance, float momentum, {EPILOGUE}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "batch_norm_infer(Tensor x, Tensor? gamma, Tensor? beta, Tensor? residual, Tensor moving_mean, "
    f"Tensor moving_variance, {EPILOGUE}) -> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    "batch_norm_grad(Tensor dy, Tensor x, Tensor? gamma, Tensor? beta, Tensor? kept, Tensor statistics, bool training, "
    f"{EPILOGUE}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
_ops = torch.ops.bnfast
Vector: TypeAlias = Tensor | None


def normalize(
    x: Tensor, gamma: Vector, beta: Vector, residual: Vector, moving: tuple[Vector, Vector], options: Options
) -> Tensor:
    """`functions.normalize` through the ops; it takes any strides and half parameters, too."""
    training, momentum, *rest = options
    if not training:
        return _ops.batch_norm_infer(x, gamma, beta, residual, *moving, *rest)[0]
    y, _, *new = _ops.batch_norm_train(x, gamma, beta, residual, *moving, momentum, *rest)
    for old, updated in zip(moving, new, strict=True):
        if old is not None:
            old.detach().copy_(updated)
    return y


def check_epilogue(x: Tensor, activation: str | None, residual: Tensor | None) -> None:
    """Raises a ValueError for an activation or a residual that no way takes."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {[*ACTIVATIONS]}. Received: {activation!r}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        wanted, received = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (x, residual))
        raise ValueError(f"residual must be {wanted}, as input is. Received: {received}")


def epilogue(y: Tensor, activation: str | None, negative_slope: float, residual: Tensor | None) -> Tensor:
    """activation(y + residual) in PyTorch's ops, after its own batch norm."""
    return reference.activate(y if residual is None else y + residual, activation, negative_slope)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def own(vector: Vector, x: Tensor) -> Vector:
    """A vector as the core takes it: contiguous, in the compute dtype of x."""
    return None if vector is None else dense(vector.to(COMPUTE_DTYPES[x.dtype]))


def _like(other: Vector, x: Tensor) -> Vector:
    return None if other is None else dense(other, memory_format(x))


def absent(x: Tensor) -> Tensor:
    return x.new_empty((0,))


def _train(
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    residual: Vector,
    moving_mean: Vector,
    moving_variance: Vector,
    momentum: float,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    dtype = COMPUTE_DTYPES[x.dtype]
    mean, variance = (None if v is None else v.to(dtype, copy=True) for v in (moving_mean, moving_variance))
    options = Options(True, momentum, *rest)
    y, statistics = kernels.train(x, own(gamma, x), own(beta, x), _like(residual, x), (mean, variance), options)
    new = (
        absent(x) if made is None or given is None else made.to(given.dtype)
        for made, given in ((mean, moving_mean), (variance, moving_variance))
    )
    return y, torch.from_numpy(statistics), *new


def _infer(
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    residual: Vector,
    moving_mean: Tensor,
    moving_variance: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    moving = own(moving_mean, x), own(moving_variance, x)
    options = Options(False, 0.0, *rest)
    y, statistics = kernels.infer(x, own(gamma, x), own(beta, x), _like(residual, x), moving, options)
    return y, torch.from_numpy(statistics)


def _grad(
    dy: Tensor,
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    kept: Vector,
    statistics: Tensor,
    training: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    x = dense(x)
    options = Options(training, 0.0, *rest)
    core = dense(dy, memory_format(x)), x, own(gamma, x), own(beta, x), _like(kept, x)
    dx, dgamma, dbeta, dresidual = kernels.gradient(*core, statistics.contiguous().numpy(), options)
    vectors = (
        absent(x) if made is None or given is None else made.to(given.dtype)
        for made, given in ((dgamma, gamma), (dbeta, beta))
    )
    return dx, *vectors, absent(x) if dresidual is None else dresidual


for _name, _kernel in (("train", _train), ("infer", _infer), ("grad", _grad)):
    LIBRARY.impl(f"batch_norm_{_name}", _kernel, "CPU")


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _fake_train(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    moving = (
        absent(x) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in others[3:5]
    )
    return output_like(x), _fake_statistics(x), *moving


def _fake_infer(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return output_like(x), _fake_statistics(x)


def _fake_statistics(x: Tensor) -> Tensor:
    return x.new_empty((3, x.shape[1]), dtype=torch.float64)


def _fake_grad(dy: Tensor, x: Tensor, gamma: Vector, beta: Vector, kept: Vector, *_: Any) -> tuple[Tensor, ...]:
    vectors = (
        absent(x) if v is None else torch.empty_like(v, memory_format=torch.contiguous_format) for v in (gamma, beta)
    )
    return output_like(x), *vectors, absent(x) if kept is None else output_like(x)


for _name, _fake in (("train", _fake_train), ("infer", _fake_infer), ("grad", _fake_grad)):
    torch.library.register_fake(f"bnfast::batch_norm_{_name}", _fake, lib=LIBRARY)


# ---- gradients -------------------------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], training: bool) -> None:
    x, gamma, beta, residual = inputs[:4]
    rest = inputs[-3:]
    y, statistics, *new = output
    ctx.mark_non_differentiable(statistics, *new)
    ctx.set_materialize_grads(False)
    kept = kernels.keeps(rest[1], y, residual)
    ctx.save_for_backward(x, gamma, beta, kept, statistics)
    ctx.training, ctx.rest, ctx.has_residual, ctx.num_inputs = training, rest, residual is not None, len(inputs)


def _keep_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs, output, True)


def _keep_infer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs, output, False)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    if dy is None:
        return (None,) * ctx.num_inputs
    x, gamma, beta, kept, statistics = ctx.saved_tensors
    dx, dgamma, dbeta, dresidual = _ops.batch_norm_grad(dy, x, gamma, beta, kept, statistics, ctx.training, *ctx.rest)
    if kept is None:
        dresidual = dy if ctx.has_residual else None
    found = dx, None if gamma is None else dgamma, None if beta is None else dbeta, dresidual
    return found + (None,) * (ctx.num_inputs - 4)


def _keep_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, training, epsilon, activation, negative_slope = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = Options(training, 0.0, epsilon, activation, negative_slope)
    ctx.set_materialize_grads(False)


def _backward_grad(ctx: Any, *cotangents: Tensor | None) -> Any:
    dy, x, gamma, beta, kept, statistics = ctx.saved_tensors
    primals = x, gamma, beta, kept
    given = [None if t is None else c for t, c in zip(primals, cotangents, strict=True)]
    found = functions.second_order(dy, primals, statistics, ctx.options, given)
    return (*found, None, None, None, None, None)


torch.library.register_autograd("bnfast::batch_norm_train", _backward, setup_context=_keep_train, lib=LIBRARY)
torch.library.register_autograd("bnfast::batch_norm_infer", _backward, setup_context=_keep_infer, lib=LIBRARY)
torch.library.register_autograd("bnfast::batch_norm_grad", _backward_grad, setup_context=_keep_grad, lib=LIBRARY)
