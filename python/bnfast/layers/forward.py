"""What a call of the NumPy layer computes: y, its backward, and the moving statistics moved in place.

    forward    which statistics y takes, whether the moving ones move, and what each sample has of its own
    train      the batch's statistics: of the whole batch, of ghosts (_ghosts.py) or with renorm (_renorm_step.py)
    infer      the moving ones, as constants

What can fail comes before anything is moved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .._arguments import checks as _checks
from .._arguments.arrays import Array
from ..functional.batch_norm import GradResult, batch_norm_grad, batch_norm_infer, batch_norm_train
from . import ghosts as _ghosts
from . import per_sample as _per_sample
from . import renorm as _renorm_step
from .batch import Batch, Passed, Policy, State

__all__ = ["forward"]


def forward(batch: Batch, state: State, policy: Policy, of_batch: bool, moves: bool, adjustment: Any) -> Passed:
    """of_batch: y takes the batch's statistics, not the moving ones. adjustment: None where it isn't in force."""
    if adjustment is None and batch.labels is None:
        return _normalize(batch, state, policy, of_batch, moves)
    own = _per_sample.Own.of(batch, adjustment)
    alone = batch._replace(gamma=None, beta=None, residual=None, activation=None)
    return _per_sample.apply(_normalize(alone, state, policy, of_batch, moves), batch, own)


def _normalize(batch: Batch, state: State, policy: Policy, of_batch: bool, moves: bool) -> Passed:
    if of_batch:
        return train(batch, state, policy, moves)
    passed = infer(batch, state, policy.epsilon)
    if moves:  # the y of this pass is nobody's
        alone = batch._replace(gamma=None, beta=None, residual=None, activation=None)
        passed = passed._replace(present=train(alone, state, policy, moves).present)
    return passed


def train(batch: Batch, state: State, policy: Policy, moves: bool) -> Passed:
    """One pass with the batch's statistics, which move the state where `moves`."""
    if policy.renorm is not None:
        return _renorm_step.train(batch, state, policy, policy.renorm, moves)
    size, grouping = policy.virtual_batch_size, policy.virtual_batch_grouping
    if ghosts := _ghosts.slices(batch.x, batch.axes, size, grouping):
        return _train_ghosts(batch, ghosts, state, policy, moves)
    x, _, axes, gamma, beta, mask, *_ = batch
    weights = _checks.weights(mask, x, axes)
    words: dict[str, Any] = {"mask": mask, **batch.fused}
    result = batch_norm_train(
        *(x, gamma, beta, *((state["moving_mean"], state["moving_variance"]) if moves else ())),
        momentum=policy.momentum,
        epsilon=policy.epsilon,
        correction=policy.correction,
        nan_policy=policy.nan_policy,
        **words,
    )
    backward = partial(batch_norm_grad, x=x, mean=result.mean, invstd=result.invstd, gamma=gamma, beta=beta, **words)
    return Passed(result.y, backward, bool(x.size and (weights is None or weights.any())))


def _train_ghosts(batch: Batch, ghosts: list[slice], state: State, policy: Policy, moves: bool) -> Passed:
    x, _, axes, gamma, beta, mask, *_ = batch
    result = _ghosts.train(
        *(x, ghosts, gamma, beta, axes, mask),
        epsilon=policy.epsilon,
        nan_policy=policy.nan_policy,
        **batch.fused,
    )
    present = moves and _ghosts.update(
        (state["moving_mean"], state["moving_variance"]), result, policy.momentum, policy.correction, policy.nan_policy
    )
    given: dict[str, Any] = {
        "x": x,
        "ghosts": ghosts,
        "mean": result.mean,
        "invstd": result.invstd,
        "gamma": gamma,
        "beta": beta,
    }
    return Passed(result.y, partial(_ghosts.grad, mask=result.mask, **given, **batch.fused), present)


def infer(batch: Batch, state: State, epsilon: float) -> Passed:
    """One pass with the moving statistics; the mask has no say."""
    x, _, axes, gamma, beta, mask, *_ = batch
    _checks.weights(mask, x, axes)
    moving = state["moving_mean"], state["moving_variance"]
    y = batch_norm_infer(x, *moving, gamma, beta, epsilon=epsilon, **batch.fused)
    # copies, as the moving statistics may move before the backward
    return Passed(y, partial(_frozen_grad, batch=batch, moving=[m.copy() for m in moving], epsilon=epsilon), False)


def _frozen_grad(dy: Any, batch: Batch, moving: list[Array], epsilon: float, x: Array | None = None) -> GradResult:
    mean, variance = (vector.astype(np.float64) for vector in moving)
    with np.errstate(divide="ignore", invalid="ignore"):
        invstd = np.where(variance + epsilon == 0, 0.0, 1 / np.sqrt(variance + epsilon))  # 0 as in TrainResult.invstd
    x = batch.x if x is None else x
    return batch_norm_grad(*(dy, x, mean, invstd, batch.gamma, batch.beta), training=False, **batch.fused)
