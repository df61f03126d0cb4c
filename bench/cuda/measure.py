"""Times of bnfast.cuda on a device, beside a device copy and torch with cuDNN and without, as JSON.

    python bench/cuda/measure.py --json FILE [--rounds 100] [--quick]

Device events around one call each; 20 warm-ups, then the median and quartiles of `rounds`; candidates take turns, and
inputs rotate over more than 4x the L2 cache. A second list has the host's time per call. Needs torch with CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bnfast import cuda

# ResNet-50's batch norms as (C, height); then small ones.
LAYERS = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
SMALL = [(32, 64, 1), (256, 1024, 1), (8, 64, 7)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Work(NamedTuple):
    """One tensor (N, C, H, W) and its layout in memory."""

    N: int
    C: int
    height: int
    dtype: str
    layout: str  # channels_last, channels_first

    @property
    def bytes(self) -> int:
        return self.N * self.C * self.height**2 * (4 if self.dtype == "float32" else 2)

    def tensor(self) -> Any:
        x = torch.randn(self.N, self.C, self.height, self.height, device="cuda", dtype=DTYPES[self.dtype])
        return x.to(memory_format=torch.channels_last) if self.layout == "channels_last" else x


def works(quick: bool) -> Iterator[Work]:
    batches = (64,) if quick else (64, 256)
    for dtype in ("bfloat16",) if quick else DTYPES:
        for layout in ("channels_last", "channels_first"):
            for C, height in LAYERS:
                yield from (Work(N, C, height, dtype, layout) for N in batches)
            yield from (Work(N, C, height, dtype, layout) for N, C, height in SMALL)


Call = Callable[[dict[str, Any]], Any]


def ours(kind: str) -> Call:
    activation = "relu" if "relu" in kind else None

    def train(a: dict[str, Any]) -> Any:
        residual = a["residual"] if activation else None
        return cuda.batch_norm_train(
            a["x"], a["gamma"], a["beta"], a["mean"], a["variance"], axis=1, activation=activation, residual=residual
        )

    def grad(a: dict[str, Any]) -> Any:
        y = a["y"] if activation else None
        return cuda.batch_norm_grad(
            a["dy"],
            a["x"],
            a["saved_mean"],
            a["saved_invstd"],
            a["gamma"],
            a["beta"],
            axis=1,
            activation=activation,
            y=y,
        )

    def infer(a: dict[str, Any]) -> Any:
        return cuda.batch_norm_infer(a["x"], a["mean"], a["variance"], a["gamma"], a["beta"], axis=1)

    return {"train": train, "grad": grad, "infer": infer}[kind.split("+")[0]]


def torchs(kind: str, cudnn: bool) -> Call:
    """torch's batch norm; +relu: with an Add and a ReLU after it, as a residual block has them."""

    def run(a: dict[str, Any]) -> Any:
        with torch.backends.cudnn.flags(enabled=cudnn):
            if kind.startswith("grad"):
                return torch.autograd.grad(a["graph"][cudnn], a["leaf"], a["dy"], retain_graph=True)
            y = F.batch_norm(a["x"], a["mean"], a["variance"], a["gamma"], a["beta"], kind != "infer", 0.01, 1e-3)
            return F.relu(y + a["residual"]) if "relu" in kind else y

    return run


def arguments(work: Work) -> dict[str, Any]:
    x = work.tensor()
    vectors = {name: torch.rand(work.C, device="cuda") + 0.5 for name in ("gamma", "beta", "mean", "variance")}
    a: dict[str, Any] = {"x": x, "dy": work.tensor(), "residual": work.tensor(), **vectors}
    a["copy"] = torch.empty_like(x)
    saved = cuda.batch_norm_train(x, a["gamma"], a["beta"], axis=1, activation="relu", residual=a["residual"])
    a |= {"saved_mean": saved.mean, "saved_invstd": saved.invstd, "y": saved.y}
    return a


def with_graph(a: dict[str, Any], kind: str) -> None:
    """The recorded forward that torch's gradient runs back through."""
    a["leaf"] = a["x"].detach().requires_grad_()
    a["graph"] = {}
    for cudnn in (True, False):
        with torch.backends.cudnn.flags(enabled=cudnn):
            y = F.batch_norm(a["leaf"], None, None, a["gamma"], a["beta"], True, 0.01, 1e-3)
            a["graph"][cudnn] = F.relu(y + a["residual"]) if "relu" in kind else y


def kernels(work: Work, kind: str) -> list[str]:
    """What our call launches, which says the form."""
    last = work.layout == "channels_last"
    shape = (work.N, *[work.height] * 2, work.C) if last else (work.N, work.C, *[work.height] * 2)
    activation = "relu" if "relu" in kind else None
    return cuda.compile(shape, work.dtype, axis=-1 if last else 1, activation=activation, calls=[kind.split("+")[0]])


def measure(work: Work, kind: str, rounds: int) -> dict[str, Any]:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [arguments(work) for _ in range(max(2, min(32, 1 + 4 * l2 // max(1, work.bytes))))]
    if kind.startswith("grad"):
        for a in sets:
            with_graph(a, kind)
    candidates: dict[str, Call] = {
        "bnfast": ours(kind),
        "sweeps": ours(kind),  # what the plan's choice of a form gains
        "copy": lambda a: a["copy"].copy_(a["x"]),
        "cudnn": torchs(kind, True),
        "aten": torchs(kind, False),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(20 + rounds):
        for name, function in candidates.items():
            a = sets[turn % len(sets)]
            os.environ["BNFAST_CUDA_FORM"] = "sweeps" if name == "sweeps" else "automatic"
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function(a)
            end.record()
            end.synchronize()
            if turn >= 20:
                times[name].append(1e3 * begin.elapsed_time(end))
    del os.environ["BNFAST_CUDA_FORM"]
    row: dict[str, Any] = {**work._asdict(), "bytes": work.bytes, "kind": kind, "kernels": kernels(work, kind)}
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        row[name] = {"us": middle, "quartiles": [low, high]}
    return row


def host_time(calls: int = 1000) -> dict[str, float]:
    """us per call until it returns, on a tensor so small that the device keeps up."""
    a = arguments(Work(32, 64, 1, "float32", "channels_last"))
    found = {}
    for kind in ("train", "grad", "infer"):
        function = ours(kind)
        for _ in range(20):
            function(a)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function(a)
        found[kind] = 1e6 * (time.perf_counter() - begin) / calls
        torch.cuda.synchronize()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    card = torch.cuda.get_device_properties(0)
    facts = {"card": card.name, "sms": card.multi_processor_count, "l2_bytes": card.L2_cache_size}
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda, "status": cuda.status()}
    rows = []
    for work in works(given.quick):
        for kind in ("train", "grad", "infer", "train+relu", "grad+relu"):
            rows.append(measure(work, kind, given.rounds))
            print(json.dumps(rows[-1]), flush=True)
    given.json.write_text(json.dumps({**facts, "host_us": host_time(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
