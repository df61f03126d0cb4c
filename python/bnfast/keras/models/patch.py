"""`patch()`: scripts that use keras.layers.BatchNormalization get bnfast's layer; `unpatch()` undoes it.

While the patch is in force, every attribute of a keras.* or tensorflow.* module that was Keras's class is
`PatchedBatchNormalization`. So is the class that Keras finds under "keras.layers.BatchNormalization" in a config. Names
that a script bound earlier (`from keras.layers import BatchNormalization`) keep their value. Unpatching restores
every module attribute that still is the patched class, in any module. A layer keeps the class it was made with: one
made under the patch trains on bnfast's kernels afterwards, too.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from types import FunctionType, ModuleType, TracebackType
from typing import Any, Protocol

import keras
from keras.src import api_export
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from ..layers import arguments, bias
from ..layers.batch_norm import KERAS, BatchNormalization
from ..layers.framework import (
    ON_TENSORFLOW,
    choose_bridge,
    fusion,
    may_train,
    renorm,
    scalars,
    supports_jit,
    why_slower,
)
from ..layers.fusion import install as install_fusion
from .text import listed

API_NAME = "keras.layers.BatchNormalization"
OWNERS = ("keras", "tensorflow")  # the packages whose names are replaced
_BRIDGE_NAMES = {
    "op": "bnfast's TensorFlow op",
    "tensorflow": "TensorFlow's own ops",
    "torch": "bnfast's kernels in PyTorch",
    "jax": "bnfast's kernels in JAX",
    "keras.ops": "Keras's own ops",
}

_SCALARS = (("momentum", 0.99, "outside [0, 1]"), ("epsilon", 1e-3, "negative or not finite"))

_lock = threading.RLock()


NEVER, INFERENCE, FROZEN = "never called", "called in inference alone", "frozen"


@dataclass
class Entry:
    """The state of one layer that was made under the patch or changed by `accelerate`."""

    name: str
    reason: str | None  # why it runs Keras's own code; None if it uses bnfast
    wanted: str = "auto"  # the bridge that accelerate was given
    bridge: str | None = None  # the bridge of its last training call; None before one
    trace: fusion.Trace | None = None  # of that call
    momentum: float | None = None  # of that call
    calls: str = NEVER  # what calls there were, other than training ones

    @property
    def state(self) -> str:
        if self.reason is not None:
            return "on Keras's own layer"
        if self.bridge is None:
            return self.calls
        return "trained on " + _BRIDGE_NAMES.get(self.bridge, self.bridge)


made: list[Entry] = []  # every layer made under a patch, in order


class _LikeKeras(type(Protocol)):  # type: ignore[misc]
    """isinstance and issubclass treat the patched class like Keras's, so that they accept older layers, too.

    Derived from the metaclass of Protocol, and so from ABCMeta, because classes of scripts are abstract, too.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls is PatchedBatchNormalization:
            return isinstance(instance, KERAS)
        return bool(super().__instancecheck__(instance))

    def __subclasscheck__(cls, subclass: type) -> bool:
        if cls is PatchedBatchNormalization:
            return issubclass(subclass, KERAS)
        return bool(super().__subclasscheck__(subclass))


class PatchedBatchNormalization(BatchNormalization, metaclass=_LikeKeras):
    """The value of keras.layers.BatchNormalization while the patch is in force, with Keras's arguments and config.

    It is saved under Keras's name, so files load without bnfast. It accepts Keras 2's `fused`, which is read back but
    not saved, because Keras 3 has no such argument. Arguments that bnfast's layer doesn't support (renorm
    with synchronized) and backends without kernels make it run Keras's own code; `_entry.reason` then says why. Its own
    attributes have private names: `activation`, `bridge` ... belong to the script, whose subclass may use them.
    """

    _is_protocol = False  # for the metaclass of Protocol

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fused = _fused(kwargs)
        reason = _unsupported(args, kwargs)
        if reason is None:
            super().__init__(*args, **kwargs)
        else:
            KERAS.__init__(self, *args, **kwargs)
        self._entry.reason = reason
        if fused is not None:
            self.fused = fused

    @property
    def save_assets(self) -> Any:  # type: ignore[override]
        """Not there: a file of this layer names Keras's class, and has nothing to say of bnfast."""
        raise AttributeError("save_assets")

    def _hold(self, features: arguments.Features) -> None:
        pass

    @property
    def _features(self) -> arguments.Features:
        return arguments.Features(bridge=self._entry.wanted)

    @property
    def _entry(self) -> Entry:
        entry: Entry | None = vars(self).get(_ENTRY)
        if entry is None:  # made here, because a script may call __init__ of Keras's class
            entry = Entry(self.name, None)
            setattr(self, _ENTRY, entry)
            made.append(entry)
        return entry

    def build(self, input_shape: Any) -> None:
        if self._entry.reason is None:
            self.supports_jit = supports_jit(self._entry.wanted)
            super().build(input_shape)
        else:
            KERAS.build(self, input_shape)

    @classmethod
    def adopt(cls, layer: Any, bridge: str) -> None:
        """Changes the class of a built layer of exactly Keras's class, and nothing else."""
        setattr(layer, _ENTRY, Entry(layer.name, None, bridge))
        layer.supports_jit = supports_jit(bridge)
        install_fusion()
        layer.__class__ = cls

    def release(self) -> None:
        """Undoes `adopt`."""
        self.supports_jit = True
        for name in {_ENTRY, "_bnfast_trace"} & vars(self).keys():
            delattr(self, name)
        self.__class__ = KERAS

    def symbolic_call(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], keras.KerasTensor) and self._entry.reason is None:
            bias.adopt(args[0]._keras_history.operation)
        return super().symbolic_call(*args, **kwargs)

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        entry = self._entry
        entry.reason = entry.reason or overridden(self)
        if entry.reason is not None:
            return KERAS.call(self, inputs, training=training, mask=mask)
        y = super().call(inputs, training=training, mask=mask)
        if in_symbolic_scope():
            return y
        if not may_train(training):
            entry.calls = INFERENCE if entry.calls == NEVER else entry.calls
        elif self.trainable:
            entry.bridge, entry.trace = choose_bridge(entry.wanted), self._bnfast_trace
            entry.momentum = self.momentum
        else:
            entry.calls = FROZEN
        return y

    def compute_output_shape(self, input_shape: Any) -> Any:
        return KERAS.compute_output_shape(self, input_shape)

    def __reduce__(self) -> Any:
        rebuild, state = super().__reduce__()
        return rebuild.__func__.__get__(KERAS), state  # a pickle names Keras's class, as a file does

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {**KERAS.get_config(self), **arguments.current(self)}
        if "renorm_clipping" in config:
            config["renorm_clipping"] = renorm.plain_clipping(config["renorm_clipping"])
        return config


_ENTRY = "_bnfast_entry"  # the attribute that holds a layer's entry
PatchedBatchNormalization.__name__ = PatchedBatchNormalization.__qualname__ = KERAS.__name__  # default layer names
# The name under which a layer of this class is saved, also after unpatch().
api_export.REGISTERED_OBJS_TO_NAMES[PatchedBatchNormalization] = API_NAME


def overridden(layer: Any) -> str | None:
    """Why a layer has to run Keras's code: a script has replaced a method, or uses a name that is bnfast's; or None."""
    for name in _METHODS:
        if getattr(vars(KERAS).get(name), "__module__", None) != KERAS.__module__:
            return f"{name} of Keras's layer is overridden"
    for name in _HOOKS:
        function = vars(layer).get(name) or getattr(type(layer), name, None)
        if getattr(function, "__module__", None) != KERAS.__module__:
            return f"{name} of Keras's layer is overridden"
    if "call" in vars(layer):
        return "its call is overridden"
    theirs = [vars(layer), *map(vars, takewhile(lambda kind: kind not in _BASES, type(layer).__mro__))]
    used = next((name for names in theirs for name in names if name in _PRIVATE), None)
    return None if used is None else f"it has a {used} of its own, a name that bnfast's layer uses"


# The methods of Keras's layer, and those that only its own code calls: _moments, and those of renorm.
_METHODS = [name for name, value in vars(KERAS).items() if inspect.isfunction(value)]
_HOOKS = [name for name in _METHODS if name[0] == "_" != name[1]]

_BASES = (KERAS, BatchNormalization, PatchedBatchNormalization)
_PRIVATE = frozenset(
    name
    for base in (BatchNormalization, PatchedBatchNormalization)
    for name, value in vars(base).items()
    if isinstance(value, (property, FunctionType)) and not hasattr(KERAS, name) and name[0] == "_"
)


def _fused(kwargs: dict[str, Any]) -> bool | None:
    """Takes Keras 2's `fused` out of the arguments. Keras 2 refuses True where its fused kernel doesn't fit."""
    fused = kwargs.pop("fused", None)
    if not isinstance(fused, bool | None):
        raise TypeError(f"fused must be None, True or False. Received: {fused!r}")
    for name in ("renorm", "synchronized"):
        if fused and kwargs.get(name):
            raise ValueError(f"fused must not be True with {name}=True. Received: fused=True, {name}={kwargs[name]!r}")
    return fused


def _unsupported(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why bnfast's layer doesn't support these arguments of Keras's layer, or None if it does."""
    if not ON_TENSORFLOW and (absent := why_slower(None, "float32", "auto")) is not None:
        return absent
    try:
        given = inspect.signature(KERAS.__init__).bind(None, *args, **kwargs).arguments
        if unknown := sorted({*arguments.Features._fields} & set(given.get("kwargs", {}))):
            return f"Keras's layer has no argument {unknown[0]}"
        if given.get("renorm"):
            if given.get("synchronized"):
                return "renorm=True with synchronized=True"
            renorm.check(given.get("renorm_clipping"), given.get("renorm_momentum", 0.99))
        arguments.one_axis(given.get("axis", -1))
        for name, default, wrong in _SCALARS:
            value = given.get(name, default)
            if isinstance(value, (int, float)) and not scalars.in_range(name, value):
                return f"{name} {wrong}"
            arguments.checked(name, value)
    except (
        TypeError,
        ValueError,
        NotImplementedError,
    ) as error:  # arguments that Keras itself rejects, with its own message
        return str(error)
    return None


class Patch:
    """The result of patch(). As a context manager it ends the patch, if that call began it."""

    def __init__(self, began: bool) -> None:
        self._began = began

    def __enter__(self) -> Patch:
        if not is_patched():  # entered again, after it ended
            patch()
            self._began = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._began:
            self._began = False
            unpatch()


def patch() -> Patch:
    """Give bnfast's layer to all code that uses Keras's BatchNormalization from now on, until `unpatch()`.

    This covers keras.layers, tf.keras.layers, `from ... import BatchNormalization` after this call, keras.applications,
    and configs and files that are loaded. A second call has no effect. The result is a context manager:

        with bnfast.keras.patch():
            model = keras.applications.MobileNetV2(weights=None)

    Models built under the patch keep bnfast's layer afterwards; their files and configs name Keras's. With arguments
    that bnfast's layer doesn't support (renorm with synchronized), and on backends for which there are no kernels, the
    layer behaves as Keras's. Code compiled with `tf.function(jit_compile=True)` can't use bnfast's layer: XLA has no
    kernel for it. Where TensorFlow sees a GPU, the layers run TensorFlow's own ops, which XLA compiles.

    Example:
        >>> import keras
        >>> import bnfast.keras
        >>> with bnfast.keras.patch():
        ...     layer = keras.layers.BatchNormalization()
        >>> bnfast.keras.uses_bnfast(layer), bnfast.keras.uses_bnfast(keras.layers)
        (True, False)
    """
    with _lock:
        began = not is_patched()
        if began:
            api_export.REGISTERED_NAMES_TO_OBJS[API_NAME] = PatchedBatchNormalization
            for name, namespace in _namespaces():
                if name.partition(".")[0] in OWNERS:
                    _replace(namespace, KERAS, PatchedBatchNormalization)
        return Patch(began)


def unpatch() -> None:
    """Undo `patch()`: every module attribute that is the patched class becomes Keras's again. No effect if not patched.

    Layers and models that were made under the patch keep working as they are.

    Example:
        >>> import bnfast.keras
        >>> _ = bnfast.keras.patch()
        >>> bnfast.keras.unpatch()
        >>> bnfast.keras.is_patched()
        False
    """
    with _lock:
        api_export.REGISTERED_NAMES_TO_OBJS[API_NAME] = KERAS
        for name, namespace in _namespaces():
            if name.partition(".")[0] != "bnfast":
                _replace(namespace, PatchedBatchNormalization, KERAS)


def is_patched() -> bool:
    """Whether `patch()` is in force.

    Example:
        >>> import bnfast.keras
        >>> bnfast.keras.is_patched()
        False
        >>> with bnfast.keras.patch():
        ...     bnfast.keras.is_patched()
        True
    """
    return api_export.REGISTERED_NAMES_TO_OBJS.get(API_NAME) is PatchedBatchNormalization


def uses_bnfast(obj: Any) -> bool:
    """Whether `obj` computes its batch norms with bnfast.

    Args:
        obj: a batch norm layer; a model or another layer (True if it holds batch norms and all of them use bnfast); a
            class; or a module (the class that it names BatchNormalization). A layer that was made under the patch and
            runs Keras's own code does not use bnfast.

    Raises:
        TypeError: obj is anything else.

    Example:
        >>> import keras
        >>> import bnfast.keras
        >>> bnfast.keras.uses_bnfast(keras.layers.BatchNormalization())
        False
        >>> bnfast.keras.uses_bnfast(bnfast.keras.BatchNormalization())
        True
    """
    if isinstance(obj, type):
        return BatchNormalization in obj.__mro__
    if isinstance(obj, ModuleType):
        named = getattr(obj, "BatchNormalization", None)
        return isinstance(named, type) and uses_bnfast(named)
    if isinstance(obj, KERAS):
        if PatchedBatchNormalization not in type(obj).__mro__:
            return uses_bnfast(type(obj))
        return obj._entry.reason is None and overridden(obj) is None
    if isinstance(obj, keras.Layer):
        norms = [each for each in obj._flatten_layers() if isinstance(each, KERAS)]
        return bool(norms) and all(map(uses_bnfast, norms))
    raise TypeError(f"obj must be a layer, a model, a class or a module. Received: {type(obj).__name__}")


def summary() -> str:
    """How many layers made under a patch trained on which bridge, and which run Keras's own code, and why."""
    if not made:
        return "no batch norm was made"
    states = Counter(entry.state for entry in made)
    fused = sum(entry.trace is not None and bool(entry.trace.fused) for entry in made)
    counts = [f"{count} {state}" for state, count in states.most_common()] + [f"{fused} fused"] * bool(fused)
    lines = [f"{len(made)} batch norm{'s' * (len(made) > 1)}: " + ", ".join(counts)]
    if INFERENCE in states and not any(entry.bridge for entry in made):
        lines.append("none was called with training=True: a training loop of one's own calls model(x, training=True)")
    for reason in dict.fromkeys(entry.reason for entry in made if entry.reason is not None):
        lines.append(f"Keras's own for {listed(entry.name for entry in made if entry.reason == reason)}: {reason}")
    return "\n".join(lines)


def _namespaces() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and __dict__ of every loaded module, without triggering lazy imports."""
    for name, module in list(sys.modules.items()):
        try:
            namespace = object.__getattribute__(module, "__dict__")
        except AttributeError:  # sys.modules may hold None or any other object
            continue
        if isinstance(namespace, dict):
            yield name, namespace


def _replace(namespace: dict[str, Any], old: Any, new: Any) -> None:
    for name in [name for name, value in list(namespace.items()) if value is old]:
        namespace[name] = new
