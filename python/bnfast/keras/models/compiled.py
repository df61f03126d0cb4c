"""Carries the compiled state of a model over to its copy: optimizer with slots, losses, metrics, settings.

Optimizer and metrics are copied, so that the two models train independently. Losses have no state and are shared.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from .graph_copy import clone, layers


def carry_over(original: Any, copy: Any, variables: Mapping[int, Any]) -> None:
    """Compile the copy if the original is compiled. variables: {id(variable of the original): variable of the copy}."""
    if not original.compiled:
        return
    words = getattr(getattr(original, "_compile_config", None), "config", None)
    if type(original).compile is not keras.Model.compile or words is None:
        warnings.warn(
            f"{type(original).__name__} has a compile() of its own: the copy of {original.name} is not compiled",
            stacklevel=3,
        )
        return
    optimizer = original.optimizer
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    copy.compile(
        **{
            **words,
            "optimizer": None if optimizer is None else clone(optimizer),
            "metrics": keras.tree.map_structure(_clone_metric, words["metrics"]),
            "weighted_metrics": keras.tree.map_structure(_clone_metric, words["weighted_metrics"]),
            "jit_compile": original.jit_compile and _supports_jit(copy),
        },
        auto_scale_loss=scaled,
    )
    if optimizer is not None:
        pairs = [(optimizer, copy.optimizer)]
        if scaled:
            pairs.append((optimizer.inner_optimizer, copy.optimizer.inner_optimizer))
        for old, new in pairs:
            _carry_exclusions(old, new, original.variables, variables)
        if optimizer.built:
            _carry_slots(pairs, copy.trainable_variables, variables)


def _clone_metric(metric: Any) -> Any:
    return clone(metric) if isinstance(metric, keras.metrics.Metric) else metric


def _supports_jit(model: Any) -> bool:
    return all(layer.supports_jit for layer in layers(model))


def _carry_exclusions(original: Any, copy: Any, weights: list[Any], variables: Mapping[int, Any]) -> None:
    """Repeat exclude_from_weight_decay(). Its patterns match names like "gamma", which do not change."""
    excluded: set[int] = getattr(original, "_exclude_from_weight_decay", set())
    pattern = getattr(original, "_exclude_from_weight_decay_pattern", None)
    if excluded or pattern is not None:
        ours = [v for v in weights if original._var_key(v) in excluded]
        copy.exclude_from_weight_decay(var_list=[variables[id(v)] for v in ours if id(v) in variables])
        copy._exclude_from_weight_decay_pattern = pattern


def _carry_slots(pairs: list[tuple[Any, Any]], trainable: list[Any], variables: Mapping[int, Any]) -> None:
    """Build the copy of an optimizer and copy its variables. pairs: the optimizer, then the one it wraps, if any."""
    (original, copy), (inner, inner_copy) = pairs[0], pairs[-1]
    trained = list(inner._trainable_variables)
    followed = [variables[id(variable)] for variable in trained if id(variable) in variables]
    own = list(original.variables)
    if len(followed) == len(trained):
        # Slots are saved in the order of build(), and loading builds in the order of the model: prefer the latter.
        ids = {id(variable) for variable in followed}
        order = [variable for variable in trainable if id(variable) in ids]
        copy.build(order if len(order) == len(followed) else followed)
        places = [inner_copy._get_variable_index(variable) for variable in followed]
        done = {id(variable) for old, new in pairs for variable in _copy_variables(old, new, places)}
        own = [variable for variable in own if id(variable) not in done]
    if own:
        warnings.warn(
            f"optimizer {original.name}: {len(own)} of its variables are not carried over, {own[0].path} first",
            stacklevel=4,
        )


def _copy_variables(original: Any, copy: Any, places: list[int]) -> list[Any]:
    """Copy the variables of an optimizer and return those that were copied.

    A list attribute with one variable per weight holds slots: they are copied by `places`. Slots that are stored in
    another form can't be recognized, so the other variables are copied in order, and only if the weights have the same
    order or the variable is a scalar.
    """
    done: dict[int, Any] = {}
    for name, slots in vars(original).items():
        if name == "_trainable_variables" or not isinstance(slots, list) or len(slots) != len(places):
            continue
        if name != "_variables" and all(slot is None or hasattr(slot, "assign") for slot in slots):
            for old, place in zip(slots, places, strict=True):
                if old is not None:
                    getattr(copy, name)[place].assign(old)
                    done[id(old)] = old
    same_order = places == sorted(places)
    for old, new in zip(original._variables, copy._variables, strict=True):
        if id(old) not in done and (same_order or len(old.shape) == 0):
            new.assign(old)
            done[id(old)] = old
    return list(done.values())
