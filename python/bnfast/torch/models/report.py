"""The state of a model's normalizations, one row per module.

state   "bnfast", or "torch": the module runs PyTorch's own code, or that of a derived class
fused   the activation after it that eager calls compute in the same pass, such as "ReLU"; "" if there is none
reason  why the state is "torch"; or why a call of a bnfast module was left to PyTorch's kernel; "" otherwise

Other activations and sums are fused by torch.compile(model, backend=bnfast.torch.compiler) alone: in eager calls hooks
and other readers see the tensor in between. The printed report says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _NormBase

from ..modules.sequential import FusedSequential, fused_pairs
from .accelerate import CLASSES, why_unchanged

__all__ = ["Report", "Row", "report"]

_FUSION = (
    "other activations, and sums: fused by torch.compile(model, backend=bnfast.torch.compiler), not in eager calls"
)
_NORMS = (_NormBase, *CLASSES)


@dataclass(frozen=True)
class Row:
    """One normalization, by its name in the model; the model itself has the name ""."""

    name: str
    kind: str
    state: str
    reason: str
    fused: str = ""


@dataclass(frozen=True)
class Report:
    """All normalizations of a model, in the order of `named_modules`. str() gives a table."""

    model: str
    rows: tuple[Row, ...]

    @property
    def torch(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.state == "torch")

    def __str__(self) -> str:
        heads = ("module", "class", "state", "fused", "reason")
        rows = [(row.name, row.kind, row.state, row.fused, row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (heads, *rows)]
        ours = len(self.rows) - len(self.torch)
        told = [_FUSION] if ours else []
        return "\n".join([f"{self.model}: {ours} of {len(self.rows)} normalizations on bnfast", *lines, *told])


def report(module: torch.nn.Module) -> Report:
    """What each normalization of a model runs on, accelerated or not, and why.

    Raises:
        TypeError: `module` is no torch.nn.Module.

    Example:
        >>> import bnfast.torch, torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.LazyBatchNorm1d())
        >>> print(bnfast.torch.report(bnfast.torch.accelerate(model)))
        Sequential: 1 of 2 normalizations on bnfast
        module  class            state   fused  reason
        0       BatchNorm1d      bnfast  ReLU
        2       LazyBatchNorm1d  torch          it is lazy: call the model once, then accelerate it
        other activations, and sums: fused by torch.compile(model, backend=bnfast.torch.compiler), not in eager calls
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module. Received: {type(module).__name__}")
    return Report(type(module).__name__, tuple(_rows(module)))


def _rows(module: torch.nn.Module) -> Iterator[Row]:
    ours = tuple(CLASSES.values())
    sequentials = [one for one in module.modules() if isinstance(one, FusedSequential)]
    fused = {norm: type(after).__name__ for one in sequentials for norm, after in fused_pairs(one)}
    for name, one in module.named_modules():
        kind = type(one).__name__
        if isinstance(one, ours):
            reason = getattr(one, "_bnfast_reason", "")
            reason = f"left to PyTorch in its last such call: {reason}" if reason else ""
            yield Row(name, kind, "bnfast", reason, fused.get(one, ""))
        elif isinstance(one, _NORMS):
            yield Row(name, kind, "torch", why_unchanged(one) or "accelerate() has not been applied")
