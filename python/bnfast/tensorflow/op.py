"""The bridge "op": the TensorFlow ops BnfastTrain, BnfastInfer and BnfastGrad (csrc/tf/), their loading, calls and
gradients.

    register       loads bnfast/_tf.so, once per process; never raises
    status         (available, reason); registers, and tests the op once per process; never raises
    choose         the bridge that a layer's `bridge` argument and the environment's BNFAST_BRIDGE select
    on_own_ops     whether that is TensorFlow's own ops, which XLA compiles; never raises for want of the op
    train, train_step, moments, gradient   as in `ops`, which documents them
    infer          one pass over memory, where `inference` may use it

The kernels run inside TensorFlow's executor, without Python and without the GIL, on bnfast._core's threads and scratch.
y may reuse the buffer of x, dx that of dy or x, and dresidual that of x, if TensorFlow holds the buffer for nothing
else. Second and higher derivatives are those of the same formula in TensorFlow's own ops (`reference`). A kernel
reports bad arguments as tf.errors.InvalidArgumentError. The ops run on a CPU; XLA has no kernel for them.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from .. import _core
from . import op_library, reference
from .batch import Batch, GradientInputs, Options, compute_dtype
from .pullback import pullback
from .scalars import Scalar

BRIDGES = op_library.BRIDGES

GPU_REASON = (
    "TensorFlow sees a GPU, and bnfast's kernels for TensorFlow run on the CPU alone: its tensors would be copied "
    "to the CPU and back in every call"
)

_RECORD = "_bnfast_record"  # the attribute of y that holds the record of its step (training/record.py)

_logger = logging.getLogger("bnfast")
_lock = threading.RLock()


class _Library(NamedTuple):
    ops: Any  # the module of wrappers that TensorFlow generates; None if loading failed
    reason: str


_registered: _Library | None = None
_library: _Library | None = None
_logged = False


def register() -> None:
    """Loads the library, so that graphs and SavedModels that hold the ops can be loaded. Never raises, and leaves
    TensorFlow's devices unconfigured: the self-test, which needs them, comes with the first use."""
    _register()


def status() -> tuple[bool, str]:
    """Whether the ops can be used in this process, and why (not)."""
    library = _load()
    return library.ops is not None, library.reason


def choose(bridge: str) -> str:
    """ "op", "numpy_function" or "tensorflow".

    "auto" is what BNFAST_BRIDGE says; else "tensorflow" if TensorFlow sees a GPU; else "op" if the library loads.

    Raises:
        RuntimeError: the op was asked for and can't be used.
        ValueError: the word names no bridge.
    """
    if on_own_ops(bridge):
        if op_library.wanted(bridge) == "auto":
            _log_once("bnfast.keras leaves batch norm to TensorFlow's own ops, because %s", GPU_REASON)
        return "tensorflow"
    wanted = op_library.wanted(bridge)
    if wanted == "numpy_function":
        return wanted
    available, reason = status()
    if available:
        return "op"
    if wanted == "op":
        raise RuntimeError(f"bnfast's TensorFlow op can't be used: {reason}")
    _log_once("bnfast.keras goes through numpy_function, because its TensorFlow op can't be used: %s", reason)
    return "numpy_function"


def on_own_ops(bridge: str) -> bool:
    """Whether this bridge is TensorFlow's own ops: by name, or "auto" where TensorFlow sees a GPU.

    Raises:
        ValueError: the word names no bridge.
    """
    wanted = op_library.wanted(bridge)
    return wanted == "tensorflow" or (wanted == "auto" and sees_gpu())


def sees_gpu() -> bool:
    """Whether a GPU is visible to TensorFlow. Starts no GPU, and leaves set_visible_devices possible."""
    return bool(tf.config.get_visible_devices("GPU"))


def _log_once(message: str, reason: str) -> None:
    global _logged
    with _lock:
        if not _logged:
            _logger.warning(message, reason)
        _logged = True


def _load() -> _Library:
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                _library = _tested(_register())
    return _library


def _register() -> _Library:
    global _registered
    if _registered is None:
        with _lock:
            if _registered is None:
                _registered = _try_to_load()
    return _registered


def _tested(library: _Library) -> _Library:
    if library.ops is None:
        return library
    try:
        reason = _self_test(library.ops)
    except Exception as error:  # as in _try_to_load
        reason = str(error).strip() or type(error).__name__
    return _Library(None, f"{op_library.PATH}: {reason}") if reason else library


def _try_to_load() -> _Library:
    reason = op_library.defect()
    if reason:
        return _Library(None, reason)
    path = os.fspath(op_library.PATH)
    try:
        ops = tf.load_op_library(path)
        reason = _core._connect_tf(path)
        if reason:
            return _Library(None, f"{path}: {reason}")
        tf.RegisterGradient("BnfastTrain")(_train_gradient)
        tf.RegisterGradient("BnfastInfer")(_infer_gradient)
        tf.RegisterGradient("BnfastGrad")(_grad_gradient)
    except Exception as error:  # any error of TensorFlow's: the other bridge works without the op
        return _Library(None, f"{path}: {str(error).strip() or type(error).__name__}")
    return _Library(ops, f"{op_library.PATH.name} loaded by TensorFlow {tf.__version__}")


def _self_test(ops: Any) -> str:
    """Why a batch norm of four numbers, or its gradient, is wrong; "" if both are right.

    TensorFlow calls the C API for kernels alpha, so the result is checked once per process.
    """
    with tf.init_scope(), tf.device("CPU:0"):
        if not tf.executing_eagerly():
            return ""
        x, two = tf.constant([[1.0, 2.0], [3.0, 6.0]]), tf.constant([2.0, 2.0])
        shared = dict(axis=-1, epsilon=0.0, activation="none", negative_slope_bits=0)
        shared |= dict(x=x, gamma=[two], beta=[two])
        moving = dict(moving_mean=two, moving_variance=two * 2, residual=[])
        forward = ops.bnfast_train(mask=[], momentum=0.5, **moving, **shared)
        grad = dict(saved=forward.saved, mask=[], y=[], statistics=[], parameter_type=tf.float32)
        backward = ops.bnfast_grad(dy=x, **grad, **shared)
        wanted: dict[str, tuple[Any, Any]] = {
            "y": ([[0, 0], [4, 4]], forward.y),
            "moving_mean": ([2, 3], forward.new_mean),
            "moving_variance": ([2.5, 4], forward.new_variance),
            "mean and invstd": ([[2, 4], [1, 0.5]], forward.saved),
            "dx": ([[0, 0], [0, 0]], backward.dx),
            "dgamma": ([2, 4], backward.dgamma),
            "dbeta": ([4, 8], backward.dbeta),
            "y of inference": ([[1, 2], [3, 6]], ops.bnfast_infer(**moving, **shared)),
        }
        wrong = [name for name, (right, actual) in wanted.items() if not np.array_equal(actual.numpy(), right)]
    return f"it computes {', '.join(wrong)} wrong under TensorFlow {tf.__version__}" if wrong else ""


def train(
    x: tf.Tensor, gamma: tf.Tensor | None, beta: tf.Tensor | None, mask: tf.Tensor | None, options: Options
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train`. With momentum 0 the moving statistics are the batch's own, and so are their gradients."""
    x = tf.convert_to_tensor(x)
    channels = x.shape[options.axis] or tf.shape(x)[options.axis]
    zeros = tf.zeros([channels], tf.float64)
    gamma, beta = (None if vector is None else tf.cast(vector, tf.float64) for vector in (gamma, beta))
    y, mean, variance = train_step(Batch(x, gamma, beta, mask), (zeros, zeros), 0.0, options, statistics_gradient=True)
    dtype = compute_dtype(x)
    return y, tf.cast(mean, dtype), tf.cast(variance, dtype)


def moments(x: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    """`ops.moments`, from a training step whose y is unused: there is no op for moments alone."""
    x = tf.stop_gradient(x)
    zeros = tf.zeros([x.shape[options.axis] or tf.shape(x)[options.axis]], tf.float64)
    linear = Options(options.axis, options.epsilon)
    _, mean, variance = train_step(Batch(x, mask=mask), (zeros, zeros), 0.0, linear)
    return mean, variance


def gradient(inputs: GradientInputs, options: Options) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor | None]:
    """`ops.gradient`."""
    batch = Batch(inputs.x, inputs.gamma, inputs.beta, inputs.mask)
    saved, statistics = tf.stack([inputs.mean, inputs.invstd]), [inputs.dmean, inputs.dvariance]
    result = _grad(inputs.dy, batch, saved, options, inputs.y, statistics, tf.float64)
    return result.dx, result.dgamma, result.dbeta, None if inputs.y is None else result.dresidual[0]


def train_step(
    batch: Batch,
    moving: tuple[tf.Tensor, tf.Tensor],
    momentum: Scalar,
    options: Options,
    record: Any = None,
    **attributes: Any,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`ops.train_step`; attributes: further ones of the op. The (C,) vectors share one dtype, float32 or float64."""
    x, gamma, beta, mask, residual = batch
    x = tf.convert_to_tensor(x)
    y, mean, variance, saved = _load().ops.bnfast_train(
        x=x,
        moving_mean=moving[0],
        moving_variance=moving[1],
        momentum=momentum,
        epsilon=options.epsilon,
        gamma=_optional(gamma),
        beta=_optional(beta),
        mask=[] if mask is None else [_weights(mask, x, options.axis)],
        residual=_optional(residual),
        **attributes,
        **_attributes(options),
    )
    if record is not None:
        record.saved = saved
        setattr(y, _RECORD, record)
    return y, mean, variance


def infer(batch: Batch, moving: tuple[tf.Tensor, tf.Tensor], options: Options) -> tf.Tensor:
    """y in inference mode, with residual and activation; the batch has no mask."""
    return _load().ops.bnfast_infer(
        x=batch.x,
        moving_mean=moving[0],
        moving_variance=moving[1],
        epsilon=options.epsilon,
        gamma=_optional(batch.gamma),
        beta=_optional(batch.beta),
        residual=_optional(batch.residual),
        **_attributes(options),
    )


def step_gradient(
    dy: tf.Tensor,
    batch: Batch,
    saved: tf.Tensor,
    options: Options,
    y: tf.Tensor | None = None,
    statistics: Sequence[tf.Tensor] = (),
    parameter_type: tf.DType | None = None,
) -> dict[str, tf.Tensor]:
    """The gradients of `train_step` by name. saved and y: its outputs; y is read with a residual and an activation.

    statistics: upstream gradients of mean and variance, if they have any. parameter_type: that of gamma and beta.
    """
    vectors = [vector for vector in (batch.gamma, batch.beta) if vector is not None]
    parameter_type = parameter_type or (vectors[0].dtype if vectors else tf.float64)
    if batch.residual is None or options.activation is None:
        y = None
    elif options.activation in reference.SMOOTH:  # see csrc/tf/signatures.h
        y = batch.residual
    result = _grad(dy, batch, saved, options, y, statistics, parameter_type)
    dresidual = dy if y is None else result.dresidual[0]
    return {"x": result.dx, "gamma": result.dgamma, "beta": result.dbeta, "residual": dresidual}


def _grad(
    dy: tf.Tensor,
    batch: Batch,
    saved: tf.Tensor,
    options: Options,
    y: tf.Tensor | None,
    statistics: Sequence[tf.Tensor],
    parameter_type: tf.DType,
) -> Any:
    """The outputs of BnfastGrad. statistics: upstream gradients of mean and variance, or none."""
    return _load().ops.bnfast_grad(
        dy=dy,
        x=batch.x,
        saved=saved,
        epsilon=options.epsilon,
        gamma=_optional(batch.gamma),
        beta=_optional(batch.beta),
        mask=[] if batch.mask is None else [_weights(batch.mask, batch.x, options.axis)],
        y=_optional(y),
        parameter_type=parameter_type,
        statistics=list(statistics),
        **_attributes(options),
    )


def _optional(tensor: tf.Tensor | None) -> list[tf.Tensor]:
    """An optional input as the ops take it: a list of one tensor or none."""
    return [] if tensor is None else [tensor]


def _weights(mask: tf.Tensor, x: tf.Tensor, axis: int) -> tf.Tensor:
    """The mask as the kernels need it: the shape of x with extent 1 along `axis`, in the compute dtype of x."""
    at = axis % x.shape.rank
    weights = tf.cast(mask, compute_dtype(x))
    wanted = [1 if i == at else extent for i, extent in enumerate(x.shape)]
    if None not in wanted and weights.shape == wanted:
        return weights
    return tf.broadcast_to(weights, tf.tensor_scatter_nd_update(tf.shape(x), [[at]], [1]))


def _attributes(options: Options) -> dict[str, Any]:
    """The op's attributes. epsilon is an input, as momentum is."""
    return _attributes_of(options.axis, options.activation, options.negative_slope)


@functools.lru_cache
def _attributes_of(axis: int, activation: str | None, negative_slope: float) -> dict[str, Any]:
    """TensorFlow's float attributes hold 32 bits: a float64 is passed as the int of its bits."""
    return {"axis": axis, "activation": activation or "none", "negative_slope_bits": _bits(negative_slope)}


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


class _Call(NamedTuple):
    """One call of an op, as its gradient needs it: `optional` holds the optional inputs that are given, by name."""

    optional: dict[str, Any]
    options: Options

    @staticmethod
    def of(op: Any, epsilon_at: int, names: tuple[str, ...]) -> _Call:
        given, place = {}, epsilon_at + 1  # epsilon is the last input before the optional ones
        for name in names:
            for i in range(op.get_attr("num_" + name)):
                given[name if name != "statistics" else ("dmean", "dvariance")[i]] = op.inputs[place]
                place += 1
        activation = tf.compat.as_str(op.get_attr("activation"))
        (slope,) = struct.unpack("<d", struct.pack("<q", op.get_attr("negative_slope_bits")))
        epsilon = op.inputs[epsilon_at]
        options = Options(op.get_attr("axis"), epsilon, None if activation == "none" else activation, slope)
        return _Call(given, options)


def _train_gradient(op: Any, dy: tf.Tensor, dmean: tf.Tensor, dvariance: tf.Tensor, _: Any) -> list[tf.Tensor | None]:
    """One gradient, or None, for each input of BnfastTrain."""
    optional, options = _Call.of(op, 4, ("gamma", "beta", "mask", "residual"))
    record = getattr(op.outputs[0], _RECORD, None)
    if record is not None:
        gradients = record.gradients(dy, options)
    else:
        batch, statistics = Batch(op.inputs[0], **optional), op.get_attr("statistics_gradient")
        gradients = step_gradient(
            dy,
            batch,
            op.outputs[3],
            options,
            op.outputs[0],
            [dmean, dvariance] if statistics else [],
            op.inputs[1].dtype,  # that of the moving statistics
        )
    given = (gradients[name] if name != "mask" else None for name in optional)
    return [gradients["x"], None, None, None, None, *given]


def _infer_gradient(op: Any, dy: tf.Tensor) -> list[tf.Tensor | None]:
    """One gradient, or None, for each input of BnfastInfer: those of the formula in TensorFlow's ops."""
    optional, options = _Call.of(op, 3, ("gamma", "beta", "residual"))
    x, mean, variance = op.inputs[:3]

    def infer(x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor, *others: tf.Tensor) -> list[tf.Tensor]:
        batch = Batch(x, **dict(zip(optional, others, strict=True)))
        return [reference.infer(batch, (mean, variance), options)]

    dx, dmean, dvariance, *others = pullback(infer, [x, mean, variance, *optional.values()], [dy])
    return [dx, dmean, dvariance, None, *others]


def _grad_gradient(op: Any, *cotangents: tf.Tensor) -> list[tf.Tensor | None]:
    """One gradient, or None, for each input of BnfastGrad."""
    optional, options = _Call.of(op, 3, ("gamma", "beta", "mask", "y", "statistics"))
    given = {"dy": op.inputs[0], "x": op.inputs[1], **optional}
    mask = given.pop("mask", None)
    outputs = dict(zip(("x", "gamma", "beta", "y"), cotangents, strict=False))
    used = [outputs[name] for name in outputs if name in given]
    smooth = options.activation in reference.SMOOTH
    names = {"residual" if name == "y" and smooth else name: tensor for name, tensor in given.items()}
    derivatives = dict(zip(given, reference.derivative_of_gradient(names, used, mask, options), strict=True))
    others = (derivatives.get(name) for name in optional)  # that of y is None: it only selects slopes
    return [derivatives["dy"], derivatives["x"], None, None, *others]
