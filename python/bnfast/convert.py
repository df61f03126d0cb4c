"""State in and out of the NumPy layer: its own dict, Keras's layers, PyTorch's modules.

Values carry over as they are; what differs is what they mean from the next training step on:
- momentum is the weight of the old value here and in Keras, of the new one in PyTorch: one is 1 minus the other.
- epsilon is 1e-3 by default here and in Keras, 1e-5 in PyTorch: it is always carried along, never assumed.
- Keras's moving_variance averages population variances, PyTorch's running_var sample variances (times M/(M - 1)), and
  so does tf_keras where its fused kernel runs: here correction=0 and correction=1. Inference isn't concerned.
Keras and torch are never imported here, except torch to write into a live torch module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks
from ._arrays import Array, as_array

if TYPE_CHECKING:
    from .layers import BatchNormalization

__all__ = ["from_keras", "from_torch", "load", "to_keras", "to_torch"]

ORDER = ("gamma", "beta", "moving_mean", "moving_variance")  # of Keras's get_weights
TORCH_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def load(layer: BatchNormalization, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Copy `state` into `layer`, all or nothing: see BatchNormalization.load_state_dict."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays. Received: {type(state).__name__}")
    missing, unknown = [n for n in names if n not in state], [str(n) for n in state if n not in names]
    if missing or unknown:
        raise ValueError(f"state must have the keys {list(names)}. Missing: {missing}, unknown: {unknown}")
    arrays = {name: as_array(name, state[name]) for name in names}
    channels = layer.channels if layer.built else arrays["moving_mean"].size
    for name, array in arrays.items():
        wanted = getattr(layer, name).dtype if layer.built else layer.dtype
        if wanted is not None and array.dtype != wanted:
            raise TypeError(f"{name} must have dtype {wanted}, like the layer's. Received: {array.dtype}")
        if array.dtype.char not in "fd" or not array.dtype.isnative:
            raise TypeError(f"{name} must have dtype float32 or float64 in native byte order. Received: {array.dtype}")
        if array.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), one value a channel. Received: {array.shape}")
    if layer.built:
        for name, array in arrays.items():
            getattr(layer, name)[...] = array
    else:
        for name, array in arrays.items():
            setattr(layer, name, np.array(array))


def to_keras(layer: BatchNormalization, target: Any = None) -> Any:
    """`layer` in Keras's terms.

    Without a target: {"config": ..., "weights": [...]}, so that with Keras's own layer or bnfast.keras's
    `k = BatchNormalization(**config); k.build(shape); k.set_weights(weights)`. With `target`, a built Keras layer with
    the same gamma and beta: its weights, momentum and epsilon are set, and it is returned. Its axis stays its own.

    Raises:
        RuntimeError: `layer` isn't built.
        ValueError: `target` isn't built or has other weights, the activation can't be expressed there, or momentum is
            None.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction=1; Keras goes on with population variances.
    """
    state, momentum = layer.state_dict(), _fixed_momentum(layer)
    config: dict[str, Any] = {"axis": layer.axis, "momentum": momentum, "epsilon": layer.epsilon}
    config |= {"center": layer.center, "scale": layer.scale}
    if layer.virtual_batch_size is not None:  # bnfast.keras's layer has it, and an activation, Keras's own has not
        config |= {name: getattr(layer, name) for name in ("virtual_batch_size", "virtual_batch_grouping")}
    if layer.activation is not None:
        config["activation"] = layer.activation
        if layer.activation == "leaky_relu" and layer.negative_slope != 0.2:
            raise ValueError(
                f'negative_slope must be 0.2, which "leaky_relu" means in Keras. Received: {layer.negative_slope}'
            )
    if layer.correction:
        _warn_of_variance("Keras averages population variances", layer.correction)
    weights = [state[name] for name in ORDER if name in state]
    if target is None:
        return {"config": config, "weights": weights}
    if not getattr(target, "built", False):
        raise ValueError("target must be built: call it once, or target.build(input_shape)")
    if layer.activation is not None and _keras_activation(target)[0] != layer.activation:
        raise ValueError(f"target must have activation {layer.activation!r}, like this layer. Received: {target!r}")
    variables = {name: getattr(target, name, None) for name in ORDER}
    for name, variable in variables.items():
        _check_like(name, state.get(name), variable)
    target.set_weights(weights)
    target.momentum, target.epsilon = momentum, layer.epsilon
    return target


def from_keras(cls: type[BatchNormalization], source: Any) -> BatchNormalization:
    """A layer like `source`: a built layer of Keras 3, bnfast.keras or tf_keras, or a mapping
    {"config": k.get_config(), "weights": k.get_weights()}.

    tf_keras's fused layers average sample variances and give correction=1. float16 and bfloat16 variables become
    float32.

    Raises:
        ValueError: `source` isn't built or lacks something, or its activation is not one of ours.
        NotImplementedError: it has several axes or renorm=True.
        TypeError: it is neither a mapping nor a batch normalization layer.
    """
    if isinstance(source, Mapping):
        config, state, fused = _keras_mapping(source)
        activation = config.get("activation"), config.get("negative_slope", 0.2)
    else:
        absent = [name for name in ("axis", "momentum", "epsilon", "center", "scale") if not hasattr(source, name)]
        if absent:
            raise TypeError(
                f"source must be a Keras BatchNormalization or a mapping. Received: {type(source).__name__}"
            )
        if not getattr(source, "built", False):
            raise ValueError("source must be built: call it once, or source.build(input_shape)")
        names = ("axis", "momentum", "epsilon", "center", "scale", "renorm")
        config = {name: getattr(source, name, False) for name in names}
        ghosts = ("virtual_batch_size", "virtual_batch_grouping")
        config |= {name: getattr(source, name) for name in ghosts if hasattr(source, name)}
        state = {name: getattr(source, name, None) for name in ORDER}
        activation, fused = _keras_activation(source), bool(getattr(source, "fused", False))
    if config.get("renorm"):
        raise NotImplementedError("source must have renorm=False: this layer has no renorm. Received: renorm=True")
    if config["momentum"] is None:
        raise ValueError("source must have a momentum. Received: None (a cumulative average)")
    axis = config["axis"]
    layer = cls(
        axis=axis if isinstance(axis, int) else list(axis),  # type: ignore[arg-type]  # tf_keras: a list of one
        momentum=float(config["momentum"]),
        epsilon=float(config["epsilon"]),
        center=config["center"],
        scale=config["scale"],
        activation=activation[0],
        negative_slope=activation[1],
        correction=int(fused),
        virtual_batch_size=config.get("virtual_batch_size"),
        virtual_batch_grouping=config.get("virtual_batch_grouping", "strided"),  # tf_keras's, which has no word for it
    )
    arrays = {name: _widened(name, a) for name, a in state.items() if a is not None}
    if layer.virtual_batch_size is not None:  # tf_keras's weights are then of rank x.ndim + 1
        arrays = {name: a.reshape(-1) for name, a in arrays.items()}
    layer.load_state_dict(arrays)
    return layer


def _keras_mapping(source: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any], bool]:
    if "config" not in source or "weights" not in source:
        raise ValueError(f"source must have the keys 'config' and 'weights'. Received: {sorted(map(str, source))}")
    config, weights = source["config"], list(source["weights"])
    absent = [name for name in ("axis", "momentum", "epsilon", "center", "scale") if name not in config]
    if absent:
        raise ValueError(f"source['config'] must be a BatchNormalization's. Missing: {absent}")
    names = [n for n in ORDER if (n != "gamma" or config["scale"]) and (n != "beta" or config["center"])]
    if len(weights) != len(names):
        raise ValueError(f"source['weights'] must hold {names}. Received: {len(weights)} arrays")
    return config, dict(zip(names, weights, strict=True)), bool(config.get("fused"))


def _keras_activation(source: Any) -> tuple[str | None, float]:
    """Name and slope of a layer's activation: none, one of our names, or a Keras function of that name."""
    activation = getattr(source, "activation", None)
    name = (
        activation
        if activation is None or isinstance(activation, str)
        else getattr(activation, "__name__", type(activation).__name__)
    )
    if name == "linear":
        name = None
    if name not in _checks.ACTIVATIONS:
        raise ValueError(f"activation must be one of {_checks.ACTIVATIONS}. Received: {name!r}")
    return name, float(getattr(source, "negative_slope", 0.2))


def to_torch(layer: BatchNormalization, target: Any = None) -> Any:
    """`layer` in PyTorch's terms.

    Without a target: {"state_dict": {"weight", "bias", "running_mean", "running_var"}, "eps", "momentum"}, of NumPy
    arrays. With `target`, a torch BatchNorm module of as many channels: weights, running statistics, eps and momentum
    are set, and it is returned. PyTorch's channel axis is 1, whatever ours is.

    Raises:
        RuntimeError: `layer` isn't built.
        ValueError: the layer has an activation or momentum=None; `target` has other weights or no running statistics.
        TypeError: dtypes differ.
    Warns:
        UserWarning: correction=0; PyTorch goes on with sample variances. Inference is the same.
    """
    state = layer.state_dict()
    if layer.activation is not None:
        raise ValueError(f"activation must be None, as PyTorch's BatchNorm has none. Received: {layer.activation!r}")
    momentum = _complement(_fixed_momentum(layer))
    if not layer.correction:
        _warn_of_variance("PyTorch averages sample variances", layer.correction)
    if target is None:
        renamed = {TORCH_NAMES[name]: array for name, array in state.items()}
        return {"state_dict": renamed, "eps": layer.epsilon, "momentum": momentum}
    import torch

    tensors: dict[str, Any] = {name: getattr(target, theirs, None) for name, theirs in TORCH_NAMES.items()}
    for name, tensor in tensors.items():
        _check_like(name, state.get(name), tensor)
    with torch.no_grad():
        for name, array in state.items():
            tensors[name].copy_(torch.from_numpy(array))
    target.eps, target.momentum = layer.epsilon, momentum
    return target


def from_torch(
    cls: type[BatchNormalization],
    source: Any,
    *,
    axis: int = 1,
    eps: float | None = None,
    momentum: float | None = None,
) -> BatchNormalization:
    """A layer that goes on where `source` stands: a torch BatchNorm module, what `to_torch` returns, or a bare state
    dict. The layer has correction=1, as PyTorch's running_var averages sample variances, so that training on gives
    the same statistics on both sides. float16 and bfloat16 tensors become float32.

    Args:
        axis: of the new layer; 1 as in PyTorch, or -1 for channels_last data.
        eps, momentum: in PyTorch's sense (momentum weighs the new value), in place of the source's. A bare state
            dict has neither, so both are needed with it.

    Raises:
        ValueError: something is missing, or the module has momentum=None (a cumulative average, which no fixed
            momentum expresses: pass momentum=) or track_running_stats=False.
        TypeError: `source` is neither a mapping nor a batch norm module.
    """
    state: Mapping[str, Any]
    if isinstance(source, Mapping):
        state = source.get("state_dict", source)
        eps = source.get("eps") if eps is None else eps
        momentum = source.get("momentum") if momentum is None else momentum
        if eps is None or momentum is None:
            raise ValueError(f"eps and momentum must be passed with a state dict. Received: {eps=}, {momentum=}")
    elif hasattr(source, "running_mean") and hasattr(source, "eps"):
        state = {name: getattr(source, name, None) for name in TORCH_NAMES.values()}
        eps = source.eps if eps is None else eps
        momentum = source.momentum if momentum is None else momentum
        if momentum is None:
            raise ValueError("momentum must be a number: pass momentum=. Received: None (PyTorch's cumulative average)")
    else:
        raise TypeError(f"source must be a torch BatchNorm module or a mapping. Received: {type(source).__name__}")
    arrays = {ours: state[name] for ours, name in TORCH_NAMES.items() if state.get(name) is not None}
    if "moving_mean" not in arrays or "moving_variance" not in arrays:
        received = [name for name in TORCH_NAMES.values() if state.get(name) is not None]
        raise ValueError(
            f"source must have running_mean and running_var (track_running_stats=True). Received: {received}"
        )
    layer = cls(
        axis=axis,
        momentum=_complement(_checks.real("momentum", momentum, 1.0)),
        epsilon=_checks.real("eps", eps),
        center="beta" in arrays,
        scale="gamma" in arrays,
        correction=1,
    )
    layer.load_state_dict({name: _widened(name, a) for name, a in arrays.items()})
    return layer


def _complement(momentum: float) -> float:
    """1 - momentum in decimal, so that 0.1 is 0.9 and back 0.1, not 0.09999999999999998."""
    return float(1 - Decimal(repr(float(momentum))))


def _fixed_momentum(layer: BatchNormalization) -> float:
    if layer.momentum is None:
        raise ValueError("momentum must be a number to leave this layer. Received: None (a cumulative average)")
    return layer.momentum


def _widened(name: str, value: Any) -> Array:
    """An array, torch tensor (also one that needs gradients) or Keras variable as a NumPy array, halves as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    array = np.asarray(value) if hasattr(value, "assign") else as_array(name, value)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _check_like(name: str, ours: Array | None, theirs: Any) -> None:
    """Both absent, or of one shape and dtype."""
    if (ours is None) != (theirs is None):
        raise ValueError(
            f"target must {'have no' if ours is None else 'have a'} {name}, like this layer. Received: {theirs!r}"
        )
    if ours is not None:
        if tuple(theirs.shape) != ours.shape:
            raise ValueError(f"target's {name} must have shape {ours.shape}. Received: {tuple(theirs.shape)}")
        dtype = str(getattr(theirs.dtype, "name", theirs.dtype)).removeprefix("torch.")
        if dtype != ours.dtype.name:
            raise TypeError(f"target's {name} must have dtype {ours.dtype}, like this layer's. Received: {dtype}")


def _warn_of_variance(theirs: str, correction: int) -> None:
    warnings.warn(
        f"{theirs}, this layer has correction={correction}: inference is the same, but in further training the moving "
        f"variances will drift apart by up to a factor M/(M - 1)",
        UserWarning,
        stacklevel=4,
    )
