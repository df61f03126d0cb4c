"""State in and out of the NumPy layer: its own dict, and Keras's layers (convert_torch.py: PyTorch's modules).

Values carry over as they are; what differs is what they mean from the next training step on:
- momentum is the weight of the old value here and in Keras, of the new one in PyTorch: one is 1 minus the other.
- epsilon is 1e-3 by default here and in Keras, 1e-5 in PyTorch: it is always carried along, never assumed.
- renorm, the switches that freeze a part and labels are on both sides; a NumPy adjustment can't be one of tensors.
- Keras's moving_variance averages population variances, PyTorch's running_var sample variances (times M/(M - 1)), and
  so does tf_keras where its fused kernel runs: here correction=0 and correction=1. Inference isn't concerned.
What one side has and the other has not is an error, unless it changes nothing.
Keras and torch are never imported here, except torch to write into a live torch module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array, as_array
from .renorm import NAMES

if TYPE_CHECKING:
    from .batch_norm import BatchNormalization

__all__ = ["check_like", "from_keras", "load", "to_keras", "warn_of_variance", "widened"]

# Of Keras's get_weights; renorm's only with renorm, and with momentum=None then batches.
ORDER = ("gamma", "beta", "moving_mean", "moving_variance", *NAMES)
BASIC = ("axis", "momentum", "epsilon", "center", "scale")
RENORM = ("renorm", "renorm_clipping", "renorm_momentum")  # Keras's own has them too
SWITCHES: dict[str, Any] = {"update_statistics": True, "use_batch_statistics": None, "trainable_affine": True}
CARRIED = (
    *("correction", "nan_policy", "virtual_batch_size", "virtual_batch_grouping"),
    *("update_statistics", "use_batch_statistics"),
)


def load(layer: BatchNormalization, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Copy `state` into `layer`, all or nothing: see BatchNormalization.load_state_dict."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays. Received: {type(state).__name__}")
    missing, unknown = [n for n in names if n not in state], [str(n) for n in state if n not in names]
    if missing or unknown:
        raise ValueError(f"state must have the keys {list(names)}. Missing: {missing}, unknown: {unknown}")
    arrays = {name: as_array(name, state[name]) for name in names}
    mean, axes = arrays["moving_mean"], 1 if isinstance(layer.axis, int) else len(layer.axis)
    if layer.moving_mean is not None:
        shape = layer.moving_mean.shape
    elif axes == 1:
        shape = (mean.size,)
    elif mean.ndim != axes:
        raise ValueError(f"moving_mean must have the extents of axes {layer.axis} as its shape. Received: {mean.shape}")
    else:
        shape = mean.shape
    for name, array in arrays.items():
        wanted = getattr(layer, name).dtype if layer.built else layer.dtype
        if wanted is not None and array.dtype != wanted:
            raise TypeError(f"{name} must have dtype {wanted}, like the layer's. Received: {array.dtype}")
        if array.dtype.char not in "fd" or not array.dtype.isnative:
            wanted = "float32 or float64 in the machine's byte order"
            raise TypeError(f"{name} must have dtype {wanted}. Received: {array.dtype}")
        if array.shape != (wanted := layer._shape_of(name, shape)):
            raise ValueError(f"{name} must have shape {wanted}, one value a channel. Received: {array.shape}")
    if layer.built:
        for name, array in arrays.items():
            getattr(layer, name)[...] = array
    else:
        for name, array in arrays.items():
            setattr(layer, name, np.array(array))


def to_keras(layer: BatchNormalization, target: Any = None) -> Any:
    """`layer` in Keras's terms.

    Without a target: {"config": ..., "weights": [...]}, so that with bnfast.keras's layer
    `k = BatchNormalization(**config); k.build(shape); k.set_weights(weights)`. So it is with Keras's own, unless the
    config has words that Keras hasn't: activation, correction, nan_policy, virtual_batch_size, update_statistics,
    use_batch_statistics, trainable_affine and momentum=None are there where they aren't the defaults. With `target`, a
    built Keras layer with the same gamma, beta and renorm: its weights, momentum, epsilon, renorm_clipping,
    renorm_momentum and, if it is bnfast.keras's, those words are set, and it is returned. Its axis, trainable and
    trainable_affine stay its own.

    Raises:
        RuntimeError: `layer` isn't built.
        ValueError: `target` isn't built, has other weights or can't have what this layer has; nan_policy="raise"; an
            adjustment, as Keras's takes and gives tensors; no target for several axes, as Keras's weights then have
            inputs' rank.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction is 1 and Keras's own target goes on with population variances, or the other way round.
    """
    state = layer.state_dict()
    config: dict[str, Any] = {name: getattr(layer, name) for name in BASIC} | _words(layer)
    if not layer.trainable:
        config["trainable"] = False
    names = [name for name in (*ORDER, "batches") if name in state]
    if target is None:
        if not isinstance(layer.axis, int):
            raise ValueError(
                f"target must be given for several axes: its weights have inputs' rank. Received: {target}"
            )
        return {"config": config, "weights": [state[name] for name in names]}
    _check_target(layer, target)
    variables: dict[str, Any] = {name: getattr(target, name, None) for name in ORDER}
    for name, variable in variables.items():
        check_like(name, state.get(name), variable, None if variable is None else _shape(name, variable, target))
    variables["batches"] = getattr(target, "batches", None)
    target.set_weights([state[name].reshape(tuple(variables[name].shape)) for name in names])
    target.momentum, target.epsilon = layer.momentum, layer.epsilon
    if layer.renorm:
        target.renorm_clipping, target.renorm_momentum = dict(layer.renorm_clipping or {}), layer.renorm_momentum
    if hasattr(target, "nan_policy"):
        for name in CARRIED:
            setattr(target, name, getattr(layer, name))
    return target


def _shape(name: str, variable: Any, target: Any) -> tuple[int, ...]:
    """The shape that a variable of Keras's has here."""
    rows = hasattr(target, "num_classes") and name in ("gamma", "beta")
    shape = tuple(variable.shape)
    return (shape[0], *_extents(target.axis, shape[1:])) if rows else _extents(target.axis, shape)


def _words(layer: BatchNormalization) -> dict[str, Any]:
    """What isn't the default, most of which only bnfast.keras's layer has."""
    if layer.adjustment is not None:
        wanted = "None for Keras, where it takes and gives tensors"
        raise ValueError(f"adjustment must be {wanted}. Received: {layer.adjustment!r}")
    if layer.nan_policy == "raise":
        raise ValueError('nan_policy must be "propagate" or "skip_update" for Keras. Received: \'raise\'')
    slope = layer.negative_slope
    if layer.activation == "leaky_relu" and slope != 0.2:
        raise ValueError(f'negative_slope must be 0.2, which "leaky_relu" means in Keras. Received: {slope}')
    words: dict[str, Any] = {}
    if layer.activation is not None:
        words["activation"] = layer.activation
    if layer.correction:
        words["correction"] = layer.correction
    if layer.nan_policy != "propagate":
        words["nan_policy"] = layer.nan_policy
    if layer.virtual_batch_size is not None:
        words |= {name: getattr(layer, name) for name in ("virtual_batch_size", "virtual_batch_grouping")}
    if layer.renorm:
        words |= {name: getattr(layer, name) for name in RENORM}
    words |= {name: value for name, plain in SWITCHES.items() if (value := getattr(layer, name)) is not plain}
    return words | ({"num_classes": layer.num_classes} if hasattr(layer, "num_classes") else {})


def _check_target(layer: BatchNormalization, target: Any) -> None:
    """Whether it can be like the layer."""
    if not getattr(target, "built", False):
        raise ValueError("target must be built: call it once, or target.build(input_shape)")
    if _activation(getattr(target, "activation", None)) != layer.activation:
        raise ValueError(f"target must have activation {layer.activation!r}, like this layer. Received: {target!r}")
    for name, plain in (("renorm", False), ("num_classes", None), ("adjustment", None)):
        ours, theirs = (getattr(one, name, plain) for one in (layer, target))
        if ours != theirs:
            raise ValueError(f"target must have {name}={ours}, like this layer. Received: {name}={theirs}")
    if (getattr(target, "momentum", 0.0) is None) != (layer.momentum is None):
        wanted = "momentum=None" if layer.momentum is None else "a momentum"
        raise ValueError(f"target must have {wanted}, like this layer. Received: momentum={target.momentum}")
    if hasattr(target, "nan_policy"):
        return
    for name, plain in {"nan_policy": "propagate", "virtual_batch_size": None, **SWITCHES}.items():
        for value in (getattr(layer, name), getattr(target, name, plain)):
            if value != plain:
                raise ValueError(
                    f"{name} must be {plain!r} for a target that isn't bnfast.keras's. Received: {value!r}"
                )
    fused = bool(getattr(target, "fused", False))
    if layer.correction != fused:
        warn_of_variance(f"this target averages {'sample' if fused else 'population'} variances", layer.correction)


def from_keras(cls: type[BatchNormalization], source: Any) -> BatchNormalization:
    """A layer like `source`: a built layer of Keras 3, bnfast.keras or tf_keras, or a mapping
    {"config": k.get_config(), "weights": k.get_weights()}.

    tf_keras's fused layers average sample variances and give correction=1. float16 and bfloat16 variables become
    float32. Initializers, regularizers, constraints and `synchronized`, which is nothing to one process, stay behind.

    Raises:
        ValueError: `source` isn't built or lacks something, its activation is not one of ours, it has an adjustment,
            which takes and gives tensors, or has labels where `cls` has none, or the other way round.
        TypeError: it is neither a mapping nor a batch normalization layer.
    """
    if isinstance(source, Mapping):
        config, state = _from_mapping(source)
        ours = "activation" in config  # always in the configs of bnfast.keras
        activation = _activation(config.get("activation")), config.get("negative_slope", 0.2)
    else:
        config, state = _from_layer(source)
        ours = hasattr(source, "nan_policy")
        activation = _activation(getattr(source, "activation", None)), float(getattr(source, "negative_slope", 0.2))
    if config.get("adjustment") is not None:
        raise ValueError(f"source must have adjustment=None: it takes tensors. Received: {config['adjustment']}")
    classes = {"num_classes": config["num_classes"]} if config.get("num_classes") is not None else {}
    if bool(classes) != hasattr(cls, "num_classes"):
        wanted = "a num_classes" if hasattr(cls, "num_classes") else "no num_classes"
        raise ValueError(f"source must have {wanted} to become a {cls.__name__}. Received: {classes or 'none'}")
    momentum, axis, size = config["momentum"], config["axis"], config.get("virtual_batch_size")
    batches = state.pop("batches", None)
    arrays = {name: widened(name, array) for name, array in state.items() if array is not None}
    axes = [int(one) for one in (axis if isinstance(axis, list | tuple) else [axis])]
    shape = arrays["moving_mean"].shape
    extents = _extents(axes, shape)
    if not ours and size is not None and len(shape) > 1:  # built, tf_keras counts axes behind one more, the ghosts'
        axes = [one - 1 if one > 0 else one for one in axes]
    layer = cls(
        axis=axes,
        momentum=None if momentum is None else float(momentum),
        epsilon=float(config["epsilon"]),
        center=config["center"],
        scale=config["scale"],
        activation=activation[0],
        negative_slope=activation[1],
        nan_policy=config.get("nan_policy", "propagate"),
        correction=config.get("correction", int(bool(config.get("fused")) and not ours)),
        trainable=bool(config.get("trainable", True)),
        virtual_batch_size=size,
        virtual_batch_grouping=config.get("virtual_batch_grouping", "contiguous" if ours else "strided"),
        **(_renorm(config) | {name: config.get(name, plain) for name, plain in SWITCHES.items()} | classes),
    )
    vectors: dict[str, Any] = {n: a.reshape(extents) if a.shape == shape else a for n, a in arrays.items()}
    layer.load_state_dict(vectors if momentum is not None else vectors | {"batches": np.asarray(batches)})
    return layer


def _renorm(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of renorm; tf.Variables among the bounds become the numbers they are now."""
    if not config.get("renorm"):
        return {}
    given = dict(config.get("renorm_clipping") or {})
    clipping = {name: None if bound is None else float(np.asarray(bound)) for name, bound in given.items()}
    momentum = float(config.get("renorm_momentum", 0.99))
    return {"renorm": True, "renorm_clipping": clipping or None, "renorm_momentum": momentum}


def _from_mapping(source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if "config" not in source or "weights" not in source:
        raise ValueError(f"source must have the keys 'config' and 'weights'. Received: {sorted(map(str, source))}")
    config, weights = dict(source["config"]), list(source["weights"])
    if absent := [name for name in BASIC if name not in config]:
        raise ValueError(f"source['config'] must be a BatchNormalization's. Missing: {absent}")
    present = {"gamma": config["scale"], "beta": config["center"]} | dict.fromkeys(NAMES, config.get("renorm"))
    names = [name for name in ORDER if present.get(name, True)]
    names += ["batches"] if config["momentum"] is None else []
    if len(weights) != len(names):
        raise ValueError(f"source['weights'] must hold {names}. Received: {len(weights)} arrays")
    return config, dict(zip(names, weights, strict=True))


def _from_layer(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if any(not hasattr(source, name) for name in BASIC):
        raise TypeError(f"source must be a Keras BatchNormalization or a mapping. Received: {type(source).__name__}")
    if not getattr(source, "built", False):
        raise ValueError("source must be built: call it once, or source.build(input_shape)")
    names = (*BASIC, *CARRIED, *RENORM, "trainable", "trainable_affine", "adjustment", "num_classes", "fused")
    config = {name: getattr(source, name) for name in names if hasattr(source, name)}
    counted = ("batches",) if config["momentum"] is None else ()
    return config, {name: getattr(source, name, None) for name in (*ORDER, *counted)}


def _extents(axis: Any, theirs: Any) -> tuple[int, ...]:
    """The shape of our vectors for a weight of Keras's: (C,), or of inputs' rank with extents of 1 off the axes."""
    shape: tuple[int, ...] = tuple(theirs)
    axes = list(axis) if isinstance(axis, list | tuple) else [axis]
    if len(axes) == 1:
        return (int(np.prod(shape)),)
    if len(shape) <= max(axes):
        return shape
    return tuple(shape[i] for i in sorted({one % len(shape) for one in axes}))


def _activation(activation: Any) -> str | None:
    """Its name: none, one of ours, or that of a Keras function which has one of these names."""
    name = activation
    if activation is not None and not isinstance(activation, str):
        name = getattr(activation, "__name__", type(activation).__name__)
    if name == "linear":
        name = None
    if name not in _checks.ACTIVATIONS:
        raise ValueError(f"activation must be one of {_checks.ACTIVATIONS}. Received: {name!r}")
    return None if name is None else str(name)


def widened(name: str, value: Any) -> Array:
    """An array, torch tensor (also one that needs gradients) or Keras variable as a NumPy array, halves as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value) if hasattr(value, "assign") else as_array(name, value)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def check_like(name: str, ours: Array | None, theirs: Any, shape: tuple[int, ...] | None = None) -> None:
    """Both absent, or of one shape and dtype. shape: what counts as theirs."""
    if (ours is None) != (theirs is None):
        raise ValueError(
            f"target must {'have no' if ours is None else 'have a'} {name}, like this layer. Received: {theirs!r}"
        )
    if ours is not None:
        shape = tuple(theirs.shape) if shape is None else shape
        if shape != ours.shape:
            raise ValueError(f"target's {name} must have shape {ours.shape}. Received: {shape}")
        dtype = str(getattr(theirs.dtype, "name", theirs.dtype)).removeprefix("torch.")
        if dtype != ours.dtype.name:
            raise TypeError(f"target's {name} must have dtype {ours.dtype}, like this layer's. Received: {dtype}")


def warn_of_variance(theirs: str, correction: int) -> None:
    warnings.warn(
        f"{theirs}, this layer has correction={correction}: inference is the same, but in further training the moving "
        f"variances will drift apart by up to a factor M/(M - 1)",
        UserWarning,
        stacklevel=5,
    )
