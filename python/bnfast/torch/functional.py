"""Batch norm with the signature of torch.nn.functional. This file only chooses the way of a call.

eager      functions.py: an autograd function on the kernels
compiled   library.py: dispatched ops with fake kernels, under torch.compile and under dispatch modes
PyTorch's  its own function, for what the kernels don't take: other devices, dtypes and tensor classes, torch.func
           transformations, forward mode, torch.jit, torch.export, empty and invalid input (so errors are PyTorch's)
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import functions, library
from .kernels import Declined, Options
from .tensors import COMPUTE_DTYPES, dense, foreign_call, foreign_tensor, is_symbolic, memory_format

__all__ = [
    "Vector",
    "batch_norm",
    "batch_norm_otherwise",
    "is_plain_call",
    "is_recorded",
    "why_not_batch_norm",
    "why_not_input",
    "why_not_moving",
    "why_not_vectors",
]

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
Vector: TypeAlias = Tensor | None


def is_plain_call() -> bool:
    """Whether nothing but eager autograd looks at the tensors of this call: 0.2 us."""
    return not (
        _is_compiling()
        or _functorch_is_active()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def batch_norm(
    input: Tensor,
    running_mean: Vector,
    running_var: Vector,
    weight: Vector = None,
    bias: Vector = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.batch_norm on bnfast's kernels, with an activation and a residual in the same pass.

        y = activation(weight * (input - mean)/sqrt(var + eps) + bias + residual)
        training: mean and var are the batch's; running = running*(1 - momentum) + batch*momentum, with sample variances
        else: they are running_mean and running_var

    Args:
        input: tensor of shape (N, C, ...), float32, float64, float16 or bfloat16, contiguous or channels_last. Any
            other strides cost one copy. Anything PyTorch's own function accepts is accepted; see docs/pytorch.md for
            what is left to its kernel.
        running_mean, running_var: tensors of shape (C,), both or neither; updated in place in training.
        weight, bias: tensors of shape (C,) or None, of the dtype of input; float32 with half types, too.
        activation: None, "relu", "relu6", "leaky_relu" (with `negative_slope`), "silu", "hard_silu", "sigmoid",
            "hard_sigmoid", "tanh", "gelu", "gelu_tanh", "elu", "selu", "softplus" or "mish".
        residual: tensor with the shape and dtype of input, added before the activation.

    Returns:
        y in the shape, dtype and memory format of input; differentiable to any order.

    Raises:
        ValueError, RuntimeError: those of torch.nn.functional.batch_norm; an unknown activation, or a residual of
            another shape or dtype, is a ValueError.

    Example:
        >>> import bnfast.torch, torch
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> bnfast.torch.batch_norm(x, None, None, training=True, activation="relu").round()
        tensor([[0., 0.],
                [1., 1.]])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    if activation is not None or residual is not None:
        library.check_epilogue(input, activation, residual)
    options = Options(training, 1 - momentum, eps, activation, negative_slope)
    if is_plain_call():
        try:
            return functions.normalize(input, weight, bias, residual, (running_mean, running_var), options)
        except Declined:
            pass
    return batch_norm_otherwise(input, running_mean, running_var, weight, bias, momentum, options, residual)[0]


def batch_norm_otherwise(
    x: Tensor,
    running_mean: Vector,
    running_var: Vector,
    gamma: Vector,
    beta: Vector,
    momentum: float,
    options: Options,
    residual: Tensor | None = None,
) -> tuple[Tensor, str]:
    """What is not on the eager way's fast path: y, and why PyTorch's kernel made it, or "".

    momentum is PyTorch's: it decides to the last bit what its own function computes.
    """
    training, _, eps, activation, negative_slope = options
    moving = running_mean, running_var
    reason = why_not_batch_norm(x, moving, (gamma, beta), options)
    if reason is not None:
        y = F.batch_norm(x, running_mean, running_var, gamma, beta, training, momentum, eps)
        return library.epilogue(y, activation, negative_slope, residual), reason
    if is_recorded(x):
        return library.normalize(x, gamma, beta, residual, moving, options), ""
    return _converted(x, gamma, beta, residual, moving, options), ""


def _converted(
    x: Tensor,
    gamma: Vector,
    beta: Vector,
    residual: Tensor | None,
    moving: tuple[Vector, Vector],
    options: Options,
) -> Tensor:
    """The eager way with converted arguments: dense copies, float32 parameters. Autograd records the conversions."""
    x = dense(x)
    dtype = COMPUTE_DTYPES[x.dtype]
    residual = None if residual is None else dense(residual, memory_format(x))
    gamma, beta = (None if v is None else dense(v.to(dtype)) for v in (gamma, beta))
    own = tuple(None if v is None else dense(v.detach().to(dtype)) for v in moving)
    y = functions.normalize(x, gamma, beta, residual, own, options)  # type: ignore[arg-type]
    if options.training:
        for old, new in zip(moving, own, strict=True):
            if old is not None and new is not None and new.data_ptr() != old.data_ptr():
                old.detach().copy_(new)
    return y


def why_not_batch_norm(
    x: Tensor, moving: tuple[Vector, Vector], parameters: tuple[Vector, Vector], options: Options
) -> str | None:
    """Why PyTorch's own function takes this call, or None."""
    reason = why_not_input(x)
    if reason is not None:
        return reason
    if x.dim() < 2:
        return f"the input has {x.dim()} axes"
    if x.numel() == 0 or (options.training and x.numel() == x.shape[1]):
        return "the input is empty" if x.numel() == 0 else "the input has a single value per channel"
    return why_not_moving(moving, options) or why_not_vectors(x, (*parameters, *moving), (x.shape[1],))


def why_not_input(x: Tensor) -> str | None:
    """Why PyTorch's own function takes every call on x, or None."""
    if not _is_compiling():
        return foreign_call() or foreign_tensor(x)
    # The flag itself: before PyTorch 2.12 or so, torch.compile takes is_exporting() for true.
    exporting = getattr(torch.compiler, "_is_exporting_flag", False)  # PyTorch 2.7
    return "torch.export records PyTorch's own ops" if exporting else foreign_tensor(x)


def why_not_moving(moving: tuple[Vector, Vector], options: Options) -> str | None:
    if (moving[0] is None) is not (moving[1] is None) or (not options.training and moving[0] is None):
        return "running_mean or running_var is None"
    if options.training and not (0 <= options.momentum <= 1 and options.epsilon > 0):
        return "momentum is not in [0, 1] or eps is not positive"
    if not options.epsilon >= 0:
        return "eps is negative"
    return None


def why_not_vectors(x: Tensor, vectors: tuple[Vector, ...], shape: tuple[int, ...]) -> str | None:
    """Why the kernels can't take these parameters and running statistics beside x, or None."""
    given = [v for v in vectors if v is not None]
    if any(not v.is_cpu or v.shape != shape for v in given):
        return "a parameter or running statistic has another shape or device"
    dtypes = {v.dtype for v in given}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, COMPUTE_DTYPES[x.dtype]}:
        return f"parameters have {', '.join(sorted(map(str, dtypes)))} for an input of {x.dtype}"
    return None


def is_recorded(x: Tensor) -> bool:
    """Whether the call must go through dispatched ops: a compiler or a dispatch mode looks at it."""
    return bool(_is_compiling() or _dispatch_modes() or is_symbolic(x))
