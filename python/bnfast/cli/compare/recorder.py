"""Records what a script trains, and ends each training after some steps. Runs in the process of the script.

It wraps Keras's own entries: Model.fit, Model.train_on_batch, and, for loops of the script's own, Optimizer.apply and
the calls of tf.functions, after which it looks whether an optimizer has counted a step. A fit ends by
`model.stop_training`, as EarlyStopping ends it. Nothing else can end a stranger's loop than an exception: `End`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfast.cli.compare import ulp
from bnfast.cli.compare.trainings import FIRST, LAST, Record, Training, moving_statistics

MOST_TRAININGS = 12  # a script may call fit for every epoch; each keeps the weights twice


class End(BaseException):
    """Ends the script. Not an Exception, because scripts catch those."""


@dataclass
class Loop:
    """The steps that train_on_batch of one model, or one optimizer, takes in a loop of the script's own."""

    owner: Any  # the model or optimizer: it is held, so that its id stays its own
    training: Training
    weights: list[Any]  # those that the first step trained; the script may freeze some of them later
    moving: list[Any]


class Recorder:
    """What the script trains; `install()` once Keras is imported, `finish()` when the script has ended."""

    def __init__(self, folder: Path, steps: int, move: bool) -> None:
        self.record = Record()
        self._folder, self._steps = folder, steps
        self._mover = ulp.Mover() if move else None
        self._inside = 0  # calls of fit and train_on_batch that are running
        self._optimizers: dict[int, tuple[weakref.ref[Any], int]] = {}  # and the steps seen
        self._loops: dict[int, Loop] = {}  # by id of model, optimizer
        self._norms: list[tuple[list[Any], list[Any]]] = []  # gamma and beta, moving statistics

    def install(self) -> None:
        """Wraps the entries of Keras, which the script has just imported."""
        import keras
        from keras.src.optimizers.base_optimizer import BaseOptimizer

        self.record.keras = True
        _wrap(keras.layers.BatchNormalization.__mro__[_keras_class_index()], "build", self._built)
        _wrap(keras.Model, "fit", self._fit)
        _wrap(keras.Model, "train_on_batch", self._train_on_batch)
        _wrap(keras.Model, "evaluate", self._evaluate)
        _wrap(BaseOptimizer, "apply", self._apply)
        if "tensorflow" in sys.modules:
            with contextlib.suppress(ImportError, AttributeError):
                from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

                _wrap(Function, "__call__", self._call_function)

    def finish(self) -> None:
        """Keeps the last values of loops, and writes the record."""
        self.record.batch_norms = len(self._norms)
        if self.record.keras:
            self.record.epsilon = ulp.epsilon(ulp.compute_dtype())
        self.record.moved = bool(self._mover and self._mover.moved)
        for loop in self._loops.values():
            loop.training.keep(self._folder, LAST, loop.weights, loop.moving)
        self.record.trainings = [each for each in self.record.trainings if each.steps and len(each.kept) == 2]
        self.record.write(self._folder)

    def _built(self, own: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        own(layer, *args, **kwargs)
        moving = moving_statistics(layer.variables)
        self._norms.append(([each for each in layer.variables if not any(each is other for other in moving)], moving))

    # ---- fit ---------------------------------------------------------------------------------------------------------

    def _fit(self, own: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        import keras

        if self._inside:
            return own(model, *args, **kwargs)
        self._end_if_enough()
        bound = inspect.signature(own).bind(model, *args, **kwargs)
        given = bound.arguments
        training = self._new(f"fit of {model.name}")
        watcher = self._watcher(training)
        callbacks = given.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks  # the script's own list may call them in a thread, later than their step
        listed = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        given["callbacks"] = [*listed, watcher]
        validation = given.get("validation_data")
        batch_size = given.get("validation_batch_size") or given.get("batch_size")
        if validation is not None and self._is_long(validation, batch_size, given.get("validation_steps")):
            given["validation_steps"] = self._steps
        with self._within():
            try:
                return own(*bound.args, **bound.kwargs)
            finally:  # it took fewer steps, or failed after some
                with contextlib.suppress(Exception):  # JAX may have given up the values
                    watcher.keep(LAST)

    def _watcher(self, training: Training) -> Any:
        import keras

        recorder = self

        class Watcher(keras.callbacks.Callback):  # type: ignore[misc]
            def on_train_begin(self, logs: Any = None) -> None:
                if recorder._mover and self.model.built:
                    recorder._mover.move(self.model.trainable_variables)

            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                self.earlier = training.steps

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                before, training.steps = training.steps, self.earlier + batch + 1  # several with steps_per_execution
                training.losses.append(_loss(logs))
                if not before:
                    self.keep(FIRST)
                if training.steps >= recorder._steps:
                    self.keep(LAST)
                    self.model.stop_training = True

            def keep(self, when: str) -> None:
                if training.steps and when not in training.kept:
                    getattr(self.model, "jax_state_sync", lambda: None)()
                    training.keep(recorder._folder, when, *_variables_of(self.model))

        return Watcher()

    def _evaluate(self, own: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return own(model, *args, **kwargs)
        bound = inspect.signature(own).bind(model, *args, **kwargs)
        given = bound.arguments
        if self._is_long(given.get("x"), given.get("batch_size"), given.get("steps")):
            given["steps"] = self._steps
        with self._within():
            return own(*bound.args, **bound.kwargs)

    def _is_long(self, data: Any, batch_size: int | None, steps: int | None) -> bool:
        """Whether evaluating takes more than the training that it follows. Data of unknown length counts as short."""
        if steps is not None:
            return steps > self._steps
        try:
            while isinstance(data, (tuple, list, dict)):
                data = next(iter(data.values())) if isinstance(data, dict) else data[0]
            rows = hasattr(data, "shape")
            return len(data) > self._steps * ((batch_size or 32) if rows else 1)
        except (TypeError, IndexError, StopIteration):
            return False

    # ---- loops of the script's own -----------------------------------------------------------------------------------

    def _train_on_batch(self, own: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return own(model, *args, **kwargs)
        if self._mover and model.built:
            self._mover.move(model.trainable_variables)
        with self._within():
            result = own(model, *args, **kwargs)
        self._step(model, f"train_on_batch of {model.name}", 1, *_variables_of(model))
        self._loops[id(model)].training.losses.append(_loss(result))
        self._end_if_done()
        return result

    def _apply(self, own: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(optimizer, *args, **kwargs).arguments
        variables = given.get("trainable_variables")
        if self._mover and not _in_stateless_scope():
            self._mover.move(list(variables) if variables is not None else optimizer._trainable_variables)
        result = own(optimizer, *args, **kwargs)
        known = self._optimizers.get(id(optimizer))
        if known is None or known[0]() is not optimizer:  # an id is used again once its object is gone
            self._optimizers[id(optimizer)] = (weakref.ref(optimizer), 0)
        self._look()
        return result

    def _call_function(self, own: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(function, *args, **kwargs)
        self._look()
        return result

    def _look(self) -> None:
        """Counts the steps that optimizers have taken since the last look, unless fit or train_on_batch counts them."""
        if self._inside or not self._optimizers or _stateless():
            return
        for optimizer, seen, now in self._counts():
            if now > seen:
                weights = optimizer._trainable_variables
                self._step(optimizer, f"loop of {optimizer.name}", now - seen, weights, self._moving_beside(weights))
        self._end_if_done()

    def _counts(self) -> Iterator[tuple[Any, int, int]]:
        """Every optimizer of the script's, the steps that were seen, and those it has taken; then they are seen."""
        for key, (reference, seen) in list(self._optimizers.items()):
            optimizer = reference()
            if optimizer is not None:
                now = _iterations(optimizer)
                self._optimizers[key] = (reference, now)
                yield optimizer, seen, now

    def _step(self, owner: Any, name: str, count: int, weights: Sequence[Any], moving: list[Any]) -> None:
        if id(owner) not in self._loops:
            self._loops[id(owner)] = Loop(owner, self._new(name), list(weights), moving)
        loop = self._loops[id(owner)]
        loop.training.steps += count
        if not loop.training.kept:
            loop.training.keep(self._folder, FIRST, loop.weights, loop.moving)

    def _moving_beside(self, weights: Sequence[Any]) -> list[Any]:
        """Those of the batch norms whose gamma or beta is one of the weights, or that have neither. Others may belong
        to models that were trained before, or are collected in one run and not in another."""
        trained = {id(each) for each in weights}
        return [
            each
            for own, moving in self._norms
            if not own or any(id(variable) in trained for variable in own)
            for each in moving
        ]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _new(self, name: str) -> Training:
        training = Training(name, len(self.record.trainings))
        self.record.trainings.append(training)
        return training

    def _end_if_done(self) -> None:
        if any(loop.training.steps >= self._steps for loop in self._loops.values()):
            self.record.stopped = "in a loop of its own"
            raise End

    def _end_if_enough(self) -> None:
        if len(self.record.trainings) >= MOST_TRAININGS:
            self.record.stopped = f"after {MOST_TRAININGS} trainings"
            raise End

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if not _stateless():
                list(self._counts())  # these steps are counted


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """owner.name(...) becomes wrapper(the method that it was, ...)."""
    own = getattr(owner, name)

    @functools.wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(own, *args, **kwargs)

    setattr(owner, name, wrapped)


def _keras_class_index() -> int:
    """Where Keras's own class stands in the order of bases of keras.layers.BatchNormalization, patched or not."""
    import keras

    return next(i for i, kind in enumerate(keras.layers.BatchNormalization.__mro__) if kind.__module__[:6] == "keras.")


def _variables_of(model: Any) -> tuple[list[Any], list[Any]]:
    return model.trainable_variables, moving_statistics(model.non_trainable_variables)


def _loss(result: Any) -> float:
    """The loss in the logs of a step, or in what train_on_batch returned; NaN if there is none."""
    with contextlib.suppress(Exception):  # a script's train_step may return anything
        if isinstance(result, dict):
            result = result["loss"] if "loss" in result else next(iter(result.values()))
        while isinstance(result, (list, tuple)):
            result = result[0]
        return float(result)
    return math.nan


def _stateless() -> bool:
    """Whether the variables of Keras have no values now: while TensorFlow or JAX traces a function."""
    import keras

    if _in_stateless_scope() or keras.backend.backend() != "tensorflow":
        return _in_stateless_scope()
    import tensorflow as tf

    return not tf.executing_eagerly()


def _in_stateless_scope() -> bool:
    from keras.src.backend.common.stateless_scope import in_stateless_scope

    return bool(in_stateless_scope())


def _iterations(optimizer: Any) -> int:
    import keras

    return int(keras.ops.convert_to_numpy(optimizer.iterations)) if optimizer.built else 0
