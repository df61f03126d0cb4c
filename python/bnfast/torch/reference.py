"""The formulas of batch norm and group norm in PyTorch's own ops: slow, and differentiable to any order.

    mean = sum(x)/M, variance = sum((x - mean)^2)/M, or both are given
    y = activation(gamma*(x - mean)*invstd + beta + residual)
    invstd = 1/sqrt(variance + epsilon), or 0 where variance + epsilon is 0

They give the derivative of the kernels' backward pass (`derivative_of_gradient`). float16 and bfloat16 are computed in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Grouping, Options

__all__ = ["activate", "batch_norm", "derivative_of_gradient", "gradient", "group_norm"]

Forward = Callable[[Sequence[Tensor | None]], Tensor]


def activate(z: Tensor, activation: str | None, negative_slope: float = 0.2) -> Tensor:
    """The fused activation as PyTorch's op."""
    if activation is None:
        return z
    if activation == "leaky_relu":
        return F.leaky_relu(z, negative_slope)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "hard_silu": F.hardswish,
        "sigmoid": torch.sigmoid,
        "hard_sigmoid": F.hardsigmoid,
        "tanh": torch.tanh,
        "gelu": F.gelu,
        "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
        "elu": F.elu,
        "selu": F.selu,
        "softplus": lambda z: F.softplus(z, threshold=1e30),
        "mish": F.mish,
    }
    return functions[activation](z)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A (C,) vector in the dtype of x, ready to broadcast along axis 1."""
    return vector.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))


def batch_norm(primals: Sequence[Tensor | None], statistics: Tensor, options: Options) -> Tensor:
    """y of x, gamma, beta and residual. statistics: (3, C), read if options.training is False."""
    x, gamma, beta, residual = primals
    assert x is not None
    values = x if x.dtype == torch.float64 else x.float()
    if options.training:
        axes = [i for i in range(x.dim()) if i != 1]
        centered = values - values.mean(axes, keepdim=True)
        shifted = (centered * centered).mean(axes, keepdim=True) + options.epsilon
        invstd = torch.where(shifted > 0, torch.where(shifted > 0, shifted, 1).rsqrt(), 0)
    else:
        centered, invstd = values - per_channel(statistics[0], values), per_channel(statistics[2], values)
    z = centered * invstd
    z = z if gamma is None else z * per_channel(gamma, z)
    z = z if beta is None else z + per_channel(beta, z)
    z = z if residual is None else z + residual.to(z.dtype)
    return activate(z, options.activation, options.negative_slope).to(x.dtype)


def group_norm(primals: Sequence[Tensor | None], grouping: Grouping, options: Options) -> Tensor:
    """y of x, gamma, beta and residual; group and layer norm."""
    x, gamma, beta, residual = primals
    assert x is not None
    values = x if x.dtype == torch.float64 else x.float()
    groups, axes = grouping
    rows = values.reshape(x.shape[0], groups, -1) if groups else values.flatten(-axes)
    centered = rows - rows.mean(-1, keepdim=True)
    shifted = (centered * centered).mean(-1, keepdim=True) + options.epsilon
    z = (centered * torch.where(shifted > 0, torch.where(shifted > 0, shifted, 1).rsqrt(), 0)).reshape(x.shape)
    if groups:
        gamma, beta = (None if v is None else per_channel(v, values) for v in (gamma, beta))
    z = z if gamma is None else z * gamma.to(z.dtype)
    z = z if beta is None else z + beta.to(z.dtype)
    z = z if residual is None else z + residual.to(z.dtype)
    return activate(z, options.activation, options.negative_slope).to(x.dtype)


def gradient(forward: Forward, dy: Tensor, primals: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients with respect to the primals, for a dy that the kernels can't read: many at once, say."""
    with torch.enable_grad():
        inner = [None if t is None else t.detach().requires_grad_() for t in primals]
        found = iter(torch.autograd.grad(forward(inner), [t for t in inner if t is not None], dy))
    return [None if t is None else next(found) for t in inner]


def derivative_of_gradient(
    forward: Forward, dy: Tensor, primals: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients with respect to dy and to each primal, from those with respect to forward's gradients.

    primals and cotangents have one entry per argument of `forward`; absent ones are None. The result is itself
    differentiable if the caller records gradients (create_graph).
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that what dy or gamma owe to x counts only once, in their own graph.
        dy, *inner = (None if t is None else _view(t) for t in (dy, *primals))
        present = [t for t in inner if t is not None]
        y = forward(inner)
        first = torch.autograd.grad(y, present, dy, create_graph=True, allow_unused=True)
        wanted = [c for t, c in zip(inner, cotangents, strict=True) if t is not None]
        pairs = [(g, c) for g, c in zip(first, wanted, strict=True) if g is not None and c is not None]
        pairs = [(g, c) for g, c in pairs if g.requires_grad]
        if not pairs:
            return [None] * (1 + len(inner))
        outputs, given = zip(*pairs, strict=True)
        second = torch.autograd.grad(outputs, [dy, *present], given, create_graph=create_graph, allow_unused=True)
    found = iter(second[1:])
    return [second[0], *(None if t is None else next(found) for t in inner)]


def _view(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
