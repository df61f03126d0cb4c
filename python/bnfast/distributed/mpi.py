"""Batch normalization of a batch whose samples are spread over MPI ranks, with mpi4py: pip install "bnfast[mpi]".

moments, batch_norm_train and batch_norm_grad have the arguments of the bnfast functions of those names. Each rank
passes its own shard, and the result is that of one process with all samples. The calls are collective: every rank of
`comm` makes them. Shards may differ in size and may be empty.
Each call exchanges one message of float64 values: (count, mean, variance) forward, (weight, dgamma, dbeta) backward.
Every rank merges them in rank order, so statistics and sums have equal bits on all ranks, and moving statistics that
start equal stay equal.
If one rank raises, all do, before anything is written: RuntimeError on the other ranks.
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

from .._arguments import batch_norm as arguments
from .._arguments.arrays import Array, as_array
from ..functional import batch_norm
from ..functional.batch_norm import GradResult, TrainResult
from ..functional.moments import Moments

__all__ = ["batch_norm_grad", "batch_norm_train", "moments"]

Vector: TypeAlias = npt.NDArray[np.float64]
Sent = TypeVar("Sent")
Local = TypeVar("Local")


def moments(x: Any, *, axis: int | Sequence[int] = -1, mask: Any = None, comm: Any = None) -> Moments:
    """Count, mean and population variance of each channel, over the x of all ranks.

    Args:
        x, axis, mask: as in `bnfast.moments`. Each rank passes its own shard, of any size, with the same channels.
        comm: an mpi4py intracommunicator whose ranks all make this call. None means MPI.COMM_WORLD.

    Returns:
        Moments(count, mean, variance), the same on all ranks.

    Raises:
        ValueError, TypeError: as in `bnfast.moments`, on the rank that passed the argument. ValueError on all ranks if
            they have different numbers of channels. TypeError on this rank alone if comm is not an intracommunicator.
        RuntimeError: another rank failed; the message says which and why.

    Example:
        One process. Under `mpirun -n 2 python example.py` count is 6, mean [0.5], variance [0.25].

        >>> from bnfast.distributed import mpi
        >>> from mpi4py import MPI
        >>> import numpy as np
        >>> mpi.moments(np.full((3, 1), float(MPI.COMM_WORLD.rank)))
        Moments(count=3.0, mean=array([0.]), variance=array([0.]))
    """
    parts, _ = _from_all(_communicator(comm), lambda: (batch_norm.moments(x, axis=axis, mask=mask), None))
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

        y = activation(gamma * (x - mean)*invstd + beta + residual)
        moving = moving*momentum + batch*(1 - momentum)

    x is read twice: for its moments, then to be normalized. Each rank has its own copies of gamma, beta and the moving
    statistics, which should be equal.

    Args:
        x, gamma, beta, moving_mean, moving_variance, axis, mask, residual, out: as in `bnfast.batch_norm_train`.
        momentum, epsilon, activation, negative_slope, correction, nan_policy: as in `bnfast.batch_norm_train`.
        comm: an mpi4py intracommunicator whose ranks all make this call. None means MPI.COMM_WORLD.

    Returns:
        TrainResult(y, mean, variance, invstd): y is of this rank's x, the statistics are of all ranks together.

    Raises:
        ValueError, TypeError, RuntimeError: as in `moments`.
        FloatingPointError: nan_policy="raise" and the statistics of a channel are not finite, on all ranks.

    A call that raises changes nothing.

    Example:
        >>> from bnfast.distributed import mpi
        >>> import numpy as np
        >>> mpi.batch_norm_train(np.array([[1.0], [5.0]]), epsilon=0.0).y  # of all ranks' x, normalized together
        array([[-1.],
               [ 1.]])
    """

    def local() -> tuple[Moments, None]:
        arguments.train(
            x,
            gamma,
            beta,
            moving_mean,
            moving_variance,
            axis,
            momentum,
            epsilon,
            mask,
            activation,
            negative_slope,
            residual,
            correction,
            nan_policy,
            out,
        )
        return batch_norm.moments(x, axis=axis, mask=mask), None

    parts, _ = _from_all(_communicator(comm), local)
    count, mean, variance = _merged(parts)
    finite = np.isfinite(mean) & np.isfinite(variance)
    if nan_policy == "raise" and not finite.all():
        channels = np.flatnonzero(~finite)
        more = f", ... ({len(channels)} in all)" if len(channels) > 8 else ""
        raise FloatingPointError(
            f"x has non-finite batch statistics in channels {', '.join(map(str, channels[:8]))}{more}"
        )
    y = batch_norm.batch_norm_infer(
        x,
        mean,
        variance,
        gamma,
        beta,
        axis=axis,
        epsilon=epsilon,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        out=out,
    )
    if moving_mean is not None and moving_variance is not None and count > 0:
        bessel = count / (count - 1) if correction and count > 1 else 1.0  # to the sample variance
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

        dgamma, dbeta = the sums over all ranks, the same on every rank; do not sum them over the ranks again
        dx = gamma*invstd*(dz - (w/W)*(dbeta + xhat*dgamma)), where W is the weight of all ranks

    The kernels run twice, for the sums and for dx, which takes about twice the time of `bnfast.batch_norm_grad`.

    Args:
        mean, invstd: as returned by `batch_norm_train` of this module.
        dy, x, gamma, beta, axis, mask, residual, y, out: as in `bnfast.batch_norm_grad`.
        activation, negative_slope, training: as there. It has no dmean, dvariance and out_dresidual.
        comm: the intracommunicator of the forward call. None means MPI.COMM_WORLD.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual): dx and dresidual are of this rank's x.

    Raises:
        ValueError, TypeError, RuntimeError: as in `moments`.

    Example:
        >>> from bnfast.distributed import mpi
        >>> import numpy as np
        >>> x = np.array([[1.0], [5.0]])
        >>> _, mean, _, invstd = mpi.batch_norm_train(x, epsilon=0.0)
        >>> mpi.batch_norm_grad(np.array([[1.0], [3.0]]), x, mean, invstd).dgamma
        array([2.])
    """
    options = {"axis": axis, "activation": activation, "negative_slope": negative_slope, "residual": residual, "y": y}

    def local() -> tuple[_Sums, _LocalGradient]:
        _, valid_x, _, scale, given_gamma, given_beta, channels, weights, *_ = arguments.grad(
            dy,
            x,
            mean,
            invstd,
            gamma,
            beta,
            axis,
            mask,
            activation,
            negative_slope,
            residual,
            y,
            training,
            None,
            None,
            out,
            None,
        )
        scale = scale.reshape(as_array("invstd", invstd).shape)  # (C,), or the extents of several axes
        gamma64 = np.ones(scale.shape) if given_gamma is None else given_gamma.astype(np.float64).reshape(scale.shape)
        frozen = batch_norm.batch_norm_grad(dy, x, mean, invstd, gamma64, beta, training=False, **options)
        extents = valid_x.shape[:channels] + valid_x.shape[channels + 1 :]
        weight = float(math.prod(extents) if weights is None else weights.sum(dtype=np.float64))
        compute = np.float64 if valid_x.dtype == np.float64 else np.float32
        dtype = next((a.dtype for a in (given_gamma, given_beta) if a is not None), np.dtype(compute))
        return _Sums(weight, frozen.dgamma, frozen.dbeta), _LocalGradient(frozen, gamma64 * scale, scale, dtype)

    comm = _communicator(comm)
    parts, gradient = _from_all(comm, local)
    _same_channels([part.dgamma for part in parts])
    mine, total = parts[comm.rank], _Sums(*(functools.reduce(np.add, sums) for sums in zip(*parts, strict=True)))
    result = gradient.frozen
    if training:
        # The kernel uses this rank's sums and weight; dmean and dvariance correct its dx to those of all ranks.
        share = mine.weight / total.weight if total.weight > 0 else 0.0
        with np.errstate(invalid="ignore"):
            dmean = gradient.factor * (mine.dbeta - share * total.dbeta)
            dvariance = 0.5 * gradient.factor * gradient.invstd * (mine.dgamma - share * total.dgamma)
        options |= {"mask": mask, "dmean": dmean, "dvariance": dvariance}
    if training or out is not None:
        target = result.dx if out is None else out
        result = batch_norm.batch_norm_grad(dy, x, mean, invstd, gamma, beta, training=training, out=target, **options)
    with np.errstate(over="ignore"):
        dgamma, dbeta = (a.astype(gradient.dtype) for a in (total.dgamma, total.dbeta))
    return GradResult(result.dx, dgamma, dbeta, result.dresidual)


class _Sums(NamedTuple):
    weight: float
    dgamma: Vector
    dbeta: Vector


class _LocalGradient(NamedTuple):
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


def _from_all(comm: Any, local: Callable[[], tuple[Sent, Local]]) -> tuple[list[Sent], Local]:
    """`local` returns (sent, kept). Returns the values sent by all ranks, in rank order, and this rank's kept value. If
    `local` raises on one rank, all ranks raise."""
    try:
        sent, kept = local()
    except Exception as error:
        comm.allgather((None, f"{type(error).__name__}: {error}"))  # the other ranks wait for this message
        raise
    replies = comm.allgather((sent, None))
    for rank, (_, text) in enumerate(replies):
        if text is not None:
            raise RuntimeError(f"rank {rank} of {comm.size} failed: {text}")
    return [part for part, _ in replies], kept


def _merged(parts: list[Moments]) -> Moments:
    _same_channels([part.mean for part in parts])
    return functools.reduce(Moments.merge, parts)


def _same_channels(vectors: list[Vector]) -> None:
    channels = [len(vector) if vector.ndim == 1 else vector.shape for vector in vectors]
    if len(set(channels)) > 1:
        raise ValueError(f"x must have the same number of channels on every rank. Received, by rank: {channels}")
