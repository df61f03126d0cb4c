"""How a Keras model's objects of JAX's are copied: the part of the Copier that depends on the backend.

Arrays never change, but they are copied: Keras's compiled steps donate the arrays of a model's variables, which ends
every other use of them.
"""

from __future__ import annotations

from typing import Any

import jax
from keras.src.backend.jax.trainer import JAXTrainer as Trainer  # Keras has no public name for it

from .object_copy import ObjectCopier

__all__ = ["FUNCTION_KINDS", "SHARED_KINDS", "VARIABLE_KINDS", "FrameworkCopier", "Trainer"]

SHARED_KINDS: tuple[type, ...] = (jax.Device, jax.sharding.Sharding, jax.sharding.Mesh)
FUNCTION_KINDS: tuple[type, ...] = (type(jax.jit(lambda: None)),)
VARIABLE_KINDS: tuple[type, ...] = ()


class FrameworkCopier(ObjectCopier):
    """Copies arrays."""

    PACKAGES = ("keras",)  # whose objects are copied attribute by attribute

    def _replace_keys(self, optimizer: Any) -> None:
        """Nothing: on JAX Keras's optimizers find a variable by its id, which `_replace_ids` replaces."""

    def _array_of_jax(self, value: Any, path: str) -> Any:
        return self.pair(value, value.copy())

    def _tracer(self, value: Any, path: str) -> Any:
        raise self._error(path, "an array of a function that JAX is tracing")

    FRAMEWORK_HANDLERS: tuple[Any, ...] = (
        ((jax.Array,), _array_of_jax),
        ((jax.core.Tracer,), _tracer),
        (SHARED_KINDS, ObjectCopier._keep),
        (FUNCTION_KINDS, ObjectCopier._share),
    )
