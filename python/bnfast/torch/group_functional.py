"""Group, layer and instance norm with the signatures of torch.nn.functional. This file only chooses the way of a call,
as functional.py does for batch norm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import functional, group_functions, group_library, library
from .functional import Vector
from .kernels import Declined, Grouping, Options
from .tensors import COMPUTE_DTYPES

__all__ = ["group_norm", "instance_norm", "layer_norm"]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Vector = None,
    bias: Vector = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.group_norm on bnfast's kernels, with an activation and a residual in the same pass.

        y = activation(weight * (input - mean)/sqrt(var + eps) + bias + residual)

    Args:
        input: tensor of shape (N, C, ...), contiguous or channels_last; any other strides cost one copy.
        num_groups: divides C. mean and var are those of a sample's group of C/num_groups channels.
        weight, bias: tensors of shape (C,) or None, of the dtype of input; float32 with half types, too.
        activation, negative_slope, residual: as in `batch_norm`.

    Returns:
        y in the shape, dtype and memory format of input; differentiable to any order.

    Raises:
        ValueError, RuntimeError: those of torch.nn.functional.group_norm and of `batch_norm`.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2).round()
        tensor([[-1.,  1., -1.,  1.]])

    Source: Wu and He 2018, https://arxiv.org/abs/1803.08494.
    """
    if activation is not None or residual is not None:
        library.check_epilogue(input, activation, residual)
    options = Options(True, 0.0, eps, activation, negative_slope)
    if type(num_groups) is int and num_groups > 0 and functional.is_plain_call():
        try:
            return group_functions.normalize(input, weight, bias, residual, Grouping(num_groups), options)
        except Declined:
            pass
    return group_norm_otherwise(input, num_groups, weight, bias, options, residual)[0]


def group_norm_otherwise(
    x: Tensor, num_groups: int, gamma: Vector, beta: Vector, options: Options, residual: Tensor | None = None
) -> tuple[Tensor, str]:
    """What is not on the eager way's fast path: y, and why PyTorch's kernel made it, or ""."""
    reason = _why_not(x, options) or _why_not_groups(x, num_groups)
    reason = reason or functional.why_not_vectors(x, (gamma, beta), (x.shape[1],))
    if reason is None:
        return _otherwise(x, gamma, beta, residual, Grouping(num_groups), options), ""
    y = F.group_norm(x, num_groups, gamma, beta, options.epsilon)
    return library.epilogue(y, options.activation, options.negative_slope, residual), reason


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Vector = None,
    bias: Vector = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm on bnfast's kernels, with an activation and a residual in the same pass.

        y = activation(weight * (input - mean)/sqrt(var + eps) + bias + residual)

    Args:
        input: tensor whose shape ends with normalized_shape; strides other than contiguous cost one copy.
        normalized_shape: the extents that are normalized together.
        weight, bias: tensors of shape normalized_shape or None, of the dtype of input; float32 with half types, too.
        activation, negative_slope, residual: as in `batch_norm`.

    Returns:
        y in the shape and dtype of input, contiguous; differentiable to any order.

    Raises:
        ValueError, RuntimeError: those of torch.nn.functional.layer_norm and of `batch_norm`.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.layer_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), (2,)).round()
        tensor([[-1.,  1.],
                [-1.,  1.]])

    Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    if activation is not None or residual is not None:
        library.check_epilogue(input, activation, residual)
    options = Options(True, 0.0, eps, activation, negative_slope)
    axes = len(normalized_shape)
    if functional.is_plain_call() and axes and not input.is_nested and input.shape[-axes:] == tuple(normalized_shape):
        try:
            return group_functions.normalize(input, weight, bias, residual, Grouping(0, axes), options)
        except Declined:
            pass
    return layer_norm_otherwise(input, normalized_shape, weight, bias, options, residual)[0]


def layer_norm_otherwise(
    x: Tensor,
    normalized_shape: Sequence[int],
    gamma: Vector,
    beta: Vector,
    options: Options,
    residual: Tensor | None = None,
) -> tuple[Tensor, str]:
    """As `group_norm_otherwise`."""
    shape = tuple(normalized_shape)
    reason = _why_not(x, options)
    if reason is None and (not shape or tuple(x.shape[-len(shape) :]) != shape):
        reason = "the input's shape doesn't end with normalized_shape"
    reason = reason or functional.why_not_vectors(x, (gamma, beta), shape)
    if reason is None:
        return _otherwise(x, gamma, beta, residual, Grouping(0, len(shape)), options), ""
    y = F.layer_norm(x, shape, gamma, beta, options.epsilon)
    return library.epilogue(y, options.activation, options.negative_slope, residual), reason


def instance_norm(
    input: Tensor,
    running_mean: Vector = None,
    running_var: Vector = None,
    weight: Vector = None,
    bias: Vector = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.instance_norm on bnfast's kernels.

        y = weight * (input - mean)/sqrt(var + eps) + bias

    Args:
        input: tensor of shape (N, C, ...); strides other than contiguous cost one copy, as in PyTorch.
        running_mean, running_var: tensors of shape (C,), both or neither; updated in place with the mean over the
            samples if use_input_stats.
        weight, bias: tensors of shape (C,) or None, of the dtype of input; float32 with half types, too.
        use_input_stats: whether mean and var are those of each sample and channel, or running_mean and running_var.

    Returns:
        y in the shape and dtype of input, contiguous; differentiable to any order.

    Raises:
        ValueError, RuntimeError: those of torch.nn.functional.instance_norm.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.instance_norm(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]])).round()
        tensor([[[-1.,  1.],
                 [-1.,  1.]]])

    Source: Ulyanov, Vedaldi and Lempitsky 2016, https://arxiv.org/abs/1607.08022.
    """
    given = running_mean, running_var, weight, bias
    return instance_norm_otherwise(input, *given, use_input_stats, momentum, eps)[0]


def instance_norm_otherwise(
    x: Tensor,
    running_mean: Vector,
    running_var: Vector,
    gamma: Vector,
    beta: Vector,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, str]:
    """As `group_norm_otherwise`."""
    options = Options(use_input_stats, 1 - momentum, eps)
    moving = running_mean, running_var
    reason = _why_not(x, options)
    if reason is None and (x.dim() < 3 or (use_input_stats and math.prod(x.shape[2:]) == 1)):
        reason = "the input has a single value per channel"
    reason = reason or functional.why_not_moving(moving, options)
    reason = reason or functional.why_not_vectors(x, (gamma, beta, *moving), (x.shape[1],))
    if reason is not None:
        y = F.instance_norm(x, running_mean, running_var, gamma, beta, use_input_stats, momentum, eps)
        return y, reason
    x = x.resolve_neg().contiguous()
    if not use_input_stats:
        return functional.batch_norm(x, running_mean, running_var, gamma, beta, False, momentum, eps), ""
    if running_mean is None or running_var is None:
        return group_norm(x, x.shape[1], gamma, beta, eps), ""
    return _instance_norm_step(x, (running_mean, running_var), gamma, beta, momentum, eps), ""


def _instance_norm_step(
    x: Tensor, moving: tuple[Tensor, Tensor], gamma: Vector, beta: Vector, momentum: float, eps: float
) -> Tensor:
    """A batch norm whose channels are those of all samples; the running statistics are averaged over the samples."""
    N, C = x.shape[:2]
    mean, variance = (v.detach().repeat(N) for v in moving)
    gamma, beta = (None if v is None else v.repeat(N) for v in (gamma, beta))
    y = functional.batch_norm(x.view(1, N * C, *x.shape[2:]), mean, variance, gamma, beta, True, momentum, eps)
    for old, new in zip(moving, (mean, variance), strict=True):
        old.detach().copy_(new.view(N, C).mean(0))
    return y.view(x.shape)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _otherwise(
    x: Tensor, gamma: Vector, beta: Vector, residual: Tensor | None, grouping: Grouping, options: Options
) -> Tensor:
    """The compiled way, or the eager way with converted arguments: dense copies, float32 parameters."""
    if functional.is_recorded(x):
        return group_library.normalize(x, gamma, beta, residual, grouping, options)
    x = group_library.dense_group_input(x, grouping)
    dtype = COMPUTE_DTYPES[x.dtype]
    gamma, beta = (None if v is None else v.to(dtype).resolve_neg().contiguous() for v in (gamma, beta))
    residual = None if residual is None else group_functions.in_order_of(residual, x)
    return group_functions.normalize(x, gamma, beta, residual, grouping, options)


def _why_not(x: Tensor, options: Options) -> str | None:
    reason = functional.why_not_input(x)
    if reason is None and x.numel() == 0:
        reason = "the input is empty"
    if reason is None and not options.epsilon >= 0:
        reason = "eps is negative"
    return reason


def _why_not_groups(x: Tensor, groups: int) -> str | None:
    if isinstance(groups, (bool, float)):
        return "num_groups is no integer"
    if x.dim() < 2 or groups <= 0 or x.shape[1] % groups:
        return "num_groups doesn't divide the channels"
    if x.numel() == groups:
        return "the input has a single value per group"
    return None
