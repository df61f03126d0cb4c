"""`tf.layers.batch_normalization` in TF 1's graph mode; TensorFlow has it only with tf_keras and TF_USE_LEGACY_KERAS=1.

    y = gamma*(x - mean)/sqrt(variance + epsilon) + beta, and UPDATE_OPS get moving -= (moving - batch)*(1 - momentum)

Variables come from tf.compat.v1.get_variable, so names, scopes, reuse and checkpoints are those of TF 1. y is computed
by bnfast.tensorflow.training.step, as in `bnfast.keras`. Running y updates nothing: the updates are separate ops. They
subtract a difference, as TF 1's do, so that two uses of one layer in one Session.run both count.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from .._arguments import checks
from ..tensorflow import scalars
from ..tensorflow.axes import Axes
from ..tensorflow.batch import Batch, Options, parameter
from ..tensorflow.mode import Mode
from ..tensorflow.training import adjustment as adjustments
from ..tensorflow.training import ghosts
from ..tensorflow.training import renorm as renorms
from ..tensorflow.training.step import Policy, step

__all__ = ["batch_normalization"]

_SCOPE = "batch_normalization"


class _Weights(NamedTuple):
    gamma: Any
    beta: Any
    state: dict[str, Any]  # moving_mean, moving_variance and those of renorm


def batch_normalization(
    inputs: Any,
    axis: Any = -1,
    momentum: Any = 0.99,
    epsilon: Any = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Any = "zeros",
    gamma_initializer: Any = "ones",
    moving_mean_initializer: Any = "zeros",
    moving_variance_initializer: Any = "ones",
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    beta_constraint: Any = None,
    gamma_constraint: Any = None,
    training: Any = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Any = None,
    renorm: bool = False,
    renorm_clipping: Any = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: adjustments.Adjustment | None = None,
) -> tf.Tensor:
    """Batch normalization of a graph's tensor, with the arguments, variables and results of TF 1's function.

    The moving statistics are updated by ops in tf.compat.v1.GraphKeys.UPDATE_OPS, which must run with the train op or
    under tf.control_dependencies. Regularizers add to REGULARIZATION_LOSSES.

    Args:
        inputs: float tensor of known rank, with known extents along axis; float16 and bfloat16 compute in float32.
        axis: the channel axis, or several; variables then have the rank of inputs, with extent 1 off these axes.
        momentum, epsilon: as in the formulas above, momentum in [0, 1]. Numbers, or scalar tensors such as variables
            and placeholders, whose range is checked when the graph runs. They get no gradient.
        center, scale: whether to use beta, gamma.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer: a name, an
            initializer of TF 1 or Keras, or a function of shape and dtype; None is the scope's.
        beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint: None, a name or a function of the
            variable.
        training: a bool or a boolean scalar tensor, such as a placeholder: whether to normalize with the batch's
            statistics.
        trainable: whether gamma and beta are in TRAINABLE_VARIABLES, and whether there are updates. It doesn't affect
            which statistics normalize.
        name, reuse: of the variable scope ("batch_normalization", made unique, if there is no name).
        renorm, renorm_clipping, renorm_momentum: batch renormalization; rmin, rmax, dmax may be scalar tensors.
        fused: None, True or False. The kernels are the same. But unless it is False, inputs of rank 4 or 5 that aren't
            float64 and have a single axis, 1 or the last, update moving_variance with the sample variance, the batch's
            variance times W/(W - 1), as in TF 1 (not with renorm, virtual_batch_size or adjustment).
        virtual_batch_size: normalize this many samples at a time; of G ghosts, ghost g holds samples g, g + G, ...
            Variables have the rank of inputs plus 1, as in TF 1.
        adjustment: a function of the shape of inputs that returns (scale, bias); in training y is
            (xhat*scale + bias)*gamma + beta.

    Returns:
        y, in the shape and dtype of inputs.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.
        ValueError: execution is eager.
        tf.errors.InvalidArgumentError: virtual_batch_size doesn't divide the batch when the graph runs.

    Example:
        >>> import tensorflow as tf
        >>> from bnfast.compat.v1 import batch_normalization
        >>> with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        ...     y = batch_normalization(tf.constant([[1.0], [5.0]]), epsilon=0.0, momentum=0.5, training=True)
        ...     updates = tf.compat.v1.get_collection(tf.compat.v1.GraphKeys.UPDATE_OPS)
        ...     session.run(tf.compat.v1.global_variables_initializer())
        ...     session.run([y, updates])[0]
        array([[-1.],
               [ 1.]], dtype=float32)

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    if tf.compat.v1.executing_eagerly_outside_functions():
        raise ValueError(
            "bnfast.compat.v1.batch_normalization needs a graph: with tf.Graph().as_default(), or "
            "tf.compat.v1.disable_eager_execution(). Received: eager execution"
        )
    x = tf.convert_to_tensor(inputs)
    momentum, epsilon = (
        scalars.read(name, scalars.check(name, value)) for name, value in (("momentum", momentum), ("epsilon", epsilon))
    )
    _check(x, training, fused, center=center, scale=scale, trainable=trainable, renorm=renorm)
    axes = Axes.of(list(axis) if isinstance(axis, (list, tuple)) else [checks.integer("axis", axis)], x.shape)
    if renorm:
        fixed = {bound: value for bound, value in (renorm_clipping or {}).items() if not tf.is_tensor(value)}
        renorms.check(fixed, renorm_momentum)
        if unknown := set(renorm_clipping or {}) - {"rmin", "rmax", "dmax"}:
            raise ValueError(f"renorm_clipping must have keys rmin, rmax, dmax. Received: {sorted(unknown)}")
        if moving_variance_initializer is None:  # its root starts moving_stddev
            raise TypeError("moving_variance_initializer must be an initializer with renorm=True. Received: None")
    if virtual_batch_size is not None:
        ghosts.check(virtual_batch_size, renorm)
        if 0 in axes.axes:
            raise ValueError(f"axis must not be 0, the batch's, with virtual_batch_size. Received: axis={axis}")
    adjustments.check(adjustment, virtual_batch_size)
    plain = not renorm and virtual_batch_size is None and adjustment is None
    policy = Policy(
        momentum,
        correction=int(fused is not False and plain and _fusable(x, axes)),
        renorm=renorms.Renorm(renorm_clipping or {}, renorm_momentum) if renorm else None,
        ghosts=None if virtual_batch_size is None else ghosts.Ghosts(virtual_batch_size, "strided"),
    )
    shape = _shape(x, axes, virtual_batch_size is not None)
    dtype = tf.float64 if x.dtype == tf.float64 else tf.float32

    def variable(
        name: str, initializer: Any, regularizer: Any = None, constraint: Any = None, train: bool = False
    ) -> Any:
        return tf.compat.v1.get_variable(
            name,
            shape,
            dtype,
            initializer=_initializer(initializer),
            regularizer=keras.regularizers.get(regularizer),
            constraint=keras.constraints.get(constraint),
            trainable=train,
        )

    named = {"name_or_scope": _SCOPE} if name is None and reuse else {"name_or_scope": name, "default_name": _SCOPE}
    with tf.compat.v1.variable_scope(**named, reuse=reuse) as scope:
        scope.set_partitioner(None)
        gamma = variable("gamma", gamma_initializer, gamma_regularizer, gamma_constraint, trainable) if scale else None
        beta = variable("beta", beta_initializer, beta_regularizer, beta_constraint, trainable) if center else None
        moving = {"moving_mean": moving_mean_initializer, "moving_variance": moving_variance_initializer}
        if renorm:
            root = _root(moving_variance_initializer)
            moving |= {"moving_stddev": root, "renorm_mean": moving_mean_initializer, "renorm_stddev": root}
        weights = _Weights(gamma, beta, {name: variable(name, first) for name, first in moving.items()})
        return _normalize(x, axes, epsilon, training, weights, adjustment, policy, trainable)


def _normalize(
    x: tf.Tensor,
    axes: Axes,
    epsilon: Any,
    training: Any,
    weights: _Weights,
    adjustment: adjustments.Adjustment | None,
    policy: Policy,
    updates: bool,
) -> tf.Tensor:
    """y; adds the updates to UPDATE_OPS if `updates`."""
    known = tf.get_static_value(training) if tf.is_tensor(training) else training
    mode = Mode(tf.cast(training, tf.bool) if known is None else bool(known))
    gamma, beta = (None if vector is None else parameter(vector) for vector in (weights.gamma, weights.beta))
    state = {name: parameter(variable) for name, variable in weights.state.items()}
    draw = None if adjustment is None else partial(adjustments.draw_merged, adjustment, x, axes)
    y, new = step(Batch(axes.merge(x), gamma, beta), state, Options(axes.place, epsilon), policy, mode, draw)
    if updates and (known is None or known):
        _add_updates(y, weights.state, state, new)
    y = axes.split(y, x)
    y.set_shape(x.shape)
    return y


def _add_updates(y: tf.Tensor, variables: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds two ops to UPDATE_OPS, as TF 1 does, which programs unpack: that of moving_mean, that of moving_variance.

    With renorm each of them also updates renorm_mean and renorm_stddev, and the second moving_stddev.
    """
    with tf.control_dependencies([y]):
        taken = {
            name: tf.stop_gradient(tf.reshape(old[name] - new[name], variable.shape))
            for name, variable in variables.items()
        }
    # after y and all differences, which may read a variable that TF 1's assignments change in place
    with tf.control_dependencies([y, *taken.values()]), tf.name_scope("AssignMovingAvg"):
        done = {name: tf.compat.v1.assign_sub(variable, taken[name]) for name, variable in variables.items()}
    both = [done[name] for name in ("renorm_mean", "renorm_stddev") if name in done]
    for last, others in (("moving_mean", both), ("moving_variance", [*both, done.get("moving_stddev")])):
        together = [update for update in others if update is not None]
        with tf.control_dependencies(together):
            update = tf.identity(done[last]) if together else done[last]
        tf.compat.v1.add_to_collection(tf.compat.v1.GraphKeys.UPDATE_OPS, update)


def _check(x: tf.Tensor, training: Any, fused: Any, **switches: Any) -> None:
    """Raises the errors of the arguments that nothing below checks."""
    if not x.dtype.is_floating:
        raise TypeError(f"inputs must be of a float dtype. Received: {x.dtype.name}")
    if x.shape.rank is None:
        raise ValueError("inputs must have a known rank. Received: a tensor of unknown shape")
    for name, value in switches.items():
        checks.boolean(name, value)
    if fused is not None:
        checks.boolean("fused", fused)
    if tf.is_tensor(training):
        if not (training.dtype.base_dtype.is_bool or training.dtype.base_dtype.is_integer):
            raise TypeError(f"training must be a bool or a boolean tensor. Received: dtype {training.dtype.name}")
    elif not isinstance(training, (bool, int, np.bool_)):
        raise TypeError(f"training must be a bool or a boolean tensor. Received: {training!r}")


def _fusable(x: tf.Tensor, axes: Axes) -> bool:
    """Whether TF 1's fused kernel accepts it."""
    rank = x.shape.rank
    return x.dtype != tf.float64 and rank in (4, 5) and axes.axes in ((1,), (rank - 1,))


def _shape(x: tf.Tensor, axes: Axes, ghosts: bool) -> list[int]:
    """The shape of the variables, as in TF 1."""
    if len(axes.axes) == 1 and not ghosts:
        return [x.shape[axes.axes[0]]]
    shape = list(axes.weight_shape(x.shape))
    return [shape[0], 1, *shape[1:]] if ghosts else shape


def _initializer(given: Any) -> Any:
    """The initializer for get_variable. Names are Keras's, and Keras's initializers accept no `partition_info`."""
    if not isinstance(given, (str, dict, keras.initializers.Initializer)):
        return given
    initializer = keras.initializers.get(given)

    def initial(shape: Any, dtype: Any = tf.float32, partition_info: Any = None) -> Any:
        return initializer(shape, tf.as_dtype(dtype).name)

    return initial


def _root(given: Any) -> Any:
    """An initializer whose values are the square roots of the given one's."""
    initializer = _initializer(given)

    def initial(shape: Any, dtype: Any = tf.float32, partition_info: Any = None) -> Any:
        values = initializer() if isinstance(initializer, type) else initializer
        return tf.sqrt(values(shape, dtype=dtype))

    return initial
