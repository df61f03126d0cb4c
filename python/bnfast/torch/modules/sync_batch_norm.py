"""A drop-in for torch.nn.SyncBatchNorm that also runs on the CPU, with exact merges of the statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .. import functional, kernels
from ..kernels import Options
from ..tensors import COMPUTE_DTYPES, dense, memory_format
from .protocols import recorded_as_module

__all__ = ["SyncBatchNorm"]


def _gathered(own: Tensor, group: Any) -> Tensor:
    """`own` of every process, stacked."""
    size = dist.get_world_size(group)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts)


def _merged(own: Tensor, count: int, epsilon: float, group: Any) -> tuple[Tensor, float]:
    """The statistics (3, C) of the batches of all processes, and their number of values per channel.

    own: (3, C), of this process. Chan's formula in float64, in the order of ranks: every process has the same bits.
    """
    message = torch.cat([own[:2], own.new_full((1, own.shape[1]), float(count))])
    means, variances, counts = _gathered(message, group).unbind(1)
    total = counts.sum(0)
    safe = total.clamp(min=1)
    mean = (means * counts).sum(0) / safe
    variance = ((variances + (means - mean).square()) * counts).sum(0) / safe
    shifted = variance + epsilon
    invstd = torch.where(shifted > 0, shifted.rsqrt(), 0)
    return torch.stack([mean, variance, invstd]), float(total[0]) if total.numel() else 0.0


class SyncBatchNormFunction(Function):  # type: ignore[misc]
    """Batch norm with the statistics of all processes. The backward pass sums two (C,) vectors over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, state: Any) -> Tensor:
        moving, momentum, epsilon, group = state
        C = x.shape[1]
        count = x.numel() // C if C else 0
        own = _moments(x, count)
        statistics, total = _merged(own, count, epsilon, group)
        _update(moving, statistics, momentum, total)
        ctx.save_for_backward(x, gamma, beta, statistics)
        ctx.total, ctx.group, ctx.epsilon = total, group, epsilon
        return _apply_statistics(x, statistics, gamma, beta, epsilon)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("SyncBatchNorm has no second derivatives, as in PyTorch: use create_graph=False")
        x, gamma, beta, statistics = ctx.saved_tensors
        C = x.shape[1]
        ones = torch.ones(C, dtype=COMPUTE_DTYPES[x.dtype])
        if x.numel():
            options = Options(False, 0.0, ctx.epsilon)
            dense_dy = dense(dy, memory_format(x))
            # With constant statistics the kernel gives dx0 = invstd*dy, dgamma = sum dy*xhat and dbeta = sum dy.
            _, dgamma, dbeta, _ = kernels.gradient(dense_dy, x, ones, ones, None, statistics.numpy(), options)
            assert dgamma is not None
            assert dbeta is not None
        else:
            dgamma, dbeta = torch.zeros_like(ones), torch.zeros_like(ones)
        sums = torch.stack([dbeta, dgamma]).double()
        dist.all_reduce(sums, group=ctx.group)
        dx = _input_gradient(dy, x, gamma, statistics, sums / max(ctx.total, 1.0))
        return (
            dx,
            None if gamma is None else dgamma.to(gamma.dtype),
            None if beta is None else dbeta.to(beta.dtype),
            None,
        )


def _moments(x: Tensor, count: int) -> Tensor:
    """(3, C): the mean and variance of this process, by the kernel; it makes a y, too, which is not used."""
    statistics = torch.zeros(3, x.shape[1], dtype=torch.float64)
    if count > 1:
        return torch.from_numpy(kernels.train(x, None, None, None, (None, None), Options(True, 0.0, 1.0))[1])
    if count == 1:
        statistics[0] = x.reshape(-1)
    return statistics


def _apply_statistics(
    x: Tensor, statistics: Tensor, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    dtype = COMPUTE_DTYPES[x.dtype]
    moving = statistics[0].to(dtype), statistics[1].to(dtype)
    gamma, beta = (None if v is None else v.detach().to(dtype).contiguous() for v in (gamma, beta))
    return kernels.infer(x, gamma, beta, None, moving, Options(False, 0.0, epsilon), keep=False)[0]


def _input_gradient(dy: Tensor, x: Tensor, gamma: Tensor | None, statistics: Tensor, means: Tensor) -> Tensor:
    """gamma*invstd*(dy - mean(dy) - xhat*mean(dy*xhat)), in the compute dtype of x."""
    dtype = COMPUTE_DTYPES[x.dtype]
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, _, invstd = statistics
    scale = invstd if gamma is None else invstd * gamma.double()
    mean_dy, mean_dy_xhat = means
    mean, slope, scale, offset = (v.to(dtype).reshape(shape) for v in (mean, invstd * mean_dy_xhat, scale, mean_dy))
    dz = dy.to(dtype) - offset - (x.to(dtype) - mean) * slope
    return (dz * scale).to(x.dtype)


def _update(moving: Any, statistics: Tensor, momentum: float, total: float) -> None:
    if moving[0] is None or not total:
        return
    variance = statistics[1] * (total / (total - 1)) if total > 1 else statistics[1]
    for old, new in zip(moving, (statistics[0], variance), strict=True):
        old.detach().copy_(old.double() * (1 - momentum) + new * momentum)


class SyncBatchNorm(torch.nn.SyncBatchNorm):  # type: ignore[misc]
    """torch.nn.SyncBatchNorm on bnfast's kernels, on the CPU (gloo): the statistics of the batches of all processes.

    PyTorch's own runs on GPUs alone. Arguments and state dict are those of torch.nn.SyncBatchNorm. Counts, means and
    variances are merged in float64 and in the order of ranks, so every process has the same bits, whatever the sizes of
    the batches; a process may have an empty batch. Without a process group, or with one process, and in inference it is
    batch norm. Second derivatives are an error, as in PyTorch. On a GPU it is PyTorch's own.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.SyncBatchNorm(3)(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])
    """

    _bnfast_reason = ""

    def forward(self, input: Tensor) -> Tensor:
        """y of the batches of all processes, or from the running statistics."""
        if isinstance(input, torch.fx.Proxy):
            return recorded_as_module(self, input)
        if not input.is_cpu:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or (self.running_mean is None and self.running_var is None)
        mean, variance = self.running_mean, self.running_var
        if self.training and not self.track_running_stats:
            mean = variance = None
        if not (use_batch and self.training and self._is_distributed()):
            return functional.batch_norm(input, mean, variance, self.weight, self.bias, use_batch, momentum, self.eps)
        reason = functional.why_not_input(input) or functional.why_not_vectors(
            input, (self.weight, self.bias, mean, variance), (input.shape[1],)
        )
        if reason is not None:
            raise TypeError(f"input must be a plain float tensor beside parameters of its dtype. Received: {reason}")
        state = (mean, variance), momentum, self.eps, self.process_group or dist.group.WORLD
        return SyncBatchNormFunction.apply(dense(input), self.weight, self.bias, state)

    def _is_distributed(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return bool(dist.get_world_size(self.process_group or dist.group.WORLD) > 1)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """torch.nn.SyncBatchNorm.convert_sync_batchnorm, with this class."""
        converted = super().convert_sync_batchnorm(module, process_group)
        for one in converted.modules():
            if type(one) is torch.nn.SyncBatchNorm:
                one.__class__ = cls
        return converted
