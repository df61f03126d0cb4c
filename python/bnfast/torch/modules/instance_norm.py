"""Drop-ins for torch.nn.InstanceNorm1d, 2d and 3d: subclasses that change what `forward` applies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import group_functional
from .protocols import as_torch, recorded_as_module

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "InstanceNormForward"]


class InstanceNormForward(_InstanceNorm):  # type: ignore[misc]
    """What the three classes share. See torch.nn.InstanceNorm2d for arguments, shapes and state."""

    _bnfast_reason = ""

    def forward(self, input: Tensor) -> Tensor:
        """y, normalized per sample and channel; input with or without the axis of samples."""
        if isinstance(input, torch.fx.Proxy):
            return recorded_as_module(self, input)
        return super().forward(input)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        y, reason = group_functional.instance_norm_otherwise(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )
        if reason != self._bnfast_reason and not torch.compiler.is_compiling():
            self._bnfast_reason = reason
        return y

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles PyTorch's own forward."""
        return as_torch(self)


class InstanceNorm1d(InstanceNormForward, torch.nn.InstanceNorm1d):  # type: ignore[misc]
    """torch.nn.InstanceNorm1d on bnfast's kernels: input (N, C, L) or (C, L).

    Arguments, state dict, hooks and errors are those of torch.nn.InstanceNorm1d, of which this is a subclass.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.InstanceNorm1d(2)(torch.tensor([[[1.0, 3.0], [10.0, 30.0]]])).round()
        tensor([[[-1.,  1.],
                 [-1.,  1.]]])
    """


class InstanceNorm2d(InstanceNormForward, torch.nn.InstanceNorm2d):  # type: ignore[misc]
    """torch.nn.InstanceNorm2d on bnfast's kernels: input (N, C, H, W) or (C, H, W). See InstanceNorm1d.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.InstanceNorm2d(3)(torch.randn(8, 3, 4, 4)).shape
        torch.Size([8, 3, 4, 4])
    """


class InstanceNorm3d(InstanceNormForward, torch.nn.InstanceNorm3d):  # type: ignore[misc]
    """torch.nn.InstanceNorm3d on bnfast's kernels: input (N, C, D, H, W) or (C, D, H, W). See InstanceNorm1d.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.InstanceNorm3d(3)(torch.randn(8, 3, 2, 4, 4)).shape
        torch.Size([8, 3, 2, 4, 4])
    """
