"""Copies Python objects that belong together: what was shared among the originals is shared among the copies.

    copier = ObjectCopier()
    twin = copier.copy(thing, "thing")     # allocates; "thing" is how errors name it
    copier.finish()                        # fills what was allocated

Each copy is allocated with object.__new__ and its __dict__ is filled, so that no __init__ and no __setattr__ runs. What
is immutable (functions, dtypes, numbers) is shared with the original. A dict or a set that holds the id() of an object
that was copied gets that of its copy. The originals are only read.
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
from collections.abc import Callable, Iterator
from copy import deepcopy
from fractions import Fraction
from typing import Any
from uuid import UUID

import numpy as np

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range})
SHARED: tuple[type, ...] = (
    type, types.ModuleType, types.CodeType, types.GenericAlias, types.UnionType, property, staticmethod, classmethod,
    str, bytes, int, float, complex, np.generic, np.dtype, np.ufunc, enum.Enum, decimal.Decimal, Fraction, UUID,
    re.Pattern, pathlib.PurePath, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo,
    inspect.Signature, inspect.Parameter, logging.Logger, logging.Handler,
)  # fmt: skip
LOCKS = (type(threading.Lock()), type(threading.RLock()))
WEAK_CONTAINERS = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)
BUILTIN_METHODS = (types.BuiltinMethodType, types.MethodWrapperType)
# Numbers below this are never the id() of an object on a 64-bit system.
SMALLEST_ID = 1 << 20


class ObjectCopier:
    """`copy` allocates, `finish` fills what was allocated. `pair` declares an existing object as the copy of another.

    Only immutable objects are copied recursively: the others wait in a list until they are filled, because graphs are a
    thousand nodes deep. What is shared must not hold anything that has to be copied (`_state`).
    """

    def __init__(self) -> None:
        self._memo: dict[int, tuple[Any, Any]] = {}  # id(original) -> (original, copy); the original keeps its id
        self._pending: list[Callable[[], None]] = []
        self._hashing: list[Callable[[], None]] = []  # wait until the keys are filled, which their hash may depend on
        self._weak: list[Callable[[], None]] = []
        self._with_ids: list[tuple[Any, Any]] = []  # (original, copy) of the dicts and sets that hold large integers

    def pair(self, original: Any, copy: Any) -> Any:
        self._memo[id(original)] = (original, copy)
        return copy

    def pairs(self, kind: type) -> list[tuple[Any, Any]]:
        """(original, copy) for the objects of a class."""
        return [(original, copy) for original, copy in self._memo.values() if isinstance(original, kind)]

    def of(self, original: Any) -> Any:
        """The copy of an object that has one."""
        return self._memo[id(original)][1]

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
        return self.handler(kind)(self, value, path)

    @classmethod
    @functools.cache
    def handler(cls, kind: Any) -> Callable[[Any, Any, str], Any]:
        """The method that copies the objects of a class."""
        for bases, method in cls.HANDLERS:
            if issubclass(kind, bases):
                return method
        return cls.other_handler(kind)

    @classmethod
    def other_handler(cls, kind: Any) -> Callable[[Any, Any, str], Any]:
        """The same for a class that is not listed."""
        return cls._opaque if hasattr(kind, "__deepcopy__") else cls._object

    def finish(self) -> None:
        self._drain()
        for step in self._weak:
            step()
        self._drain()
        self._replace_ids()

    def _drain(self) -> None:
        while self._pending or self._hashing:
            (self._pending or self._hashing).pop()()

    def _error(self, path: str, what: str) -> ValueError:
        return ValueError(f"{path} can't be copied: it is {what}")

    def _state(self, value: Any) -> Any:
        """Something that a value reaches and that must be copied with it; None if there is nothing."""
        return None

    def _describe(self, value: Any) -> str:
        if isinstance(value, types.FunctionType):
            return f"the function {value.__qualname__}"
        held = dictionary(value)
        return f"{held.get('name') or held.get('_name') or 'an object'} ({type(value).__name__})"

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
        kind: Any = type(value)
        for name, item in dictionary(value).items():
            self._attribute(value, new, name, item, path)
        for name, slot in _slots(kind):
            try:
                item = slot.__get__(value)
            except AttributeError:
                continue
            slot.__set__(new, self.copy(item, f"{path}.{name}"))

    def _attribute(self, value: Any, new: Any, name: str, item: Any, path: str) -> None:
        target = dictionary(new)
        if type(item) is weakref.ref:
            target[name] = item  # keeps the order
            self._weak.append(functools.partial(self._weak_reference, target, name, item))
        else:
            target[name] = self.copy(item, f"{path}.{name}")

    def _opaque(self, value: Any, path: str) -> Any:
        """An object of a class written in C, or with a __deepcopy__ of its own."""
        self._share(value, path)
        try:
            return self.pair(value, deepcopy(value))
        except Exception as error:
            raise self._error(path, f"{self._describe(value)} ({type(error).__name__}: {error})") from error

    def _share(self, value: Any, path: str) -> Any:
        held = self._state(value)
        if held is not None:
            raise self._error(path, f"{self._describe(value)}, which holds {self._describe(held)}")
        return value

    def _keep(self, value: Any, path: str) -> Any:
        return value

    def _refuse(self, value: Any, path: str) -> Any:
        raise self._error(path, self._describe(value))

    # Functions

    def _cell(self, value: Any, path: str) -> Any:
        if self.has(value):
            return self.of(value)
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

    def _sequence(self, value: Any, path: str) -> Any:
        base: Any = collections.deque if isinstance(value, collections.deque) else list
        new = self.pair(value, base.__new__(type(value)))
        if base is collections.deque:
            base.__init__(new, (), value.maxlen)

        def fill() -> None:
            base.extend(new, [self.copy(item, f"{path}[{i}]") for i, item in enumerate(base.__iter__(value))])
            self._extras(value, new, path)

        self._pending.append(fill)
        return new

    def _tuple(self, value: Any, path: str) -> Any:
        items = [self.copy(item, f"{path}[{i}]") for i, item in enumerate(tuple.__iter__(value))]
        same = all(old is new for old, new in zip(tuple.__iter__(value), items, strict=True))
        if same and not dictionary(value):
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
        for name, item in dictionary(value).items():
            dictionary(new)[name] = self.copy(item, f"{path}.{name}")

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

    # Threads and weak references

    def _lock(self, value: Any, path: str) -> Any:
        return self.pair(value, type(value)() if type(value) is LOCKS[1] else threading.Lock())

    def _local(self, value: Any, path: str) -> Any:
        """The values of this thread; in any other thread both objects start anew."""
        try:
            new = self.pair(value, type(value)())
        except TypeError as error:  # its arguments are known to nobody
            raise self._error(path, f"{self._describe(value)} ({error})") from error

        def fill() -> None:
            vars(new).update((name, self.copy(item, f"{path}.{name}")) for name, item in vars(value).items())

        self._pending.append(fill)
        return new

    def _weak_reference(self, target: dict[str, Any], name: str, value: Any) -> None:
        """A reference to the copy of an object of the model, or to the same object outside."""
        referent = value()
        if referent is not None and self.has(referent):
            target[name] = weakref.ref(self.of(referent))

    def _weak_container(self, value: Any, path: str) -> Any:
        new = self.pair(value, type(value)())

        def twin(item: Any) -> Any:
            return self.of(item) if self.has(item) else item

        def fill() -> None:
            if isinstance(value, weakref.WeakSet):
                new.update(map(twin, value))
                return
            for key, item in list(value.items()):
                if isinstance(value, weakref.WeakKeyDictionary):
                    new[twin(key)] = self.copy(item, path)
                else:
                    new[self.copy(key, path)] = twin(item)

        self._weak.append(fill)
        return new

    # What holds ids of other objects

    def _replace_ids(self) -> None:
        for value, new in self._with_ids:
            if isinstance(new, dict):
                items = list(dict.items(new))
                dict.clear(new)
                for key, item in items:
                    dict.__setitem__(new, self._id(key), item)
            else:
                ids = [self._id(item) for item in set.__iter__(value)]
                set.clear(new)
                set.update(new, ids)

    def _id(self, value: Any) -> Any:
        """The id of the copy if this is the id of an object that was copied."""
        known = self._memo.get(value) if type(value) is int else None
        return value if known is None else id(known[1])

    # Which method copies an instance of a class: the first entry that is one of its bases.
    HANDLERS: tuple[tuple[tuple[type, ...], Callable[[Any, Any, str], Any]], ...] = (
        (SHARED, _keep),
        ((types.FunctionType,), _share),
        ((types.MethodType,), _method),
        (BUILTIN_METHODS, _builtin_method),
        ((functools.partial,), _partial),
        ((types.CellType,), _cell),
        ((list, collections.deque), _sequence),
        ((tuple,), _tuple),
        ((dict,), _dict),
        ((set,), _set),
        ((frozenset,), _frozenset),
        ((slice,), _slice),
        ((types.MappingProxyType,), _mapping_proxy),
        ((np.ndarray,), _array),
        (LOCKS, _lock),
        ((threading.local,), _local),
        (WEAK_CONTAINERS, _weak_container),
        ((weakref.ref, threading.Thread), _refuse),
    )


def dictionary(value: Any) -> dict[str, Any]:
    """The attributes of an object, past any __getattr__; an empty dict if it has none."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found


@functools.cache
def _slots(kind: Any) -> tuple[tuple[str, Any], ...]:
    """The __slots__ of classes written in Python, with mangled names."""
    members = ((name, item) for base in kind.__mro__ for name, item in vars(base).items())
    return tuple((name, item) for name, item in members if isinstance(item, types.MemberDescriptorType))


def held_by(value: Any) -> Iterator[Any]:
    """The objects that a value refers to; of a function, not its globals."""
    if isinstance(value, types.FunctionType):
        yield from value.__closure__ or ()
        yield from value.__defaults__ or ()
        yield value.__kwdefaults__
        yield vars(value)
    elif isinstance(value, weakref.ref):
        yield value()
    else:
        yield from gc.get_referents(value)


def _label(key: Any) -> str:
    return repr(key) if type(key) in ATOMS else type(key).__name__
