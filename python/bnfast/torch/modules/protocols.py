"""How our modules look to the tools that record or compile modules by their class."""

from __future__ import annotations

import copy
from typing import Any

import torch


def recorded_as_module(module: torch.nn.Module, x: Any) -> Any:
    """torch.fx: one node for module(x), as for torch.nn's own modules. fx would otherwise trace through forward."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def as_torch(module: torch.nn.Module) -> torch.nn.Module:
    """A module of torch.nn's class over the same parameters and buffers, for torch.jit.script."""
    made = copy.copy(module)
    made.__class__ = torch_class(type(module))
    made.__dict__.pop("_bnfast_reason", None)
    return made


def torch_class(kind: type) -> type:
    """The class of torch.nn's that one of our classes stands for."""
    return next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
