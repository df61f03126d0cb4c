"""The arguments of the Keras layer that Keras's own layer doesn't have or doesn't check, and which exclude each other.

`Features` are the arguments that only our layer has; `validated_features` checks them. momentum and epsilon are
numbers, or tensors or variables that each call reads anew: `checked` is for the constructor, `read` for a call,
`current` for a config.
An error names the argument, what was wanted and what was received: TypeError for types, ValueError for values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import keras

from ..._arguments import checks
from . import activation as activations
from .framework import BRIDGES, NAN_POLICIES, ghosts, scalars
from .framework import adjustment as adjustments

SCALARS = ("momentum", "epsilon")


class Features(NamedTuple):
    """What Keras's layer lacks. Our layer holds each as an attribute of that name."""

    activation: Callable[..., Any] = keras.activations.linear
    correction: int = 0
    nan_policy: str = "propagate"
    update_statistics: bool = True
    use_batch_statistics: bool | None = None
    trainable_affine: bool = True
    virtual_batch_size: int | None = None
    virtual_batch_grouping: str = "contiguous"
    adjustment: adjustments.Adjustment | None = None
    bridge: str = "auto"
    fused: bool | None = None


def one_axis(axis: Any) -> int:
    """The axis as an int. Configs of Keras 2 and tf.keras hold a list of one."""
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    if len(axes) > 1:
        raise ValueError(f"axis must be one axis here. Received: axis={axis}")
    try:
        return operator.index(axes[0])
    except (IndexError, TypeError):
        raise TypeError(f"axis must be an integer. Received: {axis!r}") from None


def checked(name: str, value: Any) -> Any:
    """momentum or epsilon as the layer holds it: a float, a tensor or a tf.Variable.

    A keras.Variable is replaced by the variable that it wraps: Keras would count it among the layer's weights.
    """
    return scalars.check(name, _unwrapped(name, value))


def read(layer: Any, name: str) -> Any:
    """momentum or epsilon for one call; None stays None."""
    value = _unwrapped(name, getattr(layer, name))
    return None if value is None else scalars.read(name, value)


def current(layer: Any) -> dict[str, float]:
    """The values of momentum and epsilon, where they are tensors or variables."""
    held = {name: _unwrapped(name, getattr(layer, name)) for name in SCALARS}
    return {name: scalars.current(name, value) for name, value in held.items() if keras.ops.is_tensor(value)}


def _unwrapped(name: str, value: Any) -> Any:
    """The framework's variable for one of Keras's, whose own value a layer of mixed precision would round."""
    return scalars.of_variable(name, value) if isinstance(value, keras.Variable) else value


def validated_features(
    *,
    activation: Any,
    correction: Any,
    nan_policy: Any,
    update_statistics: Any,
    use_batch_statistics: Any,
    trainable_affine: Any,
    virtual_batch_size: Any,
    virtual_batch_grouping: Any,
    adjustment: Any,
    bridge: Any,
    fused: Any,
    axis: Any,
    renorm: bool,
    synchronized: bool,
) -> Features:
    """The checked arguments. axis, renorm and synchronized are Keras's own; they exclude some of ours."""
    if bridge not in BRIDGES:
        raise ValueError(f"bridge must be one of {BRIDGES}. Received: {bridge!r}")
    if virtual_batch_size is not None:
        ghosts.check(virtual_batch_size, renorm)
        if operator.index(virtual_batch_size) >= 2**31:  # TensorFlow's shapes are int32
            raise ValueError(f"virtual_batch_size must be less than 2**31. Received: {virtual_batch_size}")
    adjustments.check(adjustment, virtual_batch_size)
    if correction and renorm:
        raise ValueError(f"correction must be 0 where renorm=True. Received: {correction}")
    if synchronized:
        others = {"renorm": renorm or None, "virtual_batch_size": virtual_batch_size, "adjustment": adjustment}
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"synchronized must be False with {', '.join(others)}. Received: synchronized=True, {name}={value}"
                )
    if fused:
        _check_fused(
            axis, renorm=renorm, synchronized=synchronized, virtual_batch_size=virtual_batch_size, adjustment=adjustment
        )
    grouping = checks.choice("virtual_batch_grouping", virtual_batch_grouping, ghosts.GROUPINGS)
    optional = {"use_batch_statistics": use_batch_statistics, "fused": fused}
    return Features(
        activation=activations.get(activation),
        correction=checks.check_correction(correction),
        nan_policy=str(checks.choice("nan_policy", nan_policy, NAN_POLICIES)),
        update_statistics=checks.boolean("update_statistics", update_statistics),
        trainable_affine=checks.boolean("trainable_affine", trainable_affine),
        virtual_batch_size=virtual_batch_size,
        virtual_batch_grouping=str(grouping),
        adjustment=adjustment,
        bridge=bridge,
        **{name: value if value is None else checks.boolean(name, value) for name, value in optional.items()},
    )


def _check_fused(axis: Any, **features: Any) -> None:
    """Keras 2's errors for fused=True, so that a config which it refuses is refused here, too."""
    for name, value in features.items():
        if value not in (None, False):
            raise ValueError(f"fused must be None or False with {name}. Received: fused=True, {name}={value}")
    axes = axis if isinstance(axis, (list, tuple)) else [axis]
    if len(axes) > 1 or axes[0] not in (-4, -3, -1, 1, 3, 4):
        raise ValueError(
            "axis must be 1 or the last one of inputs of rank 4 or 5 with fused=True. "
            f"Received: fused=True, axis={axis}"
        )


def check_fused_shape(axis: int, rank: int) -> None:
    """The same once the rank is known. Of rank 5 Keras 2 takes any axis, unfused."""
    if rank not in (4, 5):
        raise ValueError(f"inputs must have rank 4 or 5 with fused=True. Received: rank {rank}")
    if rank == 4 and axis % rank not in (1, 3):
        raise ValueError(f"axis must be 1 or 3 of inputs of rank 4 with fused=True. Received: axis={axis}")
