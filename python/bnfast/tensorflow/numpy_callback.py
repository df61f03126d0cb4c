"""The bridge "numpy_function": bnfast.functional as TensorFlow ops, one Python callback forward and one backward.

    train, train_step, moments, gradient   as in `ops`, which documents them
    call                                   any Python function over arrays as a TensorFlow op, without copies

In a graph, tf.numpy_function(stateful=False) hands out aliases of TensorFlow's buffers. A callback never writes them,
`outs` excepted. TensorFlow adopts an output without a copy if it is C-contiguous, of the announced dtype and 64-byte
aligned, as all outputs of the kernels are. A numpy_function has neither a static shape nor a gradient: the caller sets
both. Eager tensors enter through the buffer protocol and leave through DLPack; numpy_function would copy both ways.
The derivative of the gradient is that of the same formula in TensorFlow's own ops (`reference`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import _core
from ..functional.batch_norm import batch_norm_grad, batch_norm_train
from ..functional.batch_norm import moments as batch_moments
from . import reference
from .batch import Batch, GradientInputs, Options, compute_dtype
from .custom_gradient import custom_gradient
from .scalars import Scalar

Function = Callable[..., Sequence[np.ndarray]]
Direct = Callable[[list[str], Function], Function]

# A call costs more through a callback than through TensorFlow's own ops below this size: in a graph, both ways, a
# batch norm of 256 KiB takes 1.1x the time of Keras's layer, of 512 KiB 0.55x. A batch of unknown size counts as 32.
SMALL_BYTES = 256 << 10
USUAL_BATCH = 32

_SCALARS = ("momentum", "epsilon")  # floats, or tensors of rank 0
_ADOPT_BYTES = 16 * 1024  # a DLPack capsule costs about 5 us, a copy of 16 KiB about 1 us
_ALIGNMENT = 64  # TensorFlow aborts the process on a DLPack pointer that is not a multiple of this


def input_bytes(shape: Sequence[int | None], dtype: str) -> int:
    """The size of a batch of this shape; unknown extents after the batch's are left out."""
    batch = USUAL_BATCH if shape[0] is None else shape[0]
    return batch * math.prod(extent for extent in shape[1:] if extent) * int(tf.as_dtype(dtype).size)


class Callback(NamedTuple):
    """A function over arrays and the tensors to call it with, in its order."""

    function: Function
    inputs: list[tf.Tensor]


def train(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, mask: tf.Tensor | None, options: Options
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    y, mean, variance = train_step(Batch(x, gamma, beta, mask), None, 0.0, options)
    return y, tf.cast(mean, compute_dtype(x)), tf.cast(variance, compute_dtype(x))


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor] | None,
    momentum: Scalar,
    options: Options,
    correction: int = 0,
    nan_policy: str = "propagate",
    record: Any = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """y and the updated moving statistics; with moving=None y, mean and variance, all three differentiable."""
    primals = _present(**batch.primals)
    statistics = {} if moving is None else _present(moving_mean=moving[0], moving_variance=moving[1])
    attributes = {**options._asdict(), "momentum": momentum, "correction": correction, "nan_policy": nan_policy}
    scalars = {name: attributes.pop(name) for name in _SCALARS if tf.is_tensor(attributes[name])}
    constants = {**_present(mask=batch.mask), **statistics, **scalars}

    # The order of outputs is that of _core.Callback: y, mean, invstd, then the moving statistics or the variance.
    def forward(*values: tf.Tensor) -> Any:
        tensors = dict(zip(primals, values, strict=True))
        x = tensors["x"]
        last = [tensor.dtype for tensor in statistics.values()] or [tf.float64]
        callback = _prepare(
            partial(_train_callback, **attributes),
            {**tensors, **constants},
            _direct("train", attributes, constants),
            {"out": "x"},
        )
        if tf.executing_eagerly():
            outputs = _call_eagerly(callback)
        else:  # here rather than in a helper: the trace stays short
            dtypes = [x.dtype, tf.float64, tf.float64, *last]
            outputs = tf.numpy_function(callback.function, callback.inputs, dtypes, stateful=False)
        y, mean, invstd, *rest = outputs
        y.set_shape(x.shape)
        for statistic in (mean, invstd, *rest):
            statistic.set_shape([x.shape[options.axis]])
        saved = {"mean": mean, "invstd": invstd, **_present(mask=batch.mask)}
        if record is not None:
            record.saved = saved

        def backward(dy: tf.Tensor, dmean: tf.Tensor, dvariance: tf.Tensor) -> Any:
            if record is not None:
                gradients = record.gradients(tf.convert_to_tensor(dy), options)
                return tuple(gradients[name] for name in primals)
            arriving = {"dy": dy} if statistics else {"dy": dy, "dmean": dmean, "dvariance": dvariance}
            upstream = {name: tf.convert_to_tensor(d) for name, d in arriving.items()}  # tf.gather's are IndexedSlices
            gradients = _gradient({**upstream, **reference.kept_for_gradient(tensors, y, options)}, saved, options)
            dresidual_is_dy = options.activation is None and "residual" in tensors
            return (*gradients, upstream["dy"]) if dresidual_is_dy else gradients

        return (y, *(rest if statistics else (mean, *rest))), backward

    return tuple(custom_gradient(forward, *primals.values()))


def step_gradient(
    dy: tf.Tensor, batch: Batch, saved: dict[str, tf.Tensor], options: Options, y: tf.Tensor | None = None
) -> dict[str, tf.Tensor]:
    """The gradients of `train_step` by name. y: its output, needed with a residual and an activation."""
    kept = reference.kept_for_gradient(batch.primals, y, options)
    gradients = _gradient({"dy": dy, **kept}, saved, options)
    return {"residual": dy, **dict(zip(batch.primals, gradients, strict=False))}


def moments(x: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    tensors = {name: tf.stop_gradient(tensor) for name, tensor in _present(x=x, mask=mask).items()}
    mean, variance = call(partial(_moments_callback, axis=options.axis), tensors, [tf.float64, tf.float64])
    return mean, variance


def gradient(inputs: GradientInputs, options: Options) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]:
    saved = {"mean": inputs.mean, "invstd": inputs.invstd, **_present(mask=inputs.mask)}
    upstream = {"dy": inputs.dy, "dmean": inputs.dmean, "dvariance": inputs.dvariance}
    name = "residual" if options.activation in reference.SMOOTH else "y"
    primals = _present(x=inputs.x, gamma=inputs.gamma, beta=inputs.beta, **{name: inputs.y})
    dx, dgamma, dbeta, *dresidual = _gradient({**upstream, **primals}, saved, options)
    return dx, dgamma, dbeta, dresidual[0] if dresidual else None


def _gradient(given: dict[str, tf.Tensor], saved: dict[str, tf.Tensor], options: Options) -> Any:
    """The gradients of the primals in `given`, in its order: dx, dgamma, dbeta and, with y or residual, dresidual.

    `given` also holds the upstream gradients: dy and, where present, dmean and dvariance.
    """

    def backward(*values: tf.Tensor) -> Any:
        tensors = dict(zip(given, values, strict=True))
        passed = {**tensors, **saved}
        own = [passed[name] for name in ("x", "gamma", "beta") if name in passed]
        primals = own + [passed[name] for name in ("residual", "y") if name in passed]
        attributes = {name: value for name, value in options._asdict().items() if name != "epsilon"}  # invstd holds it
        gradients = call(
            partial(_gradient_callback, **attributes),
            passed,
            [tensor.dtype for tensor in primals],
            _direct("grad", {**attributes, "training": True}, saved),
            {
                "out": "dy",
                **({"out_dresidual": "dy"} if options.activation and len(primals) > len(own) else {}),
            },
        )
        for gradient, tensor in zip(gradients, primals, strict=True):
            gradient.set_shape(tensor.shape)

        def derivative(*cotangents: tf.Tensor) -> Any:
            return reference.derivative_of_gradient(tensors, cotangents, saved.get("mask"), options)

        return tuple(gradients), derivative

    return custom_gradient(backward, *given.values())


def call(
    function: Function,
    tensors: Mapping[str, tf.Tensor],
    dtypes: Sequence[tf.DType],
    direct: Direct | None = None,
    outs: Mapping[str, str] | None = None,
) -> list[tf.Tensor]:
    """function(**arrays) as TensorFlow tensors of `dtypes`. The function reads its arrays and never writes them.

    Args:
        direct: makes, from the names of the arrays and the function, what is called in its place with the arrays in
            their order; arrays to write arrive as integers (see `_output_memory`).
        outs: maps those arguments of the function that are arrays to write, and to return, to the tensor whose shape
            and dtype they have. In a graph this memory is TensorFlow's own, so its allocator can reuse it.
    """
    callback = _prepare(function, tensors, direct, outs)
    if tf.executing_eagerly():
        return _call_eagerly(callback)
    return list(tf.numpy_function(callback.function, callback.inputs, list(dtypes), stateful=False))


def _prepare(
    function: Function,
    tensors: Mapping[str, tf.Tensor],
    direct: Direct | None = None,
    outs: Mapping[str, str] | None = None,
) -> Callback:
    """The function that takes the arrays by position, and its inputs; the arguments are those of `call`."""
    lent = {} if outs is None or tf.executing_eagerly() else outs
    tensors = {**tensors, **{out: _output_memory(tensors[like]) for out, like in lent.items()}}
    names = list(tensors)

    def by_position(*arrays: np.ndarray) -> Sequence[np.ndarray]:
        kwargs = dict(zip(names, arrays, strict=True))
        for out, like in lent.items():
            kwargs[out] = kwargs[out].view(kwargs[like].dtype)
        return function(**kwargs)

    return Callback(by_position if direct is None else direct(names, by_position), list(tensors.values()))


def _call_eagerly(callback: Callback) -> list[tf.Tensor]:
    return [to_tensor(array) for array in callback.function(*map(to_array, callback.inputs))]


def _output_memory(like: tf.Tensor) -> tf.Tensor:
    """Memory for an output of that shape and dtype, allocated only after `like` is computed.

    Its dtype is an integer: tf.debugging.enable_check_numerics would find NaNs in floats that nobody has written yet.
    """
    with tf.control_dependencies([like]):
        return tf.raw_ops.Empty(shape=tf.shape(like), dtype=f"int{8 * like.dtype.size}", init=False)


def to_array(tensor: tf.Tensor) -> np.ndarray:
    """A read-only array over the buffer of an eager tensor, which it keeps alive."""
    if tensor.dtype == tf.bfloat16:  # the buffer protocol has no code for it: pass the same 16 bits as integers
        return np.asarray(memoryview(tf.bitcast(tensor, tf.uint16))).view(tf.bfloat16.as_numpy_dtype)
    return np.asarray(memoryview(tensor))


def to_tensor(array: np.ndarray) -> tf.Tensor:
    """An eager tensor over the array's buffer, which it keeps alive; a small or unaligned array is copied."""
    if array.nbytes < _ADOPT_BYTES or array.__array_interface__["data"][0] % _ALIGNMENT:
        return tf.convert_to_tensor(array)
    if array.dtype == tf.bfloat16.as_numpy_dtype:
        return tf.bitcast(to_tensor(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _present(**tensors: tf.Tensor | None) -> dict[str, tf.Tensor]:
    """The arguments that are not None, as tensors: custom_gradient accepts no None and treats variables differently."""
    return {name: tf.convert_to_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}


def _direct(kernel: str, attributes: dict[str, Any], others: dict[str, tf.Tensor]) -> Direct | None:
    """The callback without its Python frames, which falls back on them.

    A mask needs bnfast.functional's checks, and a momentum or epsilon that arrives as an array is no number yet.
    """
    if not others.keys().isdisjoint(("mask", *_SCALARS)):
        return None
    return lambda names, fallback: _core.Callback(kernel, names, attributes, fallback)


def _train_callback(x: np.ndarray, **kwargs: Any) -> list[np.ndarray]:
    """y, mean, invstd, and the updated copies of the moving statistics, or the variance if there are none."""
    moving = [kwargs[name].copy() for name in ("moving_mean", "moving_variance") if name in kwargs]
    kwargs.update(zip(("moving_mean", "moving_variance"), moving, strict=False))
    kwargs.update({name: _number(name, kwargs[name]) for name in _SCALARS if name in kwargs})
    y, mean, variance, invstd = batch_norm_train(x, **kwargs)
    return [y, mean, invstd, *(moving or [variance])]


def _number(name: str, value: Any) -> float:
    """momentum or epsilon, from an attribute or an array."""
    if np.ndim(value):
        raise ValueError(f"{name} must be a scalar. Received: shape {np.shape(value)}")
    return float(value)


def _moments_callback(x: np.ndarray, **kwargs: Any) -> list[np.ndarray]:
    _, mean, variance = batch_moments(x, **kwargs)
    return [mean, variance]


def _gradient_callback(dy: np.ndarray, x: np.ndarray, **kwargs: Any) -> list[np.ndarray]:
    """dx and, of dgamma, dbeta and dresidual, those whose primal was given (the residual or y), in its dtype."""
    result = batch_norm_grad(dy, x, **kwargs)
    others: dict[str, Any] = {"gamma": result.dgamma, "beta": result.dbeta}
    others |= {"y": result.dresidual, "residual": result.dresidual}
    return [
        result.dx,
        *(array.astype(kwargs[name].dtype, copy=False) for name, array in others.items() if name in kwargs),
    ]
