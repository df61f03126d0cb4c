"""Drop-ins for torch.nn.GroupNorm and LayerNorm: subclasses that change `forward` alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional, group_functional, group_functions
from ..kernels import Declined, Grouping, Options
from ..tensors import PLAIN
from .protocols import as_torch, recorded_as_module

__all__ = ["GroupNorm", "LayerNorm"]


class GroupNorm(torch.nn.GroupNorm):  # type: ignore[misc]
    """torch.nn.GroupNorm on bnfast's kernels: input (N, C, ...), contiguous or channels_last.

    Arguments, state dict, hooks and errors are those of torch.nn.GroupNorm, of which this is a subclass.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.GroupNorm(2, 4)(torch.tensor([[1.0, 3.0, 10.0, 30.0]])).detach().round()
        tensor([[-1.,  1., -1.,  1.]])
    """

    _bnfast_reason = ""

    def forward(self, input: Tensor) -> Tensor:
        """y, normalized per sample and group."""
        plain = type(input) in PLAIN and functional.is_plain_call()
        if not plain and isinstance(input, torch.fx.Proxy):
            return recorded_as_module(self, input)
        try:
            gamma, beta = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            gamma, beta = self.weight, self.bias
        options = Options(True, 0.0, self.eps)
        groups = self.num_groups
        if plain and type(groups) is int and groups > 0:
            try:
                return group_functions.normalize(input, gamma, beta, None, Grouping(groups), options)
            except Declined:
                pass
        y, reason = group_functional.group_norm_otherwise(input, groups, gamma, beta, options)
        if reason != self._bnfast_reason and not torch.compiler.is_compiling():
            self._bnfast_reason = reason
        return y

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles PyTorch's own forward."""
        return as_torch(self)


class LayerNorm(torch.nn.LayerNorm):  # type: ignore[misc]
    """torch.nn.LayerNorm on bnfast's kernels: input whose shape ends with normalized_shape.

    Arguments, state dict, hooks and errors are those of torch.nn.LayerNorm, of which this is a subclass.

    Example:
        >>> import bnfast.torch, torch
        >>> bnfast.torch.LayerNorm(2)(torch.tensor([[1.0, 3.0], [10.0, 30.0]])).detach().round()
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """

    _bnfast_reason = ""

    def forward(self, input: Tensor) -> Tensor:
        """y, normalized over the last axes."""
        plain = type(input) in PLAIN and functional.is_plain_call()
        if not plain and isinstance(input, torch.fx.Proxy):
            return recorded_as_module(self, input)
        try:
            gamma, beta = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            gamma, beta = self.weight, self.bias
        options = Options(True, 0.0, self.eps)
        shape = self.normalized_shape
        axes = len(shape)
        if plain and axes and not input.is_nested and input.shape[-axes:] == shape:
            try:
                return group_functions.normalize(input, gamma, beta, None, Grouping(0, axes), options)
            except Declined:
                pass
        y, reason = group_functional.layer_norm_otherwise(input, shape, gamma, beta, options)
        if reason != self._bnfast_reason and not torch.compiler.is_compiling():
            self._bnfast_reason = reason
        return y

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles PyTorch's own forward."""
        return as_torch(self)
