"""How a Keras model's objects of TensorFlow's are copied: the part of the Copier that depends on the backend.

Tensors and static lookup tables are shared; variables and mutable tables are copied.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as Trainer  # Keras has no public names for these
from tensorflow.python.eager.polymorphic_function.atomic_function import AtomicFunction

from .object_copy import ObjectCopier

__all__ = ["FUNCTION_KINDS", "SHARED_KINDS", "VARIABLE_KINDS", "FrameworkCopier", "Trainer"]

SHARED_KINDS: tuple[type, ...] = (
    tf.Tensor, tf.DType, tf.TensorShape, tf.TypeSpec, tf.__internal__.CompositeTensor, tf.data.Dataset, tf.Graph,
    tf.lookup.StaticHashTable, tf.distribute.Strategy, tf.summary.SummaryWriter,
)  # fmt: skip
FUNCTION_KINDS: tuple[type, ...] = (
    type(tf.function(lambda: None)),
    tf.types.experimental.ConcreteFunction,
    AtomicFunction,
)
VARIABLE_KINDS: tuple[type, ...] = (tf.Variable,)


class FrameworkCopier(ObjectCopier):
    """Copies variables, tables, and TensorFlow's wrappers of containers."""

    PACKAGES = ("keras", "tensorflow")  # whose objects are copied attribute by attribute

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[str, str] = {}  # the key of a variable in Keras's optimizers -> that of its copy

    def pair(self, original: Any, copy: Any) -> Any:
        if isinstance(original, tf.Variable) and isinstance(copy, tf.Variable):
            self._keys[original._unique_id] = copy._unique_id
        return super().pair(original, copy)

    @classmethod
    def other_handler(cls, kind: Any) -> Callable[[Any, Any, str], Any]:
        if any(base.__name__ == "ObjectProxy" for base in kind.__mro__):
            return cls._proxy
        package = kind.__module__.split(".")[0]
        if package == "tensorflow" and not _is_structure(kind):
            table = issubclass(kind, tf.__internal__.tracking.Trackable)
            return cls._refuse if table else cls._share
        return cls._object if package in cls.PACKAGES else super().other_handler(kind)

    def _tensor(self, value: Any, path: str) -> Any:
        if value.dtype in (tf.resource, tf.variant) and hasattr(value, "numpy"):
            raise self._error(path, f"the handle of a resource, {self._describe(value)}")
        return value

    def _variable(self, value: Any, path: str) -> Any:
        spread = isinstance(value, tf.distribute.DistributedValues)
        with tf.init_scope(), value.distribute_strategy.scope() if spread else tf.device(value.device):
            if tf.executing_eagerly() and not value.is_initialized():  # reading it may give an empty tensor
                raise self._error(path, f"the variable {value.name}, which has no value")
            new = tf.Variable(
                # Without DeepCopy the two variables would share a buffer, which an op may update in place.
                tf.raw_ops.DeepCopy(x=value.read_value()),
                trainable=value.trainable,
                name=value.name.split(":")[0],
                dtype=value.dtype,
                shape=value.shape,
                aggregation=value.aggregation,
                synchronization=value.synchronization,
            )
        self.pair(value, new)
        others = [name for name in vars(value) if name not in vars(new) or name == "_constraint"]

        def fill() -> None:
            vars(new).update((name, self.copy(vars(value)[name], f"{path}.{name}")) for name in others)

        self._pending.append(fill)
        return new

    def _table(self, value: Any, path: str) -> Any:
        new = tf.lookup.experimental.MutableHashTable(
            value.key_dtype, value.value_dtype, value._default_value, name=value._name
        )
        new.insert(*value.export())
        return self.pair(value, new)

    def _proxy(self, value: Any, path: str) -> Any:
        """TensorFlow's wrappers of dicts and tuples in attributes of a tf.Module."""
        base: Any = next(kind for kind in type(value).__mro__ if kind.__name__ == "ObjectProxy")
        new = self.pair(value, base.__new__(type(value)))
        base.__init__(new, self.copy(value.__wrapped__, path))

        def fill() -> None:
            # `wrapt` hides the attributes of the wrapper itself. TensorFlow's have names with _self_.
            own = next(x for x in gc.get_referents(value) if type(x) is dict and "_self_trainable" in x)
            for name, item in own.items():
                if name.startswith("_self_"):
                    setattr(new, name, self.copy(item, f"{path}.{name}"))

        self._pending.append(fill)
        return new

    def _replace_keys(self, optimizer: Any) -> None:
        """Optimizers find the slots of a variable, and whether it decays, by a key that is unique to it."""
        for item in vars(optimizer).values():
            # TensorFlow wraps the dicts, and compares each with a snapshot.
            wrapped = isinstance(item, dict) and not issubclass(type(item), dict)
            inner = getattr(item, "_self_last_wrapped_dict_snapshot", None) if wrapped else None
            for keys in (getattr(item, "__wrapped__", item), inner):
                if isinstance(keys, dict) and not self._keys.keys().isdisjoint(keys):
                    pairs = [(self._keys.get(key, key), value) for key, value in keys.items()]
                    dict.clear(keys)
                    dict.update(keys, pairs)
                elif isinstance(keys, set) and not self._keys.keys().isdisjoint(keys):
                    new = [self._keys.get(key, key) for key in keys]
                    set.clear(keys)
                    set.update(keys, new)

    FRAMEWORK_HANDLERS: tuple[Any, ...] = (
        ((tf.Variable,), _variable),
        ((tf.Tensor,), _tensor),
        (SHARED_KINDS, ObjectCopier._keep),
        (FUNCTION_KINDS, ObjectCopier._share),
        ((tf.lookup.experimental.MutableHashTable,), _table),
        ((tf.data.Iterator,), ObjectCopier._refuse),
    )


def _is_structure(kind: type) -> bool:
    """Whether a class of TensorFlow's only holds other objects."""
    names = {base.__name__ for base in kind.__mro__}
    return not names.isdisjoint(
        {"AutoTrackable", "TrackableDataStructure", "AttributeSentinel", "NoDependency", "TrackableReference"}
    )
