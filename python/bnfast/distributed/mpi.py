"""Batch normalization of one batch whose samples lie on several MPI ranks, over mpi4py: pip install "bnfast[mpi]".

moments, batch_norm_train and batch_norm_grad take what the functions of those names in bnfast take, each rank its own
shard, and give what one process would give for all of it: they are collective, so every rank of `comm` calls them.
Shards may differ in size and be empty. One message a call: (count, mean, variance) forward, (weight, dgamma, dbeta)
backward, of float64 values, merged by every rank in rank order. So statistics and sums are equal bits on every rank,
and moving statistics that begin equal stay equal.
An error on one rank is an error on all, before anything is written: its own there, RuntimeError on the others.
Formulas: Chan, Golub, LeVeque 1979 for the merge; Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError(
        f'bnfast.distributed.mpi needs mpi4py, pip install "bnfast[mpi]", and an MPI library: {error}'
    ) from error

from .._arguments import batch_norm as _validate
from .._arguments.arrays import Array, as_array
from ..functional import batch_norm as functional
from ..functional.batch_norm import GradResult, TrainResult
from ..functional.moments import Moments

__all__ = ["batch_norm_grad", "batch_norm_train", "moments"]

Vector: TypeAlias = npt.NDArray[np.float64]
Sent = TypeVar("Sent")
Own = TypeVar("Own")


def moments(x: Any, *, axis: int | Sequence[int] = -1, mask: Any = None, comm: Any = None) -> Moments:
    """Count, mean and population variance of every channel, over the x of all ranks.

    Args:
        x, axis, mask: as in `bnfast.moments`; every rank its own shard, of any size, with the same channels.
        comm: an mpi4py intracommunicator, all of whose ranks make this call; None stands for MPI.COMM_WORLD.

    Raises:
        ValueError, TypeError: as in `bnfast.moments`, on the rank concerned; ranks have different numbers of channels
            (ValueError on all); comm is no intracommunicator (TypeError, without a message to the others).
        RuntimeError: another rank failed; the text says which and why.
    """
    parts, _ = _from_all(_communicator(comm), lambda: (functional.moments(x, axis=axis, mask=mask), None))
    return _merged(parts)


def batch_norm_train(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Array | None = None,
    moving_variance: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    mask: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    correction: int = 0,
    nan_policy: str = "propagate",
    out: Array | None = None,
    comm: Any = None,
) -> TrainResult:
    """Normalize this rank's x with the statistics of all ranks' x, and update the moving statistics in place.

    x is read twice: once for its moments, once to be normalized. gamma, beta and the moving statistics are each
    rank's own copies, and should be equal.

    Args:
        comm: an mpi4py intracommunicator, all of whose ranks make this call; None stands for MPI.COMM_WORLD.
        Everything else is as in `bnfast.batch_norm_train`.

    Returns:
        TrainResult(y, mean, variance, invstd): y of this rank's x; the others of all ranks together.

    Raises:
        ValueError, TypeError, RuntimeError: as `moments`.
        FloatingPointError: nan_policy="raise" and the statistics of some channel are not finite, on all ranks.
        Nothing is changed by a call that raises.
    """

    def local() -> tuple[Moments, None]:
        _validate.train(
            *(x, gamma, beta, moving_mean, moving_variance, axis, momentum, epsilon, mask),
            *(activation, negative_slope, residual, correction, nan_policy, out),
        )
        return functional.moments(x, axis=axis, mask=mask), None

    parts, _ = _from_all(_communicator(comm), local)
    count, mean, variance = _merged(parts)
    finite = np.isfinite(mean) & np.isfinite(variance)
    if nan_policy == "raise" and not finite.all():
        channels = np.flatnonzero(~finite)
        more = f", ... ({len(channels)} in all)" if len(channels) > 8 else ""
        raise FloatingPointError(
            f"x has non-finite batch statistics in channels {', '.join(map(str, channels[:8]))}{more}"
        )
    y = functional.batch_norm_infer(
        *(x, mean, variance, gamma, beta),
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        out=out,
    )
    if moving_mean is not None and moving_variance is not None and count > 0:
        bessel = count / (count - 1) if correction and count > 1 else 1.0
        for moving, batch in ((moving_mean, mean), (moving_variance, variance * bessel)):
            new = moving.astype(np.float64) * momentum + batch * (1 - momentum)
            np.copyto(moving, new, casting="same_kind", where=finite if nan_policy == "skip_update" else True)
    total = variance + epsilon
    with np.errstate(divide="ignore", invalid="ignore"):
        invstd = np.where(total == 0, 0.0, 1 / np.sqrt(total))
    return TrainResult(y, mean, variance, invstd)


def batch_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    mask: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    y: Any = None,
    training: bool = True,
    out: Array | None = None,
    comm: Any = None,
) -> GradResult:
    """Gradients of the sum of all ranks' losses, from dy, the gradient of this rank's loss with respect to its y.

        dgamma, dbeta = the sums over all ranks, the same on every rank: not to be summed over ranks again
        dx = gamma*invstd*(dz - (w/W)*(dbeta + xhat*dgamma)),  W = the weight of all ranks

    The kernels run twice, for the sums and then for dx: about twice the time of `bnfast.batch_norm_grad`.

    Args:
        mean, invstd: as `batch_norm_train` of this module returned them.
        comm: the intracommunicator of the forward call; None stands for MPI.COMM_WORLD.
        Everything else is as in `bnfast.batch_norm_grad`, which alone takes dmean, dvariance and out_dresidual.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual): dx and dresidual of this rank's x.

    Raises:
        ValueError, TypeError, RuntimeError: as `moments`.
    """
    options = {"axis": axis, "activation": activation, "negative_slope": negative_slope, "residual": residual, "y": y}

    def local() -> tuple[_Sums, _Kept]:
        _, plain, _, scale, own_gamma, own_beta, channels, weights, *_ = _validate.grad(
            *(dy, x, mean, invstd, gamma, beta, axis, mask, activation, negative_slope),
            *(residual, y, training, None, None, out, None),
        )
        scale = scale.reshape(as_array("invstd", invstd).shape)  # (C,), or the extents of several axes
        wide = np.ones(scale.shape) if own_gamma is None else own_gamma.astype(np.float64).reshape(scale.shape)
        frozen = functional.batch_norm_grad(dy, x, mean, invstd, wide, beta, training=False, **options)
        extents = plain.shape[:channels] + plain.shape[channels + 1 :]
        weight = float(math.prod(extents) if weights is None else weights.sum(dtype=np.float64))
        compute = np.float64 if plain.dtype == np.float64 else np.float32
        dtype = next((a.dtype for a in (own_gamma, own_beta) if a is not None), np.dtype(compute))
        return _Sums(weight, frozen.dgamma, frozen.dbeta), _Kept(frozen, wide * scale, scale, dtype)

    comm = _communicator(comm)
    parts, kept = _from_all(comm, local)
    _same_channels([part.dgamma for part in parts])
    own, whole = parts[comm.rank], _Sums(*(functools.reduce(np.add, sums) for sums in zip(*parts, strict=True)))
    result = kept.frozen
    if training:
        # The kernel's constants come from its own sums and W; dmean and dvariance make them those of all ranks.
        share = own.weight / whole.weight if whole.weight > 0 else 0.0
        with np.errstate(invalid="ignore"):
            dmean = kept.factor * (own.dbeta - share * whole.dbeta)
            dvariance = 0.5 * kept.factor * kept.invstd * (own.dgamma - share * whole.dgamma)
        options |= {"mask": mask, "dmean": dmean, "dvariance": dvariance}
    if training or out is not None:
        target = result.dx if out is None else out
        result = functional.batch_norm_grad(dy, x, mean, invstd, gamma, beta, training=training, out=target, **options)
    with np.errstate(over="ignore"):
        dgamma, dbeta = (a.astype(kept.dtype) for a in (whole.dgamma, whole.dbeta))
    return GradResult(result.dx, dgamma, dbeta, result.dresidual)


class _Sums(NamedTuple):
    weight: float
    dgamma: Vector
    dbeta: Vector


class _Kept(NamedTuple):
    frozen: GradResult
    factor: Vector  # gamma*invstd
    invstd: Vector
    dtype: np.dtype[Any]  # of dgamma and dbeta


def _communicator(comm: Any) -> Any:
    if comm is None:
        return MPI.COMM_WORLD
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm must be an mpi4py intracommunicator or None. Received: {type(comm).__name__}")
    return comm


def _from_all(comm: Any, local: Callable[[], tuple[Sent, Own]]) -> tuple[list[Sent], Own]:
    """What `local` returns first on every rank, in rank order, and second on this one; or an error on all ranks."""
    try:
        sent, own = local()
    except Exception as error:
        comm.allgather((None, f"{type(error).__name__}: {error}"))  # the others wait for this rank's part
        raise
    replies = comm.allgather((sent, None))
    for rank, (_, text) in enumerate(replies):
        if text is not None:
            raise RuntimeError(f"rank {rank} of {comm.size} failed: {text}")
    return [part for part, _ in replies], own


def _merged(parts: list[Moments]) -> Moments:
    _same_channels([part.mean for part in parts])
    return functools.reduce(Moments.merge, parts)


def _same_channels(vectors: list[Vector]) -> None:
    channels = [len(vector) if vector.ndim == 1 else vector.shape for vector in vectors]
    if len(set(channels)) > 1:
        raise ValueError(f"x must have the same number of channels on every rank. Received, by rank: {channels}")
