"""Options of a call that a CUDA device doesn't have yet are refused here, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._arguments import checks


class Scalars(NamedTuple):
    """The checked options of the apply step."""

    activation: int
    negative_slope: float


def scalars(activation: Any, negative_slope: Any) -> Scalars:
    """Raises NotImplementedError for an activation that the CUDA kernels don't have yet."""
    name = checks.activation(activation)
    slope = checks.real("negative_slope", negative_slope)
    if name not in checks.PIECEWISE_LINEAR:
        raise NotImplementedError(
            f"activation must be one of {checks.PIECEWISE_LINEAR} on a CUDA device yet. Received: {name!r}"
        )
    return Scalars(checks.PIECEWISE_LINEAR.index(name), slope)


def refuse_mask(mask: Any) -> None:
    if mask is not None:
        raise NotImplementedError(
            "mask is not supported on a CUDA device yet; bnfast.batch_norm_train takes it on the CPU"
        )
