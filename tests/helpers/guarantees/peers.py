"""How exact bnfast and its peers are, on the same inputs in one run: writes docs/accuracy.md (`just accuracy`).

With tests/helpers on the path:

    python -m guarantees.peers           measures, writes docs/benchmarks/accuracy.json and the page
    python -m guarantees.peers --page    writes the page anew from accuracy.json

The error is against the exact result (80-bit NumPy) of the values that a peer was given, in units of its bound:

    y:   4*eps*(|a|*(|x| + |mean| + std) + |b|),  a = gamma/sqrt(variance + epsilon), b = beta - a*mean
    dx:  4*eps*|a|*(|dy| + |dbeta|/M + xmax*|dgamma|/M),  xmax = (|x| + |mean| + std)/std

Above 1 digits are lost that the input had: 10 means one decimal digit beyond the rounding of the formula. The bound of
y is promised (`accuracy.py`); that of dx is a yardstick.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
from bnfast.benchmark.cases import EPSILON, Arrays, Case, NamedShape
from bnfast.benchmark.peers import PEERS, Unsupported

from .__main__ import ROOT, machine
from .accuracy import bound_of_y

PAGE, DATA = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "benchmarks" / "accuracy.json"

SHAPE = NamedShape("accuracy", "8x64x56x56", 8, 64, (56, 56))
RATIOS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5, 1e6)  # |mean|/std of a channel
OPS = ("train", "grad")
DTYPES = ("float32", "float64")


def inputs(case: Case, ratio: float) -> Arrays:
    """Channels of standard deviation 1 and mean `ratio`."""
    random, dtype, channels = np.random.default_rng(5), case.dtype, case.shape.c
    x = (random.standard_normal(case.array_shape) + ratio).astype(dtype)
    dy = random.standard_normal(case.array_shape).astype(dtype)
    gamma, beta, mean = (random.uniform(0.5, 1.5, channels).astype(dtype) for _ in range(3))
    return Arrays(x, dy, gamma, beta, mean, gamma.copy())


def error(case: Case, arrays: Arrays, result: dict[str, Any]) -> float:
    """The largest error of y or dx in units of the bound; infinity where a result is not finite."""
    axes = tuple(axis for axis in range(4) if axis != case.axis % 4)
    shape = tuple(1 if axis in axes else case.shape.c for axis in range(4))
    wide, eps = np.longdouble, np.finfo(case.dtype).eps
    x, gamma, beta = arrays.x.astype(wide), arrays.gamma.reshape(shape), arrays.beta.reshape(shape)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    a = gamma / np.sqrt(variance + wide(EPSILON))
    if case.op == "train":
        exact, found = a * (x - mean) + beta, result["y"]
        bound = bound_of_y(x, mean, variance, a, beta)
    else:
        dy, found = arrays.dy.astype(wide), result["dx"]
        xhat = (x - mean) / np.sqrt(variance + wide(EPSILON))
        dbeta, dgamma = dy.mean(axes, keepdims=True), (dy * xhat).mean(axes, keepdims=True)
        exact = a * (dy - dbeta - xhat * dgamma)
        largest = (np.abs(x) + np.abs(mean) + np.sqrt(variance)) / np.sqrt(variance)
        bound = np.abs(a) * (np.abs(dy) + np.abs(dbeta) + largest * np.abs(dgamma))
    if not np.isfinite(found).all():
        return float("inf")
    return float((np.abs(found - exact) / (4 * eps * bound)).max())


def measure() -> dict[str, Any]:
    rows, versions = [], {}
    for kind in PEERS:
        if kind.name == "copy":
            continue
        try:
            peer = kind(1)
        except ImportError as missing:
            print(f"{kind.title}: not measured, {missing}")
            continue
        versions[kind.distribution] = peer.version()
        for dtype in DTYPES:
            for layout in ("channels_first", "channels_last"):
                for op in OPS:
                    case = Case(SHAPE, layout, op, dtype)
                    try:
                        errors = [errors_of(peer, case, ratio) for ratio in RATIOS]
                    except Unsupported:
                        continue
                    rows.append({"peer": kind.title, "dtype": dtype, "layout": layout, "op": op, "errors": errors})
                    print(rows[-1], flush=True)
    return {"versions": versions, "rows": rows}


def errors_of(peer: Any, case: Case, ratio: float) -> float:
    arrays = inputs(case, ratio)
    calls = peer.prepare(case, arrays)
    return error(case, arrays, calls.read(calls.fresh()))


def page(data: dict[str, Any]) -> str:
    """The page: for each dtype and operation one table of the peers, the worse of the two layouts."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    lines = [
        "# Accuracy beside other libraries",
        "",
        f"x has the shape {SHAPE.name} (N, C, H, W) or its channels-last form, standard deviation 1 and the mean that",
        "heads the column. A figure is the largest error of all values against the exact result, in units of the bound",
        "below; the larger of both layouts counts. Up to 1 nothing is lost beyond the rounding of the formula; 10 is",
        "one decimal digit lost, 1000 three. inf: a result was NaN or infinite.",
        "",
        "bnfast promises the bound of y; that of dx is a yardstick.",
        "",
        "    y:   4*eps*(|a|*(|x| + |mean| + std) + |b|),  a = gamma/sqrt(variance + epsilon), b = beta - a*mean",
        "    dx:  4*eps*|a|*(|dy| + |dbeta|/M + (|x| + |mean| + std)/std*|dgamma|/M)",
        "",
        "A large mean beside a small deviation is what an image in 0 to 255 has (mean/std 1 to 10), a time stamp or a",
        "temperature in Kelvin (100), a coordinate or a price (1000 and more).",
        "",
        f"Measured at {data['commit']} on {data['date']} by `just accuracy`, all in one run: {data['machine']};",
        f"{versions}.",
        "Code: `tests/helpers/guarantees/peers.py`; data: `docs/benchmarks/accuracy.json`.",
    ]
    for dtype in DTYPES:
        for op, title in (("train", "y of a training step"), ("grad", "dx")):
            lines += ["", f"## {title}, {dtype}", ""]
            lines += ["| mean/std | " + " | ".join(f"{ratio:g}" for ratio in RATIOS) + " |"]
            lines += ["|---" * (len(RATIOS) + 1) + "|"]
            for peer in dict.fromkeys(row["peer"] for row in data["rows"]):
                rows = (row for row in data["rows"] if (row["peer"], row["dtype"], row["op"]) == (peer, dtype, op))
                found = [row["errors"] for row in rows]
                if found:
                    worst = [max(errors) for errors in zip(*found, strict=True)]
                    lines.append(f"| {peer} | " + " | ".join(figure(value) for value in worst) + " |")
    return "\n".join([*lines, ""])


def figure(value: float) -> str:
    return "inf" if value == float("inf") else f"{value:.2g}" if value < 100 else f"{value:,.0f}"


def main() -> int:
    if "--page" in sys.argv:
        data = json.loads(DATA.read_text())
    else:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        command = ["git", "rev-parse", "--short=7", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
        data = {"commit": commit, "date": datetime.date.today().isoformat(), "machine": machine(), **measure()}
        DATA.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
