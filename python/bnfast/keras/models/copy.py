"""Copies a built Keras model object by object, without configs.

    twin = duplicate(model)

`duplicate` walks everything that the model reaches and copies it once: classes, attributes, layers, weights, the graph
of symbolic tensors, and the compiled state (object_copy.py says how; copy_tensorflow.py, copy_torch.py and copy_jax.py,
what that means for the framework's own objects). The
train, test and predict functions are dropped; Keras makes new ones. Calls in other models keep their index, but not
their inputs. A Copier can also leave the compiled state out, and put other objects into the copy (`pair`).

A function of the user's that captures a layer, a variable, an optimizer or a metric can't be copied: `duplicate` then
raises ValueError. The original is only read.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import keras
from keras.src.utils.tracking import Tracker  # Keras has no public name for it

from ..layers.framework import BACKEND
from .object_copy import ATOMS, SHARED, ObjectCopier, held_by

if TYPE_CHECKING or BACKEND == "tensorflow":
    from .copy_tensorflow import FUNCTION_KINDS, SHARED_KINDS, VARIABLE_KINDS, FrameworkCopier, Trainer
elif BACKEND == "torch":
    from .copy_torch import FUNCTION_KINDS, SHARED_KINDS, VARIABLE_KINDS, FrameworkCopier, Trainer
else:
    from .copy_jax import FUNCTION_KINDS, SHARED_KINDS, VARIABLE_KINDS, FrameworkCopier, Trainer

# Set by Keras during fit, evaluate and predict. Each is made anew when it is None.
FUNCTIONS = ("train_function", "test_function", "predict_function", "_eval_epoch_iterator")
# What compile(), fit(), evaluate() and predict() add to a model.
COMPILED = frozenset(
    {"_compile_config", "_compiled_trainable_state", "history", "optimizer", "stop_evaluating", "stop_predicting"}
    | {"_eval_epoch_iterator", "stop_training"}
)
# Where TensorFlow lists the attributes of an object for checkpoints, those functions among them.
DEPENDENCIES = ("_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names")
ADVICE = "Remove the attribute and set it on the copy, or change the model itself: accelerate(model, inplace=True)"


def duplicate(model: Any, shared: Iterable[Any] = ()) -> Any:
    """An independent copy of a built model, equal in everything; the original is not changed.

    shared: objects that the copy refers to as the original does.
    Raises ValueError, with the path of the attribute, if the model holds something that can't be copied.
    """
    return Copier(shared=shared).duplicate(model)


class Copier(FrameworkCopier):
    """Copies a model, and finds the copy of each object in it."""

    def __init__(self, *, compiled: bool = True, shared: Iterable[Any] = ()) -> None:
        """compiled=False leaves out what compile() and fit() made."""
        super().__init__()
        self._reset = dict.fromkeys(FUNCTIONS) if compiled else _never_compiled()
        self._omitted = frozenset() if compiled else COMPILED
        self._nodes: list[tuple[Any, str, list[Any], list[Any]]] = []  # operation, attribute, original nodes, copies
        for thing in shared:
            self.pair(thing, thing)

    def duplicate(self, model: Any) -> Any:
        copy = self.copy(model, "model")
        self.finish()
        return copy

    def finish(self) -> None:
        self._drain()
        self._copy_nodes()
        super().finish()

    def _error(self, path: str, what: str) -> ValueError:
        return ValueError(f"{super()._error(path, what)}. {ADVICE}")

    def _state(self, value: Any) -> Any:
        return find(value, _is_state)

    def _describe(self, value: Any) -> str:
        if isinstance(value, keras.layers.Layer):
            return f"the layer {super()._describe(value)}"
        if isinstance(value, VARIABLE_KINDS):
            return f"{getattr(value, 'name', 'a variable')} ({type(value).__name__})"
        return super()._describe(value)

    # Keras

    def _attributes(self, value: Any, new: Any, path: str) -> None:
        if isinstance(value, keras.Operation):
            path = f"{vars(value).get('name')} ({type(value).__name__})"
        super()._attributes(value, new, path)
        if isinstance(value, keras.KerasTensor) and "_keras_history" in vars(value):
            operation, index, _ = value._keras_history
            if operation is not None:  # the call that made the tensor belongs to it, although only the index is held
                self.copy(operation._inbound_nodes[index], f"{path}._keras_history")

    def _attribute(self, value: Any, new: Any, name: str, item: Any, path: str) -> None:
        is_model = isinstance(value, keras.Model)
        if is_model and name in self._omitted:
            return
        if is_model and name in self._reset:
            vars(new)[name] = self._reset[name]
        elif is_model and name in DEPENDENCIES:
            vars(new)[name] = self.copy(self._dependencies(item), f"{path}.{name}")
        elif name in ("_inbound_nodes", "_outbound_nodes") and isinstance(value, keras.Operation):
            vars(new)[name] = self._node_list(value, name, item, path)
        else:
            super()._attribute(value, new, name, item, path)

    def _dependencies(self, listed: Any) -> Any:
        """Those of a model's attributes that the copy will have."""

        def stays(name: str, held: Any) -> bool:
            dropped = self.has(held) and self.of(held) is None
            return not dropped and name not in self._reset and name not in self._omitted

        if isinstance(listed, dict):
            return {name: held for name, held in listed.items() if stays(name, held)}
        return [reference for reference in listed if stays(*reference)]

    def _function(self, value: Any, path: str) -> Any:
        closure = value.__closure__ or ()
        package = value.__globals__.get("__name__", "").split(".")[0]
        if not closure or package not in self.PACKAGES:
            return self._share(value, path)
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
            list.extend(new, [self.of(node) for node in nodes if self.has(node)])

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
        super()._replace_ids()
        known = {id(copy) for _, copy in self._memo.values()}
        for original, new in list(self._memo.values()):
            if type(original) is Tracker:
                new.stored_ids = {name: {i for i in ids if i in known} for name, ids in new.stored_ids.items()}
            elif isinstance(original, keras.Function) and "_nodes" in vars(original):
                vars(new)["_nodes"] = set(map(self._node_key, original._nodes))
            elif isinstance(original, keras.optimizers.Optimizer):
                self._replace_keys(new)

    def _node_key(self, key: str) -> str:
        number, index = key.split("_ib-")  # keras.src.ops.function.make_node_key
        return f"{self._id(int(number))}_ib-{index}"

    HANDLERS = (
        ((keras.Variable,), ObjectCopier._object),
        ((types.FunctionType,), _function),
        ((keras.dtype_policies.DTypePolicyMap,), ObjectCopier._object),
        ((keras.DTypePolicy,), ObjectCopier._keep),
        *FrameworkCopier.FRAMEWORK_HANDLERS,
        ((keras.Operation, keras.metrics.Metric, keras.optimizers.Optimizer), ObjectCopier._object),
        *ObjectCopier.HANDLERS,
    )


def _never_compiled() -> dict[str, Any]:
    """The compiled state of a model that never was compiled, apart from an attribute that depends on its class."""
    return {name: value for name, value in vars(Trainer()).items() if not name.endswith("has_training_arg")}


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
        if not isinstance(item, (keras.Operation, keras.KerasTensor, Tracker, *SHARED, *SHARED_KINDS)):
            waiting.extend(_held(item))
    return None


def _is_state(value: Any) -> bool:
    if isinstance(value, keras.layers.Layer):
        return not value.built or bool(value.variables or value._layers)
    kinds = (
        keras.Variable,
        *VARIABLE_KINDS,
        keras.optimizers.Optimizer,
        keras.metrics.Metric,
        keras.random.SeedGenerator,
    )
    return isinstance(value, kinds)


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, FUNCTION_KINDS):
        yield getattr(value, "python_function", None)
        yield getattr(value, "variables", None)
    else:
        yield from held_by(value)
