"""Batch norm over all replicas of a tf.distribute strategy, as if their samples were one batch.

    forward     the kernels compute the moments of this replica's x; (n, mean, M2) are gathered and merged in replica
                order (Chan, float64); then the kernels run a training step with gamma*r and beta + gamma*d, as in
                renorm, where r = sigma_own/sigma, d = (mean_own - mean)/sigma, sigma = sqrt(variance + epsilon)
    backward    the kernels compute the sums of dz and dz*xhat, which are gathered and added in replica order; a second
                gradient of the kernels gives dx = gamma/sigma*(dz - w/W*(sum dz + xhat*sum dz*xhat)), with the sums and
                W of all replicas

Forward reads x once more (and writes it once more through bnfast's TensorFlow op); backward runs the gradient kernel
twice. Messages hold 3*C and 2*C float64 values per replica and go through the strategy's all_gather. dgamma and dbeta
are this replica's part: training under a strategy adds the replicas' gradients by itself. Merged statistics have equal
bits on every replica, so the moving statistics stay equal. A shard may have any size and may be empty.
Source: Chan, Golub, LeVeque 1979 for the merge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from .. import ops, reference
from ..batch import Batch, GradientInputs, Options, mask_varies_by_channel
from ..custom_gradient import custom_gradient
from ..mode import Mode
from ..scalars import Scalar
from .core import CoreStep, State, update_valid


class Moments(NamedTuple):
    """Float64 vectors of shape (C,); variance is the population variance. W = 0 has mean = variance = 0."""

    mean: tf.Tensor
    variance: tf.Tensor
    total: tf.Tensor  # W, the sum of the weights


class ReplicaStatistics(NamedTuple):
    """What normalizes this replica's x."""

    own: Moments  # of this replica's x
    used: Moments  # of all replicas, or the moving statistics where the batch's aren't used
    use_batch: tf.Tensor | None  # whether `used` are the batch's; None: yes

    def invstd(self, epsilon: Scalar) -> tf.Tensor:
        """1/sqrt(variance + epsilon), 0 where that is 1/0, NaN where the variance is."""
        sigma = tf.sqrt(self.used.variance + epsilon)
        inverse = 1 / tf.where(sigma > 0, sigma, 1)
        return tf.where(sigma > 0, inverse, tf.where(sigma == 0, tf.zeros_like(sigma), sigma))


def replicas() -> int:
    """The number of replicas that compute side by side here: 1 outside a strategy's replica context."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def step(core: CoreStep, mode: Mode) -> tuple[tf.Tensor, State]:
    """y and the state after it. What `mode` holds is False, True or a boolean tensor that is equal on all replicas.

    With a tensor the replicas exchange moments in either case, because they can't do so inside a tf.cond. A mask that
    varies by channel runs on TensorFlow's ops.
    """
    (x, gamma, beta, mask, residual), state, options = core.batch, core.state, core.options
    moving = _wide(state["moving_mean"]), _wide(state["moving_variance"])
    use_batch, update = mode.use_batch, mode.update

    def frozen() -> tf.Tensor:
        return ops.infer(core.batch, moving, options)

    if mask_varies_by_channel(mask, options):
        y, *merged = reference.train(x, gamma, beta, mask, options, residual, _merge)
        whole = Moments(*map(tf.stop_gradient, merged))
        y = y if use_batch is True else frozen() if use_batch is False else tf.where(use_batch, y, frozen())
    else:
        own = Moments(*ops.moments(x, mask=mask, options=options, bridge=core.bridge), _total(x, mask, options))
        whole = Moments(*_merge(*own))
        if use_batch is False:
            y = frozen()
        elif use_batch is True:
            y = _normalize(core, ReplicaStatistics(own, whole, None))
        else:
            mean, variance = (tf.where(use_batch, *pair) for pair in zip(whole, moving, strict=False))
            y = _normalize(core, ReplicaStatistics(own, Moments(mean, variance, whole.total), use_batch))
    if update is False:
        return y, state
    moved = _moved(core, whole)
    return y, moved if update is True else {name: tf.where(update, moved[name], state[name]) for name in moved}


def _wide(vector: tf.Tensor) -> tf.Tensor:
    return tf.cast(vector, tf.float64)


def _total(x: tf.Tensor, mask: tf.Tensor | None, options: Options) -> tf.Tensor:
    """W, for every channel."""
    shape, axis = tf.shape(x, out_type=tf.int64), options.axis % x.shape.rank
    extents = tf.concat([shape[:axis], [1], shape[axis + 1 :]], 0)
    weights = tf.ones((), tf.float64) if mask is None else _wide(mask)
    total = tf.reduce_sum(weights) * _wide(tf.reduce_prod(extents)) / _wide(tf.maximum(1, tf.size(weights)))
    return tf.fill([shape[axis]], total)


def _gather(values: list[tf.Tensor]) -> list[tf.Tensor]:
    """The stacked values of each replica, in replica order. Differentiable, as the strategy's all_gather is."""
    context, own = tf.distribute.get_replica_context(), tf.stack(values)
    gathered = context.all_gather(own[tf.newaxis], axis=0)
    gathered.set_shape([context.num_replicas_in_sync, *own.shape])
    return list(tf.unstack(gathered))


def _merge(mean: tf.Tensor, variance: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The moments of all replicas together, from this replica's."""
    first, *others = _gather([total, mean, variance * total])
    n, mean, squares = tf.unstack(first)
    for other in others:
        m, other_mean, other_squares = tf.unstack(other)
        share, delta = tf.math.divide_no_nan(m, n + m), other_mean - mean
        mean += delta * share
        squares += other_squares + delta**2 * n * share
        n += m
    return mean, tf.math.divide_no_nan(squares, n), n


def _moved(core: CoreStep, whole: Moments) -> State:
    """The state after a batch with these moments, by the rules of the kernels and of `average`."""
    state, momentum, valid = dict(core.state), core.momentum, whole.total > 0
    if momentum is None:
        count = _wide(state["batches"])
        momentum = count / (count + 1)
        state["batches"] += tf.cast(tf.reduce_any(valid), state["batches"].dtype)
    if core.nan_policy == "skip_update":
        valid &= tf.math.is_finite(whole.mean) & tf.math.is_finite(whole.variance)
    sample = tf.where(whole.total > 1, whole.total / tf.maximum(whole.total - core.correction, 1e-300), 1)
    return update_valid(state, {"moving_mean": whole.mean, "moving_variance": whole.variance * sample}, momentum, valid)


def _normalize(core: CoreStep, statistics: ReplicaStatistics) -> tf.Tensor:
    """y of this replica from the kernels, normalized with `statistics.used`."""
    batch, options = core.batch, core.options
    primals, own, used = batch.primals, statistics.own, statistics.used
    invstd, zeros = statistics.invstd(options.epsilon), tf.zeros_like(used.mean)
    # r removes whatever this replica's own pass divides by. That must not be 0: a constant shard would lose x.
    kernel_options = options._replace(epsilon=_or_one(options.epsilon))

    def forward(*values: tf.Tensor) -> Any:
        given = batch._replace(**dict(zip(primals, values, strict=True)))
        gamma, beta = _affine(given, used.mean)

        def by_kernels() -> tf.Tensor:
            r = tf.sqrt(own.variance + kernel_options.epsilon) * invstd
            d = (own.mean - used.mean) * invstd
            corrected = given._replace(gamma=gamma * r, beta=beta + gamma * d)
            return ops.train_step(corrected, (zeros, zeros), 0.0, kernel_options, core.bridge)[0]

        def frozen() -> tf.Tensor:
            return ops.infer(given._replace(gamma=gamma, beta=beta), (used.mean, used.variance), options)

        def backward(dy: tf.Tensor) -> Any:
            return _gradient(dy, y, core._replace(batch=given), statistics)

        y = by_kernels() if statistics.use_batch is None else tf.cond(statistics.use_batch, by_kernels, frozen)
        return y, backward

    y = custom_gradient(forward, *primals.values())
    y.set_shape(batch.x.shape)
    return y


def _gradient(dy: tf.Tensor, y: tf.Tensor, core: CoreStep, statistics: ReplicaStatistics) -> tuple[tf.Tensor, ...]:
    """The gradients of the batch's primals, in their order."""
    batch, options, use_batch = core.batch, core.options, statistics.use_batch
    mean, invstd = statistics.used.mean, statistics.invstd(options.epsilon)
    dy = tf.convert_to_tensor(dy)  # tf.gather's gradient is IndexedSlices
    tensors = {"dy": dy, **reference.kept_for_gradient(batch.primals, y, options)}
    dresidual_is_dy = "residual" in batch.primals and options.activation is None
    zeros = tf.zeros_like(mean)
    mask = batch.mask
    if use_batch is not None:  # weights of 0 make the statistics constants
        mask = tf.reshape(use_batch, [1] * dy.shape.rank) & (True if mask is None else tf.cast(mask, tf.bool))

    def backward(*values: tf.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        gamma, beta = _affine(batch._replace(gamma=given.get("gamma"), beta=given.get("beta")), mean)
        kept = given.get("y", given.get("residual"))
        inputs = GradientInputs(given["dy"], given["x"], mean, invstd, gamma, beta, zeros, zeros, mask=None, y=kept)
        _, dgamma, dbeta, _ = ops.gradient(inputs, options, core.bridge)
        all_dgamma, all_dbeta = tf.unstack(tf.add_n(_gather([dgamma, dbeta])))
        # The kernel computes dx from its own sums and W; dmean and dvariance turn these into those of all replicas.
        share = tf.math.divide_no_nan(statistics.own.total, statistics.used.total)
        factor = gamma * invstd
        dmean = factor * (dbeta - share * all_dbeta)
        dvariance = 0.5 * factor * invstd * (dgamma - share * all_dgamma)
        inputs = inputs._replace(dmean=dmean, dvariance=dvariance, mask=mask)
        dx, _, _, dresidual = ops.gradient(inputs, options, core.bridge)
        results = {"x": dx, "gamma": dgamma, "beta": dbeta, "y": dresidual, "residual": dresidual}

        def derivative(*cotangents: tf.Tensor) -> Any:
            if use_batch is not None:
                raise NotImplementedError(
                    "second-order gradients with synchronized=True need training=True or False. Received: a tensor"
                )
            return reference.derivative_of_gradient(given, cotangents, mask, options, _merge)

        return tuple(tf.cast(results[name], given[name].dtype) for name in given if name != "dy"), derivative

    gradients = custom_gradient(backward, *tensors.values())
    return (*gradients, dy) if dresidual_is_dy else tuple(gradients)


def _or_one(epsilon: Scalar) -> Scalar:
    """epsilon, or 1 where it is 0."""
    return tf.where(epsilon > 0, epsilon, tf.ones_like(epsilon)) if tf.is_tensor(epsilon) else epsilon or 1.0


def _affine(batch: Batch, like: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """gamma and beta in float64; ones and zeros where they are None."""
    gamma = tf.ones_like(like) if batch.gamma is None else _wide(batch.gamma)
    return gamma, tf.zeros_like(like) if batch.beta is None else _wide(batch.beta)
