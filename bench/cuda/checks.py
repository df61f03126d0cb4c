"""Checks on a device that tests/cuda doesn't make: small calls for compute-sanitizer, CUDA graphs, two streams.

    python bench/cuda/checks.py small | graphs | streams ...

Exits with 1 and the name of the check if one fails. Needs torch with CUDA.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from bnfast import cuda

SHAPES = [((70, 33), -1), ((5, 100), -1), ((3, 7, 5, 5), 1), ((2, 3, 4099), 1), ((1, 3), -1)]
LONG = ((1, 2, 70001), 1)  # float32: a channel of two blocks
FORMS = ["automatic", "sweeps", "channel", "resident"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def call(x: Any, axis: int, activation: str | None = "relu") -> list[Any]:
    """The results of train, grad and infer."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    C = x.shape[axis]
    gamma, beta = (torch.empty(C, dtype=wide, device=x.device).copy_(torch.linspace(0.5, 2, C)) for _ in range(2))
    train = cuda.batch_norm_train(x, gamma, beta, axis=axis, activation=activation, residual=x)
    grad = cuda.batch_norm_grad(
        x, x, train.mean, train.invstd, gamma, beta, axis=axis, activation=activation, y=train.y
    )
    infer = cuda.batch_norm_infer(x, train.mean, train.variance, gamma, beta, axis=axis, activation=activation)
    return [*train, *grad, infer]


def in_every_form(check: Callable[[], bool]) -> bool:
    """Whether the check passes with each BNFAST_CUDA_FORM. A form that can't take a shape leaves it to sweeps."""
    passed = True
    for form in FORMS:
        os.environ["BNFAST_CUDA_FORM"] = form
        if not check():
            print(f"failed in form {form}")
            passed = False
    del os.environ["BNFAST_CUDA_FORM"]
    return passed


def make(shape: tuple[int, ...], dtype: Any = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to("cuda")


def same(a: list[Any], b: list[Any]) -> bool:
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def small() -> bool:
    """Every dtype once, misaligned, too. compute-sanitizer judges."""
    for shape, axis in SHAPES:
        for dtype in DTYPES:
            call(make(shape, dtype), axis)
            count = 1
            for extent in shape:
                count *= extent
            call(make((count + 1,), dtype)[1:].reshape(shape), axis)
    call(make(LONG[0]), LONG[1])
    torch.cuda.synchronize()
    return True


def graphs() -> bool:
    """Captured after one call, replayed on new values: the bits of a plain call."""
    for shape, axis in [*SHAPES[:4], LONG]:
        x = make(shape)
        call(x, axis)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(x, axis)
        for seed in (1, 2):
            x.copy_(make(shape, seed=seed))
            graph.replay()
            if not same(captured, call(x.clone(), axis)):
                return False
    return True


def streams() -> bool:
    """Calls on two streams at once give the bits of calls one after the other."""
    inputs = [make((2003, 257), seed=seed) for seed in range(8)]
    wanted = [call(x, -1) for x in inputs]  # 2 MB each: in form resident every call asks for the whole device
    torch.cuda.synchronize()
    pair = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(pair[i % 2]):
            found.append(call(x, -1))
    torch.cuda.synchronize()
    return all(same(a, b) for a, b in zip(found, wanted, strict=True))


CHECKS: dict[str, Callable[[], bool]] = {"small": small, "graphs": graphs, "streams": streams}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="+", choices=sorted(CHECKS))
    failed = [name for name in parser.parse_args().checks if not in_every_form(CHECKS[name])]
    print(f"failed: {', '.join(failed)}" if failed else "passed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
