"""Batch norm over all replicas of a tf.distribute strategy, as if their samples lay in one batch.

    forward     the kernels' moments of this replica's x; (n, mean, M2) gathered, merged in replica order (Chan,
                float64); the kernels' training step with gamma*r and beta + gamma*d, as in renorm, where
                r = sigma_own/sigma, d = (mean_own - mean)/sigma, sigma = sqrt(variance + epsilon)
    backward    the kernels' gradient for the sums of dz and dz*xhat, gathered and added in replica order; again for
                dx = gamma/sigma*(dz - w/W*(sum dz + xhat*sum dz*xhat)), with the sums and W of all replicas
So x is read once more forward (through bnfast's TensorFlow ops written too), the gradient kernel runs twice backward;
messages are 3*C and 2*C float64 values a replica, by the strategy's all_gather. dgamma and dbeta are this replica's
part: what trains under a strategy adds the replicas' gradients by itself. Merged statistics are equal bits on every
replica, and so moving statistics stay equal. A shard may be of any size, and empty.
Source: Chan, Golub, LeVeque 1979 for the merge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from .. import inference
from .. import ops as bridge
from .. import reference as formula
from ..reference import Batch, Options
from .step import Policy, State


class Moments(NamedTuple):
    """(C,) and float64; variance is the population's. W = 0 has mean = variance = 0."""

    mean: tf.Tensor
    variance: tf.Tensor
    total: tf.Tensor  # W, the sum of the weights


def replicas() -> int:
    """How many replicas compute here side by side: 1 outside of a strategy's replicas."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else int(context.num_replicas_in_sync)


def step(
    batch: Batch, state: State, options: Options, policy: Policy, of_batch: Any, moves: Any
) -> tuple[tf.Tensor, State]:
    """y and the state after it. of_batch, moves: False, True or a boolean tensor, equal on all replicas.

    With a tensor replicas exchange moments either way, because they can't inside a tf.cond. A mask of each channel's
    own runs on TensorFlow's ops.
    """
    x, gamma, beta, mask, residual = batch
    moving = _wide(state["moving_mean"]), _wide(state["moving_variance"])

    def frozen() -> tf.Tensor:
        return inference.infer(x, gamma, beta, *moving, options, residual)

    if mask is not None and mask.shape[options.axis] != 1:
        y, *merged = formula.train(x, gamma, beta, mask, options, residual, _merge)
        whole = Moments(*map(tf.stop_gradient, merged))
        y = y if of_batch is True else frozen() if of_batch is False else tf.where(of_batch, y, frozen())
    else:
        own = Moments(*bridge.moments(x, mask=mask, options=options, bridge=policy.bridge), _total(x, mask, options))
        whole = Moments(*_merge(*own))
        if of_batch is False:
            y = frozen()
        elif of_batch is True:
            y = _normalize(batch, options, policy.bridge, own, whole, None)
        else:
            mean, variance = (tf.where(of_batch, *pair) for pair in zip(whole, moving, strict=False))
            y = _normalize(batch, options, policy.bridge, own, Moments(mean, variance, whole.total), of_batch)
    if moves is False:
        return y, state
    moved = _moved(state, whole, policy)
    return y, moved if moves is True else {name: tf.where(moves, moved[name], state[name]) for name in moved}


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
    """For each replica, in order, the values stacked. Differentiable: the strategy's all_gather is."""
    context, own = tf.distribute.get_replica_context(), tf.stack(values)
    gathered = context.all_gather(own[tf.newaxis], axis=0)
    gathered.set_shape([context.num_replicas_in_sync, *own.shape])
    return list(tf.unstack(gathered))


def _merge(mean: tf.Tensor, variance: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Moments of all replicas from those of each."""
    first, *others = _gather([total, mean, variance * total])
    n, mean, squares = tf.unstack(first)
    for other in others:
        m, other_mean, other_squares = tf.unstack(other)
        share, delta = tf.math.divide_no_nan(m, n + m), other_mean - mean
        mean += delta * share
        squares += other_squares + delta**2 * n * share
        n += m
    return mean, tf.math.divide_no_nan(squares, n), n


def _moved(state: State, whole: Moments, policy: Policy) -> State:
    """The state after a batch of these moments, as the kernels and `training.step` have it."""
    moved, momentum, valid = dict(state), policy.momentum, whole.total > 0
    if momentum is None:
        count = _wide(state["batches"])
        momentum = count / (count + 1)
        moved["batches"] += tf.cast(tf.reduce_any(valid), moved["batches"].dtype)
    if policy.nan_policy == "skip_update":
        valid &= tf.math.is_finite(whole.mean) & tf.math.is_finite(whole.variance)
    bessel = tf.where(whole.total > 1, whole.total / tf.maximum(whole.total - policy.correction, 1e-300), 1)
    for name, batch in (("moving_mean", whole.mean), ("moving_variance", whole.variance * bessel)):
        new = _wide(state[name]) * momentum + batch * (1 - momentum)
        moved[name] = tf.where(valid, tf.cast(new, state[name].dtype), state[name])
    return moved


def _normalize(
    batch: Batch, options: Options, way: str, own: Moments, used: Moments, of_batch: tf.Tensor | None
) -> tf.Tensor:
    """y of this replica by the kernels, with statistics `used`. of_batch: whether they are the batch's (None: yes)."""
    primal, mean = batch.primal, used.mean
    sigma = tf.sqrt(used.variance + options.epsilon)
    invstd = tf.where(sigma > 0, 1 / tf.where(sigma > 0, sigma, 1), tf.where(sigma == 0, tf.zeros_like(sigma), sigma))
    zeros = tf.zeros_like(mean)
    # r takes out what this replica's pass divides by, whatever it is; 0 where its values are constant would lose x
    alone = options._replace(epsilon=options.epsilon or 1.0)

    def op(*values: tf.Tensor) -> Any:
        given = batch._replace(**dict(zip(primal, values, strict=True)))
        gamma, beta = _affine(given, mean)

        def by_kernels() -> tf.Tensor:
            r, d = tf.sqrt(own.variance + alone.epsilon) * invstd, (own.mean - mean) * invstd
            corrected = given._replace(gamma=gamma * r, beta=beta + gamma * d)
            return bridge.train_step(corrected, (zeros, zeros), 0.0, alone, way)[0]

        def frozen() -> tf.Tensor:
            return inference.infer(given.x, gamma, beta, mean, used.variance, options, given.residual)

        def gradient(dy: tf.Tensor) -> Any:
            return _gradient(dy, given, y, options, way, mean, invstd, own.total, used.total, of_batch)

        y = by_kernels() if of_batch is None else tf.cond(of_batch, by_kernels, frozen)
        return y, gradient

    y = tf.custom_gradient(op)(*primal.values())
    y.set_shape(batch.x.shape)
    return y


def _gradient(
    dy: tf.Tensor,
    batch: Batch,
    y: tf.Tensor,
    options: Options,
    way: str,
    mean: tf.Tensor,
    invstd: tf.Tensor,
    own_total: tf.Tensor,
    total: tf.Tensor,
    of_batch: tf.Tensor | None,
) -> tuple[tf.Tensor, ...]:
    """Gradients of batch.primal, in its order."""
    dy = tf.convert_to_tensor(dy)  # tf.gather's gradient is IndexedSlices
    tensors = {"dy": dy, **formula.kept(batch.primal, y, options)}
    straight = "residual" in batch.primal and "y" not in tensors  # without an activation dresidual is dy
    zeros = tf.zeros_like(mean)
    mask = batch.mask
    if of_batch is not None:  # no weights: statistics that are constants
        mask = tf.reshape(of_batch, [1] * dy.shape.rank) & (True if mask is None else tf.cast(mask, tf.bool))

    def op(*values: tf.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        gamma, beta = _affine(batch._replace(gamma=given.get("gamma"), beta=given.get("beta")), mean)
        common = given["dy"], given["x"], mean, invstd, gamma, beta
        words: dict[str, Any] = {"y": given.get("y"), "options": options, "bridge": way}
        _, dgamma, dbeta, _ = bridge.gradient(*common, zeros, zeros, **words)
        all_dgamma, all_dbeta = tf.unstack(tf.add_n(_gather([dgamma, dbeta])))
        # The kernel's constants come from its own sums and W; dmean and dvariance make them those of all replicas.
        share, factor = tf.math.divide_no_nan(own_total, total), gamma * invstd
        dmean = factor * (dbeta - share * all_dbeta)
        dvariance = 0.5 * factor * invstd * (dgamma - share * all_dgamma)
        dx, _, _, dresidual = bridge.gradient(*common, dmean, dvariance, mask=mask, **words)
        results = {"x": dx, "gamma": dgamma, "beta": dbeta, "y": dresidual}

        def derivative(*cotangents: tf.Tensor) -> Any:
            if of_batch is not None:
                raise NotImplementedError(
                    "second-order gradients with synchronized=True need training=True or False. Received: a tensor"
                )
            return formula.derivative_of_gradient(given, cotangents, mask, options, _merge)

        return tuple(tf.cast(results[name], given[name].dtype) for name in given if name != "dy"), derivative

    gradients = tf.custom_gradient(op)(*tensors.values())
    return (*gradients, dy) if straight else tuple(gradients)


def _affine(batch: Batch, like: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """gamma and beta in float64; ones and zeros where there are none."""
    gamma = tf.ones_like(like) if batch.gamma is None else _wide(batch.gamma)
    return gamma, tf.zeros_like(like) if batch.beta is None else _wide(batch.beta)
