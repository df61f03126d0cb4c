"""The running statistics of a module's batch norms computed anew over data: `recalibrate`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ...diagnosis.estimate import Estimate
from ...functional.batch_norm import moments

__all__ = ["Recalibrated", "Recalibration", "recalibrate"]


@dataclass(frozen=True)
class Recalibrated:
    """One batch norm: its name, the values per channel and the calls that it saw, and what moved, as root mean squares
    over the channels: the mean in new standard deviations, and log2((old var + eps)/(new var + eps))."""

    name: str
    count: int
    batches: int
    mean_shift: float
    variance_ratio: float


@dataclass(frozen=True)
class Recalibration:
    """What `recalibrate` changed, in the order of `named_modules`; `left`: {name of an unchanged batch norm: why}."""

    rows: tuple[Recalibrated, ...]
    left: dict[str, str]


def recalibrate(
    module: torch.nn.Module, batches: Iterable[Any], *, device: torch.device | str | None = None
) -> Recalibration:
    """Compute the running statistics of all batch norms in `module` anew, over data, in one pass. In place.

        running_mean = sum(x)/n,  running_var = sum((x - running_mean)^2)/(n - 1)    over all n values of the channel

    x are the inputs of the batch norm in all batches (its moments merged in float64), also where a class derived from
    torch.nn's has its own forward. torch.optim.swa_utils.update_bn averages the variances of the batches instead: those
    are smaller by the variance between batches, and a short last batch weighs as much as the others.

    In the pass each batch norm with running statistics normalizes with those of the batch, in whatever mode it is; all
    other modules run in theirs, so call `module.eval()` first to have no dropout. No gradients are recorded. Afterwards
    only running_mean, running_var and num_batches_tracked differ; the last is the number of calls, as with update_bn.
    Modes, hooks and momentum stay, and if an error occurs so does everything else but random number generators.

    Args:
        module: any torch.nn.Module, of torch.nn's batch norms or of bnfast's, on any device.
        batches: an iterable, such as a DataLoader, of tensors, or of tuples or lists whose first element is the input.
        device: where the inputs are moved to. None: they stay where they are.

    Returns:
        A Recalibration: which batch norms changed, and how far; and which didn't, because the module doesn't call them.

    Raises:
        TypeError: an argument or a batch is of another type.
        ValueError: there is no batch norm with running statistics, none is called, the data is empty, a lazy module has
            no shape yet, or a SyncBatchNorm is in a group of several processes, whose data would not be merged.
        FloatingPointError: what a batch norm sees is not finite, or its statistics don't fit the dtype.

    Example:
        >>> import bnfast.torch, torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.ReLU())
        >>> found = bnfast.torch.recalibrate(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0], [9.0]])])
        >>> model[0].running_mean, model[0].running_var, found.rows[0].count
        (tensor([5.]), tensor([10.]), 5)

    Source: Wu and Johnson 2021, "Rethinking 'batch' in batchnorm" (precise batch norm), arXiv:2105.07576.
    """
    norms = _norms(module)
    if not isinstance(batches, Iterable) or isinstance(batches, (torch.Tensor, str, bytes, dict)):
        raise TypeError(f"batches must be an iterable of batches; one is [x]. Received: {type(batches).__name__}")
    estimates = {name: Estimate("population", correction=1) for name in norms}
    calls = _run(module, norms, estimates, batches, device)
    called = {name: estimate for name, estimate in estimates.items() if estimate.batches}
    if not called:
        raise ValueError(f"module calls none of its batch norms with values: {', '.join(map(repr, norms))}")
    new = {name: _as_buffers(name, norms[name], estimate) for name, estimate in called.items()}
    rows = []
    for name, (mean, var) in new.items():
        norm, estimate = norms[name], called[name]
        rows.append(Recalibrated(name, int(estimate.count), calls[name], *_moved(norm, mean, var)))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(calls[name])
    return Recalibration(tuple(rows), {name: "it was not called with values" for name in norms if name not in called})


def _norms(module: torch.nn.Module) -> dict[str, Any]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module. Received: {type(module).__name__}")
    for name, one in module.named_modules():
        if isinstance(one, LazyModuleMixin) and one.has_uninitialized_params():
            raise ValueError(f"module must have been called once: {name!r} is lazy and has no shape yet")
        if isinstance(one, torch.nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            size = dist.get_world_size(one.process_group or dist.group.WORLD)
            if size > 1:
                raise ValueError(f"SyncBatchNorm {name!r} must be in one process. Received: a group of {size}")
    norms = {name: one for name, one in module.named_modules() if isinstance(one, _BatchNorm)}
    norms = {name: one for name, one in norms.items() if one.track_running_stats and one.running_mean is not None}
    if not norms:
        raise ValueError(f"module must have a batch norm with running statistics. Received: {type(module).__name__}")
    return norms


def _run(
    module: torch.nn.Module, norms: dict[str, Any], estimates: dict[str, Estimate], batches: Any, device: Any
) -> Counter[str]:
    """The pass: how often each batch norm was called. All modes and buffers are afterwards what they were."""
    calls: Counter[str] = Counter()
    modes = [(norm, norm.training, norm.track_running_stats) for norm in norms.values()]
    owners = [(one, dict(one._buffers)) for one in module.modules()]
    values = {b: b.detach().clone() for _, buffers in owners for b in buffers.values() if b is not None}
    hooks, run = [], getattr(module, "_orig_mod", module)  # that of torch.compile: fullgraph=True allows no observer
    try:
        for name, norm in norms.items():
            hooks.append(norm.register_forward_hook(_observer(name, estimates[name], calls), with_kwargs=True))
            norm.training, norm.track_running_stats = True, False
        number = -1
        for number, batch in enumerate(batches):
            x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"batch {number} must be a tensor, or start with one. Received: {type(x).__name__}")
            with torch.no_grad():
                run(x if device is None else x.to(device))
        if number < 0:
            raise ValueError("batches must have at least one batch. Received: none")
    finally:
        for hook in hooks:
            hook.remove()
        for norm, training, tracks in modes:
            norm.training, norm.track_running_stats = training, tracks
        for owner, buffers in owners:
            owner._buffers.update(buffers)
        for buffer, value in values.items():
            if not torch.equal(buffer, value):
                buffer.detach().copy_(value)
    return calls


def _observer(name: str, estimate: Estimate, calls: Counter[str]) -> Any:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def observe(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        calls[name] += 1
        found = moments((args[0] if args else kwargs["input"]).detach().cpu().resolve_neg(), axis=1)
        if not (np.isfinite(found.mean).all() and np.isfinite(found.variance).all()):
            raise FloatingPointError(f"batch norm {name!r} sees NaN or Inf in call {calls[name]}")
        estimate.add(found)

    return observe


def _as_buffers(name: str, norm: Any, estimate: Estimate) -> list[torch.Tensor]:
    pairs = zip(estimate.result(), (norm.running_mean, norm.running_var), strict=True)
    made = [torch.from_numpy(np.array(vector)).to(buffer) for vector, buffer in pairs]
    if not all(vector.isfinite().all() for vector in made):
        raise FloatingPointError(f"the new statistics of batch norm {name!r} don't fit in {norm.running_var.dtype}")
    return made


def _moved(norm: Any, mean: torch.Tensor, var: torch.Tensor) -> tuple[float, float]:
    old_mean, old_var, mean, var = (v.detach().cpu().double() for v in (norm.running_mean, norm.running_var, mean, var))
    shift = (old_mean - mean) / (var + norm.eps).sqrt()
    ratio = ((old_var + norm.eps) / (var + norm.eps)).log2()
    return float(shift.square().mean().sqrt()), float(ratio.square().mean().sqrt())
