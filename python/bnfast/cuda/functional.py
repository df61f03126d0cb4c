"""batch_norm_train, batch_norm_infer, batch_norm_grad and moments over device arrays.

The signatures, formulas and checks are those of `bnfast.functional`. Everything stays on the device, on the current
stream of x's library, and a call returns before the device has done its work. Outputs and scratch memory come from that
library, so a CUDA graph can capture a call once its kernels are loaded. A call waits for the device in three cases:
nan_policy="raise"; an array of another library, or of another stream, than x; an array that only DLPack shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .. import _cuda
from .._arguments import checks
from ..functional import GradResult, Moments, TrainResult
from .call import Call, refuse_capture
from .options import refuse_mask, scalars

__all__ = ["batch_norm_grad", "batch_norm_infer", "batch_norm_train", "moments"]


def batch_norm_train(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    moving_mean: Any = None,
    moving_variance: Any = None,
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
    out: Any = None,
) -> TrainResult:
    """Normalize x with the statistics of this batch, and update the moving statistics in place, on x's device.

        y = activation(gamma * (x - mean)*invstd + beta + residual)
        moving = moving*momentum + batch*(1 - momentum)

    Args:
        x: float32, float64, float16 or bfloat16 on a CUDA device, dense in any order of its axes (torch's channels_last
            format, too). Read in place, never written.
        gamma, beta: float32 or float64 of shape (C,), on that device. None means ones and zeros.
        moving_mean, moving_variance: both or neither; writable, float32 or float64 of shape (C,).
        axis: the channel axis, or several that lie side by side in memory; (C,) then means their extents.
        mask: must be None: there are no masks on a device yet.
        activation: None, "relu", "relu6" or "leaky_relu".
        residual: like x, in its order in memory; added before the activation.
        nan_policy: "raise" computes the statistics first and waits for them: one more read of x.
        momentum, epsilon, negative_slope, correction, out: as in `bnfast.batch_norm_train`.

    Returns:
        TrainResult(y, mean, variance, invstd), device arrays of x's library, the last three float64 of shape (C,).
        JAX and others that bnfast doesn't know get `DeviceArray`s.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing is changed.
        NotImplementedError: a mask or another activation.
        FloatingPointError: nan_policy="raise" and the statistics of a channel are not finite; nothing is changed.
        RuntimeError: the driver or the compiler is missing or fails. MemoryError, or the error of x's library: no
            memory is left.

    Example:
        >>> import bnfast.cuda, torch
        >>> x = torch.tensor([[1.0], [5.0]], device="cuda")
        >>> y, mean, variance, invstd = bnfast.cuda.batch_norm_train(x, epsilon=0.0)
        >>> y.tolist(), mean.tolist(), variance.tolist()
        ([[-1.0], [1.0]], [3.0], [4.0])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    refuse_mask(mask)
    options = scalars(activation, negative_slope)
    decay, eps = checks.real("momentum", momentum, 1.0), checks.real("epsilon", epsilon)
    ddof = checks.check_correction(correction)
    policy = checks.choice("nan_policy", nan_policy, checks.NAN_POLICIES)
    call = Call("x", x, axis)
    parameters = call.vector("gamma", gamma), call.vector("beta", beta)
    added = call.tensor("residual", residual)
    moving = call.moving(moving_mean, moving_variance)
    call.check_out("out", out, ("x",))
    if policy == "raise":
        _require_finite(call)
    y, at_y = call.new(out)
    vectors = [call.new_vector() for _ in range(3)]
    # fmt: off
    _cuda.train(
        *call.place, call.x.address, at_y, added, call.geometry.extents, call.dtype, *parameters, *moving, decay, eps,
        *options, ddof, policy == "skip_update", *(address for _, address in vectors),
    )
    # fmt: on
    call.finish()
    return TrainResult(y, *(array for array, _ in vectors))


def batch_norm_infer(
    x: Any,
    moving_mean: Any,
    moving_variance: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-3,
    activation: str | None = None,
    negative_slope: float = 0.2,
    residual: Any = None,
    out: Any = None,
) -> Any:
    """Normalize x with given statistics, on x's device.

        y = activation(gamma * (x - moving_mean)/sqrt(moving_variance + epsilon) + beta + residual)

    Args:
        moving_mean, moving_variance: float32 or float64 of shape (C,), on x's device.
        x, gamma, beta, axis, epsilon, activation, negative_slope, residual, out: as in `batch_norm_train`.

    Returns:
        y in the shape and dtype of x, an array of its library.

    Raises as `batch_norm_train`.

    Example:
        >>> import bnfast.cuda, torch
        >>> x, mean, variance = torch.tensor([[[1.0], [5.0]], [[3.0], [3.0]], [[4.0], [4.0]]], device="cuda")
        >>> bnfast.cuda.batch_norm_infer(x, mean[0], variance[0], epsilon=0.0).tolist()
        [[-1.0], [1.0]]

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    options = scalars(activation, negative_slope)
    eps = checks.real("epsilon", epsilon)
    call = Call("x", x, axis)
    statistics = _present(call, moving_mean=moving_mean, moving_variance=moving_variance)
    parameters = call.vector("gamma", gamma), call.vector("beta", beta)
    added = call.tensor("residual", residual)
    call.check_out("out", out, ("x",))
    y, at_y = call.new(out)
    # fmt: off
    _cuda.infer(
        *call.place, call.x.address, at_y, added, call.geometry.extents, call.dtype, *statistics, *parameters, eps,
        *options,
    )
    # fmt: on
    call.finish()
    return y


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
    dmean: Any = None,
    dvariance: Any = None,
    out: Any = None,
    out_dresidual: Any = None,
) -> GradResult:
    """Gradients of a loss with respect to x, gamma, beta and residual, from dy, on x's device.

    Formulas and arguments are those of `bnfast.batch_norm_grad`; arrays, errors and what isn't there are those of
    `batch_norm_train`. dy lies in memory as x does.

    Returns:
        GradResult(dx, dgamma, dbeta, dresidual), device arrays of x's library. Without an activation dresidual is dy
        itself, which `out` must then not overwrite.

    Raises as `batch_norm_train`.

    Example:
        >>> import bnfast.cuda, torch
        >>> x = torch.tensor([[1.0], [5.0]], device="cuda")
        >>> dy = torch.tensor([[1.0], [3.0]], device="cuda")
        >>> _, mean, _, invstd = bnfast.cuda.batch_norm_train(x, epsilon=0.0)
        >>> dx, dgamma, dbeta, _ = bnfast.cuda.batch_norm_grad(dy, x, mean, invstd)
        >>> dx.tolist(), dgamma.tolist(), dbeta.tolist()
        ([[0.0], [0.0]], [2.0], [4.0])

    Source: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    refuse_mask(mask)
    options = scalars(activation, negative_slope)
    trains = checks.boolean("training", training)
    if residual is not None and y is not None:
        raise ValueError("residual and y must not be given both: y stands for the residual")
    call = Call("x", x, axis)
    at_dy = call.tensor("dy", _given("dy", dy))
    statistics = _present(call, mean=mean, invstd=invstd)
    parameters = call.vector("gamma", gamma), call.vector("beta", beta)
    gates = call.tensor("residual", residual), call.tensor("y", y)
    upstream = call.vector("dmean", dmean), call.vector("dvariance", dvariance)
    gated = options.activation != 0 and (residual is not None or y is not None)
    if out_dresidual is not None and not gated:
        raise ValueError("out_dresidual must be None without an activation and a residual or y. Received: an array")
    dx_view = call.check_out("out", out, ("dy", "x"))
    call.check_out("out_dresidual", out_dresidual, ("x",))
    passed_on = dy if (residual is not None or y is not None) and not gated else None
    if passed_on is not None and dx_view is not None and dx_view.address == at_dy and call.x.size:
        raise ValueError("out must not be dy without an activation: dresidual is dy itself")
    dx, at_dx = call.new(out)
    dresidual, at_dresidual = call.new(out_dresidual) if gated else (passed_on, 0)
    known = next((vector for vector in parameters if vector is not None), (0, call.x.dtype == "float64"))
    dtype = "float64" if known[1] else "float32"
    dgamma, dbeta = call.new_vector(dtype), call.new_vector(dtype)
    # fmt: off
    _cuda.grad(
        *call.place, at_dy, call.x.address, at_dx, *gates, at_dresidual, call.geometry.extents, call.dtype, *statistics,
        *parameters, *options, trains, *upstream, (dgamma[1], known[1]), (dbeta[1], known[1]),
    )
    # fmt: on
    call.finish()
    return GradResult(dx, dgamma[0], dbeta[0], dresidual)


def moments(x: Any, *, axis: int | Sequence[int] = -1, mask: Any = None) -> Moments:
    """Count, mean and population variance of each channel of x, on its device.

    Args:
        x, axis, mask: as in `batch_norm_train`.

    Returns:
        Moments(count, mean, variance): count is M as a float; mean and variance are device arrays of x's library,
        float64 of shape (C,). `Moments.merge` is for arrays on the CPU.

    Raises as `batch_norm_train`.

    Example:
        >>> import bnfast.cuda, torch
        >>> bnfast.cuda.moments(torch.tensor([[1.0], [5.0]], device="cuda")).mean.tolist()
        [3.0]

    Source: the mean and variance of Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167.
    """
    refuse_mask(mask)
    call = Call("x", x, axis)
    mean, variance = _statistics(call)
    call.finish()
    channels = math.prod(call.geometry.vector_shape)
    return Moments(call.x.size / channels if channels else 0.0, mean[0], variance[0])


def _given(name: str, value: Any) -> Any:
    if value is None:
        raise TypeError(f"{name} must be an array. Received: None")
    return value


def _present(call: Call, **vectors: Any) -> list[Any]:
    return [call.vector(name, _given(name, value)) for name, value in vectors.items()]


def _statistics(call: Call) -> tuple[tuple[Any, int], tuple[Any, int]]:
    """The mean and variance of x, each with its address."""
    mean, variance = call.new_vector(), call.new_vector()
    _cuda.moments(*call.place, call.x.address, call.geometry.extents, call.dtype, mean[1], variance[1])
    return mean, variance


def _require_finite(call: Call) -> None:
    """Raises the FloatingPointError of the CPU's functions."""
    refuse_capture(call, "nan_policy='raise'")
    found = _statistics(call)
    channels = math.prod(call.geometry.vector_shape)
    values = [_cuda.read(call.x.device, address, 8 * channels, call.stream) for _, address in found]
    pairs = zip(*(memoryview(each).cast("d") for each in values), strict=True)
    bad = [i for i, pair in enumerate(pairs) if not all(map(math.isfinite, pair))]
    if bad:
        more = f", ... ({len(bad)} in all)" if len(bad) > 8 else ""
        raise FloatingPointError(f"x has non-finite batch statistics in channels {', '.join(map(str, bad[:8]))}{more}")
