"""The forward pass of a NumPy layer: y, its backward, and the in-place update of the moving statistics.

    forward    chooses the statistics for y, and adds per-sample parameters (per_sample.py)
    train      batch statistics: of the whole batch, of ghost batches (ghosts.py) or with renorm (renorm.py)
    infer      moving statistics, as constants

Everything that can raise comes before the first update.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .._arguments.array_checks import mask_weights
from .._arguments.arrays import Array
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_infer, batch_norm_train
from . import ghosts, per_sample, renorm
from .batch import Batch, ForwardPass, Policy, State

__all__ = ["forward"]


def forward(batch: Batch, state: State, policy: Policy, use_batch: bool, update: bool, adjustment: Any) -> ForwardPass:
    """One call of the layer.

    use_batch: y uses the batch's statistics, not the moving ones. update: the moving statistics are updated.
    adjustment: None if it does not apply to this call.
    """
    if adjustment is None and batch.labels is None:
        return _normalize(batch, state, policy, use_batch, update)
    affine = per_sample.PerSampleAffine.of(batch, adjustment)
    xhat = _normalize(batch.without_affine, state, policy, use_batch, update)
    return per_sample.apply(xhat, batch, affine)


def _normalize(batch: Batch, state: State, policy: Policy, use_batch: bool, update: bool) -> ForwardPass:
    if use_batch:
        return train(batch, state, policy, update)
    result = infer(batch, state, policy.epsilon)
    if update:  # a second pass for the statistics; its y is dropped
        result = result._replace(has_values=train(batch.without_affine, state, policy, update).has_values)
    return result


def train(batch: Batch, state: State, policy: Policy, update: bool) -> ForwardPass:
    """One pass with the batch's statistics. With `update`, the state is updated."""
    if policy.renorm is not None:
        return renorm.train(batch, state, policy, policy.renorm, update)
    slices = ghosts.ghost_slices(batch.x, batch.axes, policy.virtual_batch_size, policy.virtual_batch_grouping)
    if slices:
        return _train_ghosts(batch, slices, state, policy, update)
    x, gamma, beta = batch.x, batch.gamma, batch.beta
    weights = mask_weights(batch.mask, x, batch.axes)
    kwargs: dict[str, Any] = {"mask": batch.mask, **batch.fused}
    result = batch_norm_train(
        x,
        gamma,
        beta,
        state["moving_mean"] if update else None,
        state["moving_variance"] if update else None,
        momentum=policy.momentum,
        epsilon=policy.epsilon,
        correction=policy.correction,
        nan_policy=policy.nan_policy,
        **kwargs,
    )
    backward = partial(batch_norm_grad, x=x, mean=result.mean, invstd=result.invstd, gamma=gamma, beta=beta, **kwargs)
    return ForwardPass(result.y, backward, bool(x.size and (weights is None or weights.any())))


def _train_ghosts(batch: Batch, slices: list[slice], state: State, policy: Policy, update: bool) -> ForwardPass:
    x, gamma, beta = batch.x, batch.gamma, batch.beta
    result = ghosts.train(
        x,
        slices,
        gamma,
        beta,
        batch.axes,
        batch.mask,
        epsilon=policy.epsilon,
        nan_policy=policy.nan_policy,
        **batch.fused,
    )
    has_values = update and ghosts.update(
        (state["moving_mean"], state["moving_variance"]), result, policy.momentum, policy.correction, policy.nan_policy
    )
    backward = partial(
        ghosts.grad,
        x=x,
        slices=slices,
        mean=result.mean,
        invstd=result.invstd,
        gamma=gamma,
        beta=beta,
        mask=result.mask,
        **batch.fused,
    )
    return ForwardPass(result.y, backward, has_values)


def infer(batch: Batch, state: State, epsilon: float) -> ForwardPass:
    """One pass with the moving statistics. The mask is checked but has no effect."""
    x = batch.x
    mask_weights(batch.mask, x, batch.axes)
    moving = state["moving_mean"], state["moving_variance"]
    y = batch_norm_infer(x, *moving, batch.gamma, batch.beta, epsilon=epsilon, **batch.fused)
    # copies, because the moving statistics may be updated before the backward call
    backward = partial(_frozen_grad, batch=batch, moving=[m.copy() for m in moving], epsilon=epsilon)
    return ForwardPass(y, backward, False)


def _frozen_grad(dy: Any, batch: Batch, moving: list[Array], epsilon: float, x: Array | None = None) -> GradResult:
    mean, variance = (vector.astype(np.float64) for vector in moving)
    with np.errstate(divide="ignore", invalid="ignore"):
        invstd = np.where(variance + epsilon == 0, 0.0, 1 / np.sqrt(variance + epsilon))  # 0 as in TrainResult.invstd
    x = batch.x if x is None else x
    return batch_norm_grad(dy, x, mean, invstd, batch.gamma, batch.beta, training=False, **batch.fused)
