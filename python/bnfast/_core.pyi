"""The C++ core. Positional-only. It accepts C-contiguous, aligned ndarrays in the machine's byte order, of the right
dtype and shape, with valid scalars and no forbidden overlap. For anything else it returns None and changes nothing:
bnfast.functional then asks bnfast._arguments for the error or for converted arguments."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, final, type_check_only

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Stats = npt.NDArray[np.float64]

@type_check_only
class MemoryStatistics(TypedDict):
    held_bytes: int
    limit_bytes: int
    in_use_bytes: int
    reused: int
    fresh: int

@type_check_only
class BuildInfo(TypedDict):
    version: str
    isa: str
    isa_reason: str
    isas: tuple[str, ...]
    threads: int
    default_threads: int
    threads_reason: str
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    compiler: str
    flags: str
    threading: str
    memory: MemoryStatistics

def train(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    axis: Any,
    momentum: Any,
    epsilon: Any,
    mask: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    correction: Any,
    nan_policy: Any,
    out: Any,
    /,
) -> tuple[_Array, _Stats, _Stats, _Stats] | None: ...
def infer(
    x: Any,
    moving_mean: Any,
    moving_variance: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    epsilon: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
    /,
) -> _Array | None: ...
def grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    mask: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    y: Any,
    training: Any,
    dmean: Any,
    dvariance: Any,
    out: Any,
    out_dresidual: Any,
    /,
) -> tuple[_Array, _Array, _Array, _Array | None] | None: ...

@final
class Callback:
    def __new__(
        cls, kernel: str, names: list[str], constants: dict[str, Any], fallback: Callable[..., Any], /
    ) -> Callback: ...
    def __call__(self, *arrays: _Array) -> Sequence[_Array]: ...

def moments(x: Any, axis: Any, mask: Any, /) -> tuple[float, _Stats, _Stats] | None: ...
def group_norm(
    x: Any,
    groups: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    epsilon: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
    /,
) -> tuple[_Array, _Stats, _Stats] | None: ...
def group_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    groups: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
    out_dresidual: Any,
    /,
) -> tuple[_Array, _Array, _Array, _Array | None] | None: ...
def layer_norm(
    x: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    epsilon: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
    /,
) -> tuple[_Array, _Stats, _Stats] | None: ...
def layer_norm_grad(
    dy: Any,
    x: Any,
    mean: Any,
    invstd: Any,
    gamma: Any,
    beta: Any,
    axis: Any,
    activation: Any,
    negative_slope: Any,
    residual: Any,
    out: Any,
    out_dresidual: Any,
    /,
) -> tuple[_Array, _Array, _Array, _Array | None] | None: ...
def empty(shape: tuple[int, ...], dtype: npt.DTypeLike, /) -> _Array: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int | None, /) -> None: ...
def build_info() -> BuildInfo: ...
def clear_memory() -> None: ...
def set_memory_limit(limit_bytes: int, /) -> None: ...
def _connect_tf(path: str, /) -> str:
    """Hands the core to the TensorFlow op's library, loaded from `path`. Empty, or the reason why it can't be."""

def _set_full_team(wait: bool, /) -> None: ...
def _jax_handlers() -> dict[str, object]: ...
def _jax_query() -> tuple[bool, int, int, str]: ...
def _set_isa(name: str | None, /) -> None: ...
def _set_serial_bytes(n: int | None, /) -> None: ...
def _buffer_fault(object: object, /) -> str:
    """What contradicts itself in the buffer that the object exports, or an empty string."""

def _last_run() -> tuple[str, int]: ...
def _fp_mode() -> int: ...
def _set_fp_mode(mode: int, /) -> None: ...

# Tensors of PyTorch (csrc/bind/torch_tensor.h). activation is the core's number; None: the fast path declines.
def _torch_connect(tensor: type, parameter: type, /) -> None: ...
def _torch_borrow_threads(wanted: bool, /) -> bool: ...
def _torch_train(
    x: Any,
    y: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    momentum: float,
    epsilon: float,
    activation: int,
    negative_slope: float,
    residual: Any,
    /,
) -> _Stats | None: ...
def _torch_infer(
    x: Any,
    y: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    epsilon: float,
    activation: int,
    negative_slope: float,
    residual: Any,
    keep: bool,
    /,
) -> _Stats | bool | None: ...
def _torch_grad(
    dy: Any,
    x: Any,
    dx: Any,
    statistics: Any,
    gamma: Any,
    beta: Any,
    training: bool,
    activation: int,
    negative_slope: float,
    residual: Any,
    y: Any,
    dresidual: Any,
    dgamma: Any,
    dbeta: Any,
    /,
) -> bool | None: ...
def _torch_group_norm(
    x: Any,
    y: Any,
    groups: int,
    axes: int,
    gamma: Any,
    beta: Any,
    epsilon: float,
    activation: int,
    negative_slope: float,
    residual: Any,
    /,
) -> _Stats | None: ...
def _torch_group_norm_grad(
    dy: Any,
    x: Any,
    dx: Any,
    statistics: Any,
    groups: int,
    axes: int,
    gamma: Any,
    beta: Any,
    activation: int,
    negative_slope: float,
    residual: Any,
    dresidual: Any,
    dgamma: Any,
    dbeta: Any,
    /,
) -> bool | None: ...
