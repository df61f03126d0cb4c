"""Convert the NumPy layer to a Keras layer and back (convert_torch.py: PyTorch modules).

Values are copied unchanged. What differs between the frameworks is their meaning in further training:
- momentum is the weight of the old value here and in Keras, and of the new one in PyTorch: 1 minus the other.
- epsilon is 1e-3 by default here and in Keras, and 1e-5 in PyTorch. It is always copied, never assumed.
- renorm, labels and the switches that freeze a part exist on both sides. An adjustment cannot be converted: ours takes
  and returns NumPy arrays, Keras's tensors.
- Keras's moving_variance averages population variances (correction=0 here). PyTorch's running_var, and tf_keras's
  moving_variance with its fused kernel, average sample variances, times M/(M - 1) (correction=1). Inference is equal.
An option that the other side does not have is an error, unless its value has no effect.
Keras is never imported here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from .._arguments import checks
from .renorm import RENORM_STATE, check_clipping
from .state import (
    FREEZING_DEFAULTS,
    STATE_ORDER,
    Layer,
    check_same_array,
    parameter_array,
    warn_of_variance,
    whole_number,
)

__all__ = ["from_keras", "to_keras"]

LayerT = TypeVar("LayerT", bound=Layer)

BASIC_OPTIONS = ("axis", "momentum", "epsilon", "center", "scale")
RENORM_OPTIONS = ("renorm", "renorm_clipping", "renorm_momentum")  # Keras's own layer has them too
BNFAST_OPTIONS = (  # only bnfast.keras's layer has them, and they may be set after construction
    "correction",
    "nan_policy",
    "virtual_batch_size",
    "virtual_batch_grouping",
    "update_statistics",
    "use_batch_statistics",
)


def to_keras(layer: Layer, target: Any = None) -> Any:
    """Convert `layer` to a Keras layer, or to the config and weights of one.

    Args:
        target: a built Keras layer with the same gamma, beta and renorm. Its weights, momentum, epsilon,
            renorm_clipping and renorm_momentum are set; if it is bnfast.keras's, also correction, nan_policy,
            virtual_batch_size, virtual_batch_grouping, update_statistics and use_batch_statistics. Its axis, trainable
            and trainable_affine do not change.

    Returns:
        `target`; or, without one, {"config": ..., "weights": [...]} for bnfast.keras's layer:
        `k = BatchNormalization(**config); k.build(shape); k.set_weights(weights)`. The config contains options that
        only bnfast.keras has, and momentum=None, only if they are not the defaults; without them Keras's own layer
        takes it too.

    Raises:
        RuntimeError: `layer` is not built.
        ValueError: `target` is not built, has other weights or lacks an option that this layer uses; nan_policy is
            "raise"; there is an adjustment, because Keras's takes and returns tensors; or there are several axes and no
            target, because Keras's weights then have the rank of the inputs.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction is 1 but Keras's own target averages population variances, or the other way round.
    """
    state = layer.state_dict()
    config: dict[str, Any] = {name: getattr(layer, name) for name in BASIC_OPTIONS} | _non_default_options(layer)
    if not layer.trainable:
        config["trainable"] = False
    names = [name for name in (*STATE_ORDER, "batches") if name in state]
    if target is None:
        if layer.activation == "leaky_relu" and layer.negative_slope != 0.2:
            wanted = '0.2, which "leaky_relu" means in Keras, or a target with a LeakyReLU be given'
            raise ValueError(f"negative_slope must be {wanted}. Received: {layer.negative_slope}")
        if not isinstance(layer.axis, int):
            raise ValueError(
                f"target must be given for several axes, as its weights have the inputs' rank. Received: {target}"
            )
        return {"config": config, "weights": [state[name] for name in names]}
    _check_target(layer, target)
    variables: dict[str, Any] = {name: getattr(target, name, None) for name in STATE_ORDER}
    for name, variable in variables.items():
        check_same_array(name, state.get(name), variable, None if variable is None else _shape(name, variable, target))
    variables["batches"] = getattr(target, "batches", None)
    target.set_weights([state[name].reshape(tuple(variables[name].shape)) for name in names])
    target.momentum, target.epsilon = layer.momentum, layer.epsilon
    if layer.renorm:
        target.renorm_clipping, target.renorm_momentum = dict(layer.renorm_clipping or {}), layer.renorm_momentum
    if hasattr(target, "nan_policy"):
        for name in BNFAST_OPTIONS:
            setattr(target, name, getattr(layer, name))
    return target


def _shape(name: str, variable: Any, target: Any) -> tuple[int, ...]:
    """The shape that a Keras variable has in the NumPy layer."""
    rows = hasattr(target, "num_classes") and name in ("gamma", "beta")
    shape = tuple(variable.shape)
    return (shape[0], *_extents(target.axis, shape[1:])) if rows else _extents(target.axis, shape)


def _non_default_options(layer: Layer) -> dict[str, Any]:
    """The options that are not the defaults, most of which only bnfast.keras's layer has."""
    if layer.adjustment is not None:
        wanted = "None for Keras, whose adjustment takes and returns tensors"
        raise ValueError(f"adjustment must be {wanted}. Received: {layer.adjustment!r}")
    if layer.nan_policy == "raise":
        raise ValueError('nan_policy must be "propagate" or "skip_update" for Keras. Received: \'raise\'')
    options: dict[str, Any] = {}
    if layer.activation is not None:
        options["activation"] = _name_in_keras(layer.activation)
    if layer.correction:
        options["correction"] = layer.correction
    if layer.nan_policy != "propagate":
        options["nan_policy"] = layer.nan_policy
    if layer.virtual_batch_size is not None:
        options |= {name: getattr(layer, name) for name in ("virtual_batch_size", "virtual_batch_grouping")}
    if layer.renorm:
        options |= {name: getattr(layer, name) for name in RENORM_OPTIONS}
    for name, default in FREEZING_DEFAULTS.items():
        if (value := getattr(layer, name)) is not default:
            options[name] = value
    if hasattr(layer, "num_classes"):
        options["num_classes"] = layer.num_classes
    return options


def _check_target(layer: Layer, target: Any) -> None:
    """Raise an error if the target cannot have the options of the layer."""
    if not getattr(target, "built", False):
        raise ValueError("target must be built: call it once, or target.build(input_shape)")
    activation, slope = _activation(getattr(target, "activation", None), 0.2)
    if activation != layer.activation or (activation == "leaky_relu" and slope != layer.negative_slope):
        raise ValueError(f"target must have activation {layer.activation!r}, like this layer. Received: {target!r}")
    for name, default in (("renorm", False), ("num_classes", None), ("adjustment", None)):
        ours, theirs = (getattr(one, name, default) for one in (layer, target))
        if ours != theirs:
            raise ValueError(f"target must have {name}={ours}, like this layer. Received: {name}={theirs}")
    if (getattr(target, "momentum", 0.0) is None) != (layer.momentum is None):
        wanted = "momentum=None" if layer.momentum is None else "a momentum"
        raise ValueError(f"target must have {wanted}, like this layer. Received: momentum={target.momentum}")
    if hasattr(target, "nan_policy"):
        return
    for name, default in {"nan_policy": "propagate", "virtual_batch_size": None, **FREEZING_DEFAULTS}.items():
        for value in (getattr(layer, name), getattr(target, name, default)):
            if value != default:
                raise ValueError(
                    f"{name} must be {default!r} for a target that is not bnfast.keras's. Received: {value!r}"
                )
    fused = bool(getattr(target, "fused", False))
    if layer.correction != fused:
        warn_of_variance(f"this target averages {'sample' if fused else 'population'} variances", layer.correction, 5)


def from_keras(cls: type[LayerT], source: Any) -> LayerT:
    """A layer with the options and state of a Keras layer.

    tf_keras's fused layers average sample variances and give correction=1. float16 and bfloat16 variables become
    float32. Initializers, regularizers, constraints and `synchronized` (one process has no replicas) are not converted.

    Args:
        source: a built layer of Keras 3, bnfast.keras or tf_keras, or a mapping
            {"config": k.get_config(), "weights": k.get_weights()}.

    Raises:
        ValueError: `source` is not built or incomplete, its activation is not one of the NumPy layer's, it has an
            adjustment, which takes tensors, or it has labels but `cls` does not, or the other way round.
        TypeError: `source` is neither a mapping nor a batch normalization layer.
    """
    if isinstance(source, Mapping):
        config, state = _from_mapping(source)
        ours = "activation" in config  # bnfast.keras always has it in its config
        activation, slope = _activation(config.get("activation"), config.get("negative_slope", 0.2))
    else:
        config, state = _from_layer(source)
        ours = hasattr(source, "nan_policy")
        slope = float(getattr(source, "negative_slope", 0.2))
        activation, slope = _activation(getattr(source, "activation", None), slope)
    if config.get("adjustment") is not None:
        raise ValueError(f"source must have adjustment=None: it takes tensors. Received: {config['adjustment']}")
    classes = {"num_classes": config["num_classes"]} if config.get("num_classes") is not None else {}
    if bool(classes) != hasattr(cls, "num_classes"):
        wanted = "a num_classes" if hasattr(cls, "num_classes") else "no num_classes"
        raise ValueError(f"source must have {wanted} to become a {cls.__name__}. Received: {classes or 'none'}")
    momentum, axis, size = config["momentum"], config["axis"], config.get("virtual_batch_size")
    batches = state.pop("batches", None)
    arrays = {name: parameter_array(name, array) for name, array in state.items() if array is not None}
    axes = [checks.integer("axis", one) for one in (axis if isinstance(axis, list | tuple) else [axis])]
    checks.channel_axes(axes)
    if "moving_mean" not in arrays:
        raise ValueError(f"source must have moving_mean and moving_variance. Received: {sorted(arrays)}")
    shape = arrays["moving_mean"].shape
    extents = _extents(axes, shape)
    if not ours and size is not None and len(shape) > 1:  # a built tf_keras layer counts a ghost axis before them
        axes = [one - 1 if one > 0 else one for one in axes]
    layer = cls(
        axis=axes,
        momentum=None if momentum is None else _number("momentum", momentum),
        epsilon=_number("epsilon", config["epsilon"]),
        center=config["center"],
        scale=config["scale"],
        activation=activation,
        negative_slope=slope,
        nan_policy=config.get("nan_policy", "propagate"),
        correction=config.get("correction", int(bool(config.get("fused")) and not ours)),
        trainable=config.get("trainable", True),
        virtual_batch_size=size,
        virtual_batch_grouping=config.get("virtual_batch_grouping", "contiguous" if ours else "strided"),
        **(
            _renorm(config) | {name: config.get(name, default) for name, default in FREEZING_DEFAULTS.items()} | classes
        ),
    )
    vectors: dict[str, Any] = {n: a.reshape(extents) if a.shape == shape else a for n, a in arrays.items()}
    layer.load_state_dict(vectors if momentum is not None else vectors | {"batches": whole_number(batches)})
    return layer


def _renorm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The renorm arguments. Bounds that are tf.Variables are read once."""
    if not config.get("renorm"):
        return {}
    given = config.get("renorm_clipping")
    if not isinstance(given, Mapping):
        check_clipping(given)  # None, or an error
        given = {}
    clipping = {
        name: None if bound is None else _number(f"renorm_clipping[{name!r}]", bound) for name, bound in given.items()
    }
    momentum = _number("renorm_momentum", config.get("renorm_momentum", 0.99))
    return {"renorm": True, "renorm_clipping": clipping or None, "renorm_momentum": momentum}


def _from_mapping(source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if "config" not in source or "weights" not in source:
        raise ValueError(f"source must have the keys 'config' and 'weights'. Received: {sorted(map(str, source))}")
    if not isinstance(source["config"], Mapping):
        raise TypeError(f"source['config'] must be a mapping. Received: {type(source['config']).__name__}")
    if not isinstance(source["weights"], list | tuple):
        raise TypeError(f"source['weights'] must be a list of arrays. Received: {type(source['weights']).__name__}")
    config, weights = dict(source["config"]), list(source["weights"])
    if absent := [name for name in BASIC_OPTIONS if name not in config]:
        raise ValueError(f"source['config'] must be a BatchNormalization's. Missing: {absent}")
    present = {"gamma": config["scale"], "beta": config["center"]} | dict.fromkeys(RENORM_STATE, config.get("renorm"))
    names = [name for name in STATE_ORDER if present.get(name, True)]
    names += ["batches"] if config["momentum"] is None else []
    if len(weights) != len(names):
        raise ValueError(f"source['weights'] must hold {names}. Received: {len(weights)} arrays")
    return config, dict(zip(names, weights, strict=True))


def _number(name: str, value: Any) -> float:
    """A float, from a number or from a scalar tensor or variable. The layer checks its range."""
    if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__") or np.ndim(value):
        raise TypeError(f"{name} must be a real number. Received: {value!r} ({type(value).__name__})")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _from_layer(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if any(not hasattr(source, name) for name in BASIC_OPTIONS):
        raise TypeError(f"source must be a Keras BatchNormalization or a mapping. Received: {type(source).__name__}")
    if not getattr(source, "built", False):
        raise ValueError("source must be built: call it once, or source.build(input_shape)")
    names = (
        *BASIC_OPTIONS,
        *BNFAST_OPTIONS,
        *RENORM_OPTIONS,
        "trainable",
        "trainable_affine",
        "adjustment",
        "num_classes",
        "fused",
    )
    config = {name: getattr(source, name) for name in names if hasattr(source, name)}
    counted = ("batches",) if config["momentum"] is None else ()
    return config, {name: getattr(source, name, None) for name in (*STATE_ORDER, *counted)}


def _extents(axis: Any, theirs: Any) -> tuple[int, ...]:
    """The shape of our vectors for a Keras weight, which is (C,) or has the inputs' rank and extent 1 off the axes."""
    shape: tuple[int, ...] = tuple(theirs)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if len(axes) == 1:
        return (int(np.prod(shape)),)
    if len(shape) <= max(axes):
        return shape
    return tuple(shape[i] for i in sorted({one % len(shape) for one in axes}))


def _name_in_keras(activation: str) -> str:
    if activation == "gelu_tanh":
        raise ValueError("activation must be one that Keras has a name for. Received: 'gelu_tanh'")
    return activation


def _activation(activation: Any, negative_slope: float) -> tuple[str | None, float]:
    """None or the name of one of our activations, and the slope of a leaky_relu.

    Args:
        activation: a name, a function of keras.activations, a layer of keras.layers, or the config of either.
            A function of that name may be another one: keras.ops.gelu is an approximation, and a script has its own.
        negative_slope: that of a leaky_relu given by name.
    """
    if isinstance(activation, Mapping):
        return _of_layer(activation.get("class_name"), activation.get("config"), activation)
    keras, name = sys.modules.get("keras"), activation
    if activation is not None and not isinstance(activation, str):
        name = getattr(activation, "__name__", type(activation).__name__)
        if keras is not None and isinstance(activation, keras.layers.Layer):
            known = getattr(keras.layers, name, None) is type(activation)  # a subclass may compute anything
            return _of_layer(name if known else None, activation.get_config(), activation)
        if keras is None or activation is not getattr(keras.activations, name, None):
            raise ValueError(f"activation must be a function of keras.activations. Received: {activation!r}")
    return checks.activation(None if name == "linear" else name), negative_slope


def _of_layer(name: Any, config: Any, given: Any) -> tuple[str | None, float]:
    """The same for a layer of keras.layers, by its name and config."""
    config = {} if not isinstance(config, Mapping) else dict(config)
    match name:
        case "Activation":
            return _activation(config.get("activation"), 0.2)
        case "LeakyReLU":
            slope = float(config.get("negative_slope", 0.3))
        case "ReLU" if (
            not config.get("threshold") and config.get("max_value") == 6 and not config.get("negative_slope")
        ):
            return "relu6", 0.2
        case "ReLU" if not config.get("threshold") and config.get("max_value") is None:
            slope = float(config.get("negative_slope") or 0)
        case "ELU" if config.get("alpha", 1.0) == 1:
            return "elu", 0.2
        case _:
            raise ValueError(f"activation must be one that the NumPy layer has. Received: {given!r}")
    return ("relu", 0.2) if slope == 0 else ("leaky_relu", slope)
