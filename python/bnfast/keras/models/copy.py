"""Copies a built Keras model (TensorFlow backend) object by object, without configs.

    twin = duplicate(model)

`duplicate` walks everything that the model reaches and copies it once: classes, attributes, layers, weights, the graph
of symbolic tensors, and the compiled state. It allocates each copy with object.__new__ and fills its __dict__, so no
__init__, no __setattr__ and no config is involved, and whatever was shared in the model is shared in the copy. What is
immutable (tensors, functions, dtypes, static lookup tables) is shared with the original. The train, test and
predict functions are dropped; Keras makes new ones. Calls in other models keep their index, but not their inputs.

A function of the user's that captures a layer, a variable, an optimizer or a metric can't be copied: `duplicate` then
raises ValueError. The original is only read.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import functools
import gc
import inspect
import logging
import pathlib
import re
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from fractions import Fraction
from typing import Any
from uuid import UUID

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.tracking import Tracker  # Keras has no public name for it
from tensorflow.python.eager.polymorphic_function.atomic_function import AtomicFunction

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range})
SHARED: tuple[type, ...] = (
    type, types.ModuleType, types.CodeType, types.GenericAlias, types.UnionType, property, staticmethod, classmethod,
    str, bytes, int, float, complex, np.generic, np.dtype, np.ufunc, enum.Enum, decimal.Decimal, Fraction, UUID,
    re.Pattern, pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    inspect.Signature, inspect.Parameter, logging.Logger, logging.Handler,
    tf.Tensor, tf.DType, tf.TensorShape, tf.TypeSpec, tf.__internal__.CompositeTensor, tf.data.Dataset, tf.Graph,
    tf.lookup.StaticHashTable, tf.distribute.Strategy, tf.summary.SummaryWriter,
)  # fmt: skip
LOCKS = (type(threading.Lock()), type(threading.RLock()))
WEAK_CONTAINERS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
TF_FUNCTIONS: tuple[type, ...] = (
    type(tf.function(lambda: None)),
    tf.types.experimental.ConcreteFunction,
    AtomicFunction,
)
BUILTIN_METHODS = (types.BuiltinMethodType, types.MethodWrapperType)
# Set by Keras during fit, evaluate and predict. Each is made anew when it is None.
COMPILED = frozenset({"train_function", "test_function", "predict_function", "_eval_epoch_iterator"})
# Where TensorFlow lists the attributes of an object for checkpoints, those functions among them.
DEPENDENCIES = ("_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names")
# Numbers below this are never the id() of an object on a 64-bit system.
SMALLEST_ID = 1 << 20


def duplicate(model: Any, shared: Iterable[Any] = ()) -> Any:
    """An independent copy of a built model, equal in everything; the original is not changed.

    shared: objects that the copy refers to as the original does.
    Raises ValueError, with the path of the attribute, if the model holds something that can't be copied.
    """
    copier = Copier()
    for thing in shared:
        copier.pair(thing, thing)
    copy = copier.copy(model, "model")
    copier.finish()
    return copy


class Copier:
    """Copies objects that belong together. `copy` allocates, `finish` fills what was allocated.

    `pair` declares an existing object as the copy of another one. Only immutable objects are copied recursively: the
    others wait in a list until they are filled, because graphs are a thousand nodes deep.
    """

    def __init__(self, advice: str = "accelerate(model, inplace=True) changes the model itself") -> None:
        self._advice = advice  # ends the message of errors
        self._memo: dict[int, tuple[Any, Any]] = {}  # id(original) -> (original, copy); the original keeps its id
        self._pending: list[Callable[[], None]] = []
        self._hashing: list[Callable[[], None]] = []  # wait until the keys are filled, which their hash may depend on
        self._nodes: list[tuple[Any, str, list[Any], list[Any]]] = []  # operation, attribute, original nodes, copies
        self._weak: list[Callable[[], None]] = []
        self._with_ids: list[tuple[Any, Any]] = []  # (original, copy) of the dicts and sets that hold large integers
        self._keys: dict[str, str] = {}  # the key of a variable in Keras's optimizers -> that of its copy

    def pair(self, original: Any, copy: Any) -> Any:
        self._memo[id(original)] = (original, copy)
        if isinstance(original, tf.Variable) and isinstance(copy, tf.Variable):
            self._keys[original._unique_id] = copy._unique_id
        return copy

    def pair_layers(self, original: Any, copy: Any) -> None:
        """Pair two layers, with their variables and inner layers if they have the same ones in the same order."""
        inner = [(original, copy)]
        ours, theirs = list(original._flatten_layers()), list(copy._flatten_layers())
        if list(map(type, ours)) == list(map(type, theirs)):
            inner += zip(ours, theirs, strict=True)
        for a, b in inner:
            self.pair(a, b)
            self.pair(a._tracker, b._tracker)
        if len(original.variables) == len(copy.variables):
            for old, new in zip(original.variables, copy.variables, strict=True):
                self.pair(old, new)
                self.pair(old.value, new.value)

    def copy_attributes(self, original: Any, copy: Any, names: Iterable[str]) -> None:
        """Give a layer copies of attributes of another one; what they hold is tracked as it is there."""
        names = list(names)
        self.fill(original, copy, f"{original.name} ({type(original).__name__})", names)
        self.finish()
        copy._tracked.extend(name for name in original._tracked if name in names)
        for name in names:
            if isinstance(vars(copy)[name], tf.__internal__.tracking.Trackable):
                copy._track_trackable(vars(copy)[name], name=name, overwrite=True)
        for store, (_, held) in original._tracker.config.items():
            for item in held:
                if self.has(item):
                    twin = self._memo[id(item)][1]
                    if twin is not None and not copy._tracker.is_in_store(store, twin):
                        copy._tracker.config[store][1].append(twin)
                        copy._tracker.stored_ids[store].add(id(twin))

    def has(self, original: Any) -> bool:
        return id(original) in self._memo

    def copy(self, value: Any, path: str) -> Any:
        """The copy of a value. It may be empty until `finish`. path: where the value is, for errors."""
        kind: Any = type(value)
        if kind in ATOMS:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known[1]
        return _handler(kind)(self, value, path)

    def finish(self) -> None:
        self._drain()
        self._copy_nodes()
        self._drain()
        for step in self._weak:
            step()
        self._drain()
        self._replace_ids()

    def fill(self, original: Any, copy: Any, path: str, names: Iterable[str]) -> None:
        """Copy these attributes of an object that has a copy."""
        state, target = _dictionary(original), _dictionary(copy)
        for name in names:
            target[name] = self.copy(state[name], f"{path}.{name}")

    def _drain(self) -> None:
        while self._pending or self._hashing:
            (self._pending or self._hashing).pop()()

    def _error(self, path: str, what: str) -> ValueError:
        return ValueError(f"{path} can't be copied: it is {what}. {self._advice}")

    # Objects

    def _object(self, value: Any, path: str) -> Any:
        kind = type(value)
        try:
            new = object.__new__(kind)
        except TypeError:  # a class written in C
            return self._opaque(value, path)
        self._pending.append(lambda: self._attributes(value, new, path))
        return self.pair(value, new)

    def _attributes(self, value: Any, new: Any, path: str) -> None:
        if isinstance(value, keras.Operation):
            path = f"{vars(value).get('name')} ({type(value).__name__})"
        state, target = _dictionary(value), _dictionary(new)
        for name, item in state.items():
            if name in COMPILED and isinstance(value, keras.Model):
                target[name] = None
            elif name in DEPENDENCIES and isinstance(value, keras.Model):
                target[name] = self.copy(_without_compiled(item), f"{path}.{name}")
            elif name in ("_inbound_nodes", "_outbound_nodes") and isinstance(value, keras.Operation):
                target[name] = self._node_list(value, name, item, path)
            elif type(item) is weakref.ref:
                target[name] = item  # keeps the order
                self._weak.append(functools.partial(self._weak_reference, target, name, item))
            else:
                target[name] = self.copy(item, f"{path}.{name}")
        kind: Any = type(value)
        for name, slot in _slots(kind):
            try:
                item = slot.__get__(value)
            except AttributeError:
                continue
            slot.__set__(new, self.copy(item, f"{path}.{name}"))
        if isinstance(value, keras.KerasTensor) and "_keras_history" in state:
            operation, index, _ = state["_keras_history"]
            if operation is not None:  # the call that made the tensor belongs to it, although only the index is held
                self.copy(operation._inbound_nodes[index], f"{path}._keras_history")

    def _opaque(self, value: Any, path: str) -> Any:
        """An object of a class written in C, or with a __deepcopy__ of its own."""
        held = _find_state(value)
        if held is not None:
            raise self._error(path, f"{_describe(value)}, which holds {_describe(held)}")
        try:
            return self.pair(value, deepcopy(value))
        except Exception as error:
            raise self._error(path, f"{_describe(value)} ({type(error).__name__}: {error})") from error

    def _refuse(self, value: Any, path: str) -> Any:
        raise self._error(path, _describe(value))

    def _share(self, value: Any, path: str) -> Any:
        return value

    def _share_without_state(self, value: Any, path: str) -> Any:
        held = _find_state(value)
        if held is not None:
            raise self._error(path, f"{_describe(value)}, which holds {_describe(held)}")
        return value

    def _tensor(self, value: Any, path: str) -> Any:
        if value.dtype in (tf.resource, tf.variant) and hasattr(value, "numpy"):
            raise self._error(path, f"the handle of a resource, {_describe(value)}")
        return value

    # Functions

    def _function(self, value: Any, path: str) -> Any:
        closure = value.__closure__ or ()
        package = value.__globals__.get("__name__", "").split(".")[0]
        if not closure or package not in ("keras", "tensorflow"):
            return self._share_without_state(value, path)
        # Keras wraps `build` and `quantize` of each layer in functions that capture the layer.
        cells = tuple(self._cell(cell, path) for cell in closure)
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        self.pair(value, new)
        new.__kwdefaults__ = value.__kwdefaults__
        new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
        new.__annotations__ = value.__annotations__
        for name, item in vars(value).items():
            vars(new)[name] = self.copy(item, f"{path}.{name}")
        return new

    def _cell(self, value: Any, path: str) -> Any:
        if self.has(value):
            return self._memo[id(value)][1]
        new = self.pair(value, types.CellType())

        try:
            held = value.cell_contents
        except ValueError:  # an empty cell stays empty
            return new

        def fill() -> None:
            new.cell_contents = self.copy(held, path)

        self._pending.append(fill)
        return new

    def _method(self, value: Any, path: str) -> Any:
        owner = self.copy(value.__self__, f"{path}.__self__")
        return self.pair(value, types.MethodType(self.copy(value.__func__, path), owner))

    def _builtin_method(self, value: Any, path: str) -> Any:
        owner = value.__self__
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return value
        return self.pair(value, getattr(self.copy(owner, f"{path}.__self__"), value.__name__))

    def _partial(self, value: Any, path: str) -> Any:
        args = [self.copy(item, f"{path}.args[{i}]") for i, item in enumerate(value.args)]
        kwargs = {name: self.copy(item, f"{path}.keywords[{name!r}]") for name, item in value.keywords.items()}
        new = type(value)(self.copy(value.func, f"{path}.func"), *args, **kwargs)
        vars(new).update((name, self.copy(item, f"{path}.{name}")) for name, item in vars(value).items())
        return self.pair(value, new)

    # Containers

    def _list(self, value: Any, path: str) -> Any:
        kind = type(value)
        new = self.pair(value, list.__new__(kind))

        def fill() -> None:
            list.extend(new, [self.copy(item, f"{path}[{i}]") for i, item in enumerate(list.__iter__(value))])
            self._extras(value, new, path)

        self._pending.append(fill)
        return new

    def _deque(self, value: Any, path: str) -> Any:
        new = self.pair(value, collections.deque.__new__(type(value)))
        collections.deque.__init__(new, (), value.maxlen)

        def fill() -> None:
            collections.deque.extend(new, [self.copy(item, f"{path}[{i}]") for i, item in enumerate(value)])
            self._extras(value, new, path)

        self._pending.append(fill)
        return new

    def _tuple(self, value: Any, path: str) -> Any:
        items = [self.copy(item, f"{path}[{i}]") for i, item in enumerate(tuple.__iter__(value))]
        same = all(old is new for old, new in zip(tuple.__iter__(value), items, strict=True))
        if same and not _dictionary(value):
            return value
        new = self.pair(value, tuple.__new__(type(value), items))
        self._extras(value, new, path)
        return new

    def _dict(self, value: Any, path: str) -> Any:
        base = collections.OrderedDict if issubclass(type(value), collections.OrderedDict) else dict
        new = self.pair(value, base.__new__(type(value)))
        if isinstance(value, collections.defaultdict):
            new.default_factory = self.copy(value.default_factory, f"{path}.default_factory")
        plain = all(type(key) in ATOMS for key in base.keys(value))
        if any(type(key) is int and key > SMALLEST_ID for key in base.keys(value)):
            self._with_ids.append((value, new))

        def fill() -> None:
            for key, item in base.items(value):
                base.__setitem__(new, self.copy(key, path), self.copy(item, f"{path}[{_label(key)}]"))
            self._extras(value, new, path)

        if plain:
            self._pending.append(fill)
        else:
            for key in base.keys(value):
                self.copy(key, path)
            self._hashing.append(fill)
        return new

    def _set(self, value: Any, path: str) -> Any:
        new = self.pair(value, set.__new__(type(value)))
        if any(type(item) is int and item > SMALLEST_ID for item in set.__iter__(value)):
            self._with_ids.append((value, new))
        items = [self.copy(item, path) for item in set.__iter__(value)]

        def fill() -> None:
            set.update(new, items)
            self._extras(value, new, path)

        self._hashing.append(fill)
        return new

    def _frozenset(self, value: Any, path: str) -> Any:
        items = [self.copy(item, path) for item in value]
        if all(old is new for old, new in zip(value, items, strict=True)):
            return value
        self._drain()
        return self.pair(value, frozenset.__new__(type(value), items))

    def _extras(self, value: Any, new: Any, path: str) -> None:
        """The attributes of a container, such as the tracker of Keras's TrackedList."""
        for name, item in _dictionary(value).items():
            _dictionary(new)[name] = self.copy(item, f"{path}.{name}")

    def _slice(self, value: Any, path: str) -> Any:
        return slice(*(self.copy(item, path) for item in (value.start, value.stop, value.step)))

    def _mapping_proxy(self, value: Any, path: str) -> Any:
        return self.pair(value, types.MappingProxyType(self.copy(dict(value), path)))

    def _array(self, value: Any, path: str) -> Any:
        new = self.pair(value, value.copy(order="K"))
        if value.dtype.hasobject:
            for i, item in enumerate(value.flat):
                new.flat[i] = self.copy(item, f"{path}.flat[{i}]")
        new.flags.writeable = value.flags.writeable
        return new

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

    # Threads and weak references

    def _lock(self, value: Any, path: str) -> Any:
        return self.pair(value, type(value)() if type(value) is LOCKS[1] else threading.Lock())

    def _local(self, value: Any, path: str) -> Any:
        new = self.pair(value, type(value)())
        self._pending.append(lambda: self._extras(value, new, path))
        return new

    def _weak_reference(self, target: dict[str, Any], name: str, value: Any) -> None:
        """A reference to the copy of an object of the model, or to the same object outside."""
        referent = value()
        if referent is not None and self.has(referent):
            target[name] = weakref.ref(self._memo[id(referent)][1])

    def _weak_container(self, value: Any, path: str) -> Any:
        new = self.pair(value, type(value)())

        def fill() -> None:
            for item in list(value):
                if isinstance(value, weakref.WeakSet):
                    new.add(self._memo.get(id(item), (item, item))[1])
                else:
                    new[self._memo.get(id(item), (item, item))[1]] = self.copy(value[item], path)

        self._weak.append(fill)
        return new

    # TensorFlow

    def _variable(self, value: Any, path: str) -> Any:
        spread = isinstance(value, tf.distribute.DistributedValues)
        with tf.init_scope(), value.distribute_strategy.scope() if spread else tf.device(value.device):
            try:
                initial = value.read_value()
            except tf.errors.FailedPreconditionError as error:
                raise self._error(path, f"the variable {value.name}, which has no value") from error
            new = tf.Variable(
                # Without DeepCopy the two variables would share a buffer, which an op may update in place.
                tf.raw_ops.DeepCopy(x=initial),
                trainable=value.trainable,
                name=value.name.split(":")[0],
                dtype=value.dtype,
                shape=value.shape,
                aggregation=value.aggregation,
                synchronization=value.synchronization,
            )
        self.pair(value, new)
        others = [name for name in vars(value) if name not in vars(new) or name == "_constraint"]
        self._pending.append(lambda: self.fill(value, new, path, others))
        return new

    def _table(self, value: Any, path: str) -> Any:
        new = tf.lookup.experimental.MutableHashTable(
            value.key_dtype, value.value_dtype, value._default_value, name=value._name
        )
        new.insert(*value.export())
        return self.pair(value, new)

    # Nodes

    def _node_list(self, operation: Any, name: str, nodes: list[Any], path: str) -> Any:
        """The calls that an operation takes part in. Those in other models must not pull these models into the copy."""
        new = self.pair(nodes, list.__new__(type(nodes)))
        self._extras(nodes, new, path)
        self._nodes.append((operation, name, list(nodes), new))
        return new

    def _copy_nodes(self) -> None:
        known = -1
        while known != len(self._nodes):  # a call may bring in more operations
            known = len(self._nodes)
            calls = [node for _, name, nodes, _ in self._nodes if name == "_inbound_nodes" for node in nodes]
            ready = waiting = [node for node in calls if not self.has(node)]
            while ready:  # a call belongs to the model if its inputs do
                ready = [node for node in waiting if all(map(self._is_copied, node.input_tensors))]
                for node in ready:
                    self.copy(node, node.operation.name)
                self._drain()
                waiting = [node for node in waiting if not self.has(node)]
            for node in waiting:
                self._stub(node)
            self._drain()
        for _, _, nodes, new in self._nodes:
            list.extend(new, [self._memo[id(node)][1] for node in nodes if self.has(node)])

    def _is_copied(self, tensor: Any) -> bool:
        operation, index, _ = getattr(tensor, "_keras_history", (None, 0, 0))
        return operation is None or (self.has(operation) and self.has(operation._inbound_nodes[index]))

    def _stub(self, node: Any) -> None:
        """A call in another model: it keeps its index and its outputs, but not what its inputs come from."""
        new = self.pair(node, object.__new__(type(node)))
        operation = self.copy(node.operation, node.operation.name)
        for tensor, source in [(t, None) for t in node.input_tensors] + [(t, operation) for t in node.outputs]:
            if not self.has(tensor):
                mine = self.pair(tensor, object.__new__(type(tensor)))
                vars(mine).update((name, item) for name, item in vars(tensor).items() if name != "_keras_mask")
                if "_keras_history" in vars(tensor):
                    history = tensor._keras_history
                    _, index, place = history if source else (None, 0, 0)
                    mine._keras_history = type(history)(source, index, place)
        vars(new).update((name, self.copy(item, node.operation.name)) for name, item in vars(node).items())

    # What holds ids of other objects

    def _replace_ids(self) -> None:
        for value, new in self._with_ids:
            if isinstance(new, dict):
                items = list(dict.items(new))
                dict.clear(new)
                for key, item in items:
                    dict.__setitem__(new, self._id(key), item)
            else:
                items = [self._id(item) for item in set.__iter__(value)]
                set.clear(new)
                set.update(new, items)
        known = {id(copy) for _, copy in self._memo.values()}
        for original, new in list(self._memo.values()):
            if type(original) is Tracker:
                new.stored_ids = {name: {i for i in ids if i in known} for name, ids in new.stored_ids.items()}
            elif isinstance(original, keras.Function) and "_nodes" in vars(original):
                vars(new)["_nodes"] = set(map(self._node_key, original._nodes))
            elif isinstance(original, keras.optimizers.Optimizer):
                self._replace_keys(new)

    def _id(self, value: Any) -> Any:
        """The id of the copy if this is the id of an object that was copied."""
        known = self._memo.get(value) if type(value) is int else None
        return value if known is None else id(known[1])

    def _node_key(self, key: str) -> str:
        number, index = key.split("_ib-")  # keras.src.ops.function.make_node_key
        return f"{self._id(int(number))}_ib-{index}"

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


# Which method copies an instance of a class: the first entry that is one of its bases.
HANDLERS: tuple[tuple[tuple[type, ...], Callable[[Copier, Any, str], Any]], ...] = (
    ((keras.Variable,), Copier._object),
    ((tf.Variable,), Copier._variable),
    ((tf.Tensor,), Copier._tensor),
    ((types.FunctionType,), Copier._function),
    ((keras.dtype_policies.DTypePolicyMap,), Copier._object),
    ((*SHARED, keras.DTypePolicy), Copier._share),
    (TF_FUNCTIONS, Copier._share_without_state),
    ((tf.lookup.experimental.MutableHashTable,), Copier._table),
    ((types.MethodType,), Copier._method),
    (BUILTIN_METHODS, Copier._builtin_method),
    ((functools.partial,), Copier._partial),
    ((types.CellType,), Copier._cell),
    ((list,), Copier._list),
    ((collections.deque,), Copier._deque),
    ((tuple,), Copier._tuple),
    ((dict,), Copier._dict),
    ((set,), Copier._set),
    ((frozenset,), Copier._frozenset),
    ((slice,), Copier._slice),
    ((types.MappingProxyType,), Copier._mapping_proxy),
    ((np.ndarray,), Copier._array),
    (LOCKS, Copier._lock),
    ((threading.local,), Copier._local),
    (WEAK_CONTAINERS, Copier._weak_container),
    ((weakref.ref, threading.Thread, tf.data.Iterator), Copier._refuse),
    ((keras.Operation, keras.metrics.Metric, keras.optimizers.Optimizer), Copier._object),
)


@functools.cache
def _handler(kind: Any) -> Callable[[Copier, Any, str], Any]:
    for bases, method in HANDLERS:
        if issubclass(kind, bases):
            return method
    if any(base.__name__ == "ObjectProxy" for base in kind.__mro__):
        return Copier._proxy
    if kind.__module__.split(".")[0] == "tensorflow" and not _is_structure(kind):
        table = issubclass(kind, tf.__internal__.tracking.Trackable)
        return Copier._refuse if table else Copier._share_without_state
    if hasattr(kind, "__deepcopy__") and kind.__module__.split(".")[0] not in ("keras", "tensorflow"):
        return Copier._opaque
    return Copier._object


def _is_structure(kind: type) -> bool:
    """Whether a class of TensorFlow's only holds other objects."""
    names = {base.__name__ for base in kind.__mro__}
    return not names.isdisjoint(
        {"AutoTrackable", "TrackableDataStructure", "AttributeSentinel", "NoDependency", "TrackableReference"}
    )


def _dictionary(value: Any) -> dict[str, Any]:
    """The attributes of an object, past any __getattr__; an empty dict if it has none."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


def _without_compiled(dependencies: Any) -> Any:
    if isinstance(dependencies, dict):
        return {name: item for name, item in dependencies.items() if name not in COMPILED}
    return [reference for reference in dependencies if reference.name not in COMPILED]


@functools.cache
def _slots(kind: Any) -> tuple[tuple[str, Any], ...]:
    """The __slots__ of classes written in Python, with mangled names."""
    members = ((name, item) for base in kind.__mro__ for name, item in vars(base).items())
    return tuple((name, item) for name, item in members if isinstance(item, types.MemberDescriptorType))


def _find_state(value: Any) -> Any:
    return find(value, _is_state)


def find(value: Any, matches: Callable[[Any], bool]) -> Any:
    """The first match among what a value reaches, itself included, but not through layers and graphs; else None."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or type(item) in ATOMS:
            continue
        seen.add(id(item))
        if matches(item):
            return item
        # Each list in an attribute of a layer holds the tracker of the layer, and so all its variables.
        if not isinstance(item, (keras.Operation, keras.KerasTensor, Tracker, *SHARED)):
            waiting.extend(_held(item))
    return None


def _is_state(value: Any) -> bool:
    if isinstance(value, keras.layers.Layer):
        return not value.built or bool(value.variables or value._layers)
    kinds = (keras.Variable, tf.Variable, keras.optimizers.Optimizer, keras.metrics.Metric, keras.random.SeedGenerator)
    return isinstance(value, kinds)


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, types.FunctionType):  # not its globals
        yield from value.__closure__ or ()
        yield from value.__defaults__ or ()
        yield value.__kwdefaults__
        yield vars(value)
    elif isinstance(value, TF_FUNCTIONS):
        yield getattr(value, "python_function", None)
        yield getattr(value, "variables", None)
    elif not isinstance(value, weakref.ref):
        yield from gc.get_referents(value)


def _describe(value: Any) -> str:
    if isinstance(value, types.FunctionType):
        return f"the function {value.__qualname__}"
    name = value.name if isinstance(value, tf.Variable) else _dictionary(value).get("name")
    name = name or _dictionary(value).get("_name")
    if isinstance(value, keras.layers.Layer):
        return f"the layer {name} ({type(value).__name__})"
    return f"{name or 'an object'} ({type(value).__name__})"


def _label(key: Any) -> str:
    return repr(key) if type(key) in ATOMS else type(key).__name__
