"""Drop-ins for torch.nn.BatchNorm1d, 2d and 3d: subclasses that change `forward` alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional, functions
from ..kernels import Declined, Options
from ..tensors import PLAIN
from .protocols import as_torch, recorded_as_module

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormForward"]


class BatchNormForward(_BatchNorm):  # type: ignore[misc]
    """What the three classes share. See torch.nn.BatchNorm2d for arguments, shapes and state.

    Attributes:
        _bnfast_reason: why the last call that wasn't on the fast path was left to PyTorch's kernel; "" if it wasn't.
    """

    _bnfast_reason = ""

    def forward(self, input: Tensor) -> Tensor:
        """y of this batch (training, or without running statistics), or from the running statistics."""
        return self._activated(input, None, 0.0)

    def _activated(self, input: Tensor, activation: str | None, negative_slope: float) -> Tensor:
        """The activation of y, in the same pass."""
        plain = type(input) in PLAIN and functional.is_plain_call()
        if not plain and isinstance(input, torch.fx.Proxy):
            return recorded_as_module(self, input)
        self._check_input_dim(input)
        training, momentum = self.training, self.momentum
        factor = 0.0 if momentum is None else momentum
        # Parameters and buffers are read past Module.__getattr__, which costs 0.5 us each. Parametrizations and
        # weight_norm take them out of these dicts; then the attribute is what counts.
        try:
            gamma, beta = self._parameters["weight"], self._parameters["bias"]
            moving_mean, moving_variance = self._buffers["running_mean"], self._buffers["running_var"]
        except KeyError:
            gamma, beta, moving_mean, moving_variance = self.weight, self.bias, self.running_mean, self.running_var
        if training:
            if not self.track_running_stats:
                moving_mean = moving_variance = None
            elif self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if momentum is None:  # the average over all batches
                    factor = 1.0 / float(self.num_batches_tracked)
        use_batch = training or (moving_mean is None and moving_variance is None)
        options = Options(use_batch, 1 - factor, self.eps, activation, negative_slope)
        if plain:
            try:
                return functions.normalize(input, gamma, beta, None, (moving_mean, moving_variance), options)
            except Declined:
                pass
        y, reason = functional.batch_norm_otherwise(input, moving_mean, moving_variance, gamma, beta, factor, options)
        if reason != self._bnfast_reason and not torch.compiler.is_compiling():
            self._bnfast_reason = reason
        return y

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles PyTorch's own forward."""
        return as_torch(self)


class BatchNorm1d(BatchNormForward, torch.nn.BatchNorm1d):  # type: ignore[misc]
    """torch.nn.BatchNorm1d on bnfast's kernels: input (N, C) or (N, C, L).

    Arguments, state dict, hooks, momentum=None, track_running_stats=False and errors are those of torch.nn.BatchNorm1d,
    of which this is a subclass.

    Example:
        >>> import bnfast.torch, torch
        >>> layer = bnfast.torch.BatchNorm1d(2)
        >>> layer(torch.tensor([[1.0, 10.0], [3.0, 30.0]])).round()
        tensor([[-1., -1.],
                [ 1.,  1.]], grad_fn=<RoundBackward0>)
    """


class BatchNorm2d(BatchNormForward, torch.nn.BatchNorm2d):  # type: ignore[misc]
    """torch.nn.BatchNorm2d on bnfast's kernels: input (N, C, H, W), contiguous or channels_last. See BatchNorm1d.

    Example:
        >>> import bnfast.torch, torch
        >>> x = torch.randn(8, 3, 4, 4).to(memory_format=torch.channels_last)
        >>> bnfast.torch.BatchNorm2d(3)(x).is_contiguous(memory_format=torch.channels_last)
        True
    """


class BatchNorm3d(BatchNormForward, torch.nn.BatchNorm3d):  # type: ignore[misc]
    """torch.nn.BatchNorm3d on bnfast's kernels: input (N, C, D, H, W), contiguous or channels_last_3d. See BatchNorm1d.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.BatchNorm3d(3)(torch.randn(8, 3, 2, 4, 4)).shape
        torch.Size([8, 3, 2, 4, 4])
    """
