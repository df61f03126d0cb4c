"""How a Keras model's objects of PyTorch's are copied: the part of the Copier that depends on the backend.

Tensors are copied, because operations may write into them. Those that hold the value of a variable, as an entry of a
torch.nn.ParameterDict and as an attribute of a keras.Variable, stay one tensor in the copy.
"""

from __future__ import annotations

from typing import Any

import torch
from keras.src.backend.torch.trainer import TorchTrainer as Trainer  # Keras has no public name for it

from .object_copy import ObjectCopier

__all__ = ["FUNCTION_KINDS", "SHARED_KINDS", "VARIABLE_KINDS", "FrameworkCopier", "Trainer"]

SHARED_KINDS: tuple[type, ...] = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
FUNCTION_KINDS: tuple[type, ...] = (torch.jit.ScriptFunction,)
VARIABLE_KINDS: tuple[type, ...] = (torch.nn.Parameter,)


class FrameworkCopier(ObjectCopier):
    """Copies tensors and parameters."""

    PACKAGES = ("keras", "torch")  # whose objects are copied attribute by attribute

    def _replace_keys(self, optimizer: Any) -> None:
        """Nothing: on PyTorch Keras's optimizers find a variable by its id, which `_replace_ids` replaces."""

    def _tensor(self, value: Any, path: str) -> Any:
        if value.grad_fn is not None:
            raise self._error(path, "a tensor that autograd has recorded")
        new = value.detach().clone(memory_format=torch.preserve_format)
        if isinstance(value, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=value.requires_grad)
        else:
            new.requires_grad_(value.requires_grad)
        self.pair(value, new)
        vars(new).update((name, self.copy(item, f"{path}.{name}")) for name, item in vars(value).items())
        return new

    def _generator(self, value: Any, path: str) -> Any:
        new = self.pair(value, torch.Generator(value.device))
        new.set_state(value.get_state())
        return new

    FRAMEWORK_HANDLERS: tuple[Any, ...] = (
        ((torch.Tensor,), _tensor),
        ((torch.Generator,), _generator),
        (SHARED_KINDS, ObjectCopier._keep),
        (FUNCTION_KINDS, ObjectCopier._share),
    )
