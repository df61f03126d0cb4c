"""What was measured, as rows (JSON) and as Markdown.

A row is one way of one case. Its `ratio` is its time over that of bnfast in the same mode (warm: over fresh), so above
1 bnfast is faster; `to_copy` is its time over that of moving the bytes the operation can't avoid at the speed of the
copy timed in the same round: one copy for train and infer (two tensors), one and a half for grad (three).
"torch" beside "torch-contiguous" and "torch-channels_last" is the better memory format of each case.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnfast.benchmark import machine as machine_of
from bnfast.benchmark.cases import OPS
from bnfast.benchmark.timing import Measured, Way, median, ratio

SCHEMA = 1
TORCHES = ("torch-contiguous", "torch-channels_last")
COPIES = {"train": 1.0, "infer": 1.0, "grad": 1.5}
MODE_TITLES = {
    "fresh": "dropped each call",
    "held": "last three alive",
    "reused": "reused (out=)",
    "warm": "warm malloc",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Over all cases of an op and dtype: how many times as long as bnfast a peer takes in a mode."""

    op: str
    dtype: str
    peer: str
    mode: str
    geomean: float
    worst: float  # the smallest ratio
    best: float
    worst_at: str
    cases: int


def rows_of(measured: Measured) -> list[Row]:
    """One row a way."""
    case = measured.case
    about = {
        "shape": case.shape.label,
        "set": case.shape.set,
        "N": case.shape.n,
        "C": case.shape.c,
        "spatial": list(case.shape.spatial),
        "layout": case.layout,
        "op": case.op,
        "dtype": case.dtype,
        "bytes": case.nbytes,
    }
    return [{**about, **_figures(measured, way)} for way in measured.ways]


def _figures(measured: Measured, way: Way) -> Row:
    base = measured.find("bnfast", "fresh" if way.mode == "warm" else way.mode)
    copy = measured.find("copy", "reused")
    return {
        "peer": way.peer,
        "mode": way.mode,
        "rounds": len(way.seconds),
        "calls": way.calls,
        "seconds": short(median(way.seconds)),
        "quartiles": quartiles(way.seconds),
        "ratio": short(ratio(way, base)) if base and way.peer != "copy" else None,
        "to_copy": short(ratio(way, copy, 1 / COPIES[measured.case.op])) if copy else None,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third."""
    found = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return [short(found[0]), short(found[2])]


def short(value: float) -> float:
    """Four digits, as the JSON has them."""
    return float(f"{value:.4g}")


def save_json(path: Path, machine: dict[str, Any], settings: Row, rows: list[Row], left_out: list[Row]) -> None:
    """One line a row, so that two runs can be compared by a line-wise diff."""
    lists = {"rows": rows, "left_out": left_out}
    head = json.dumps({"schema": SCHEMA, "machine": machine, "settings": settings}, indent=1)[:-2]
    lines = {name: ",\n".join(f"  {json.dumps(row)}" for row in listed) for name, listed in lists.items()}
    tail = ",\n".join(f' "{name}": [\n{text}\n ]' for name, text in lines.items())
    path.write_text(f"{head},\n{tail}\n}}\n")


def key(row: Row) -> tuple[str, str, str, str]:
    """The case that a row belongs to."""
    return row["shape"], row["layout"], row["op"], row["dtype"]


def with_best_torch(rows: Iterable[Row]) -> list[Row]:
    """`rows` and, for each case and mode, the faster of torch's memory formats once more as peer "torch"."""
    rows = list(rows)
    best: dict[Any, Row] = {}
    for row in rows:
        if row["peer"] in TORCHES:
            place = (key(row), row["mode"])
            if place not in best or row["seconds"] < best[place]["seconds"]:
                best[place] = {**row, "peer": "torch"}
    return list(best.values()) + rows


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """By dtype, op and mode, and then torch's better memory format before the peers in their order."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in with_best_torch(rows):
        if row["ratio"] and row["peer"] != "bnfast":
            groups.setdefault((row["op"], row["dtype"], row["peer"], row["mode"]), []).append(row)
    result = []
    for names, group in groups.items():
        least = min(group, key=lambda row: row["ratio"])
        geomean = math.exp(statistics.fmean(math.log(row["ratio"]) for row in group))
        most = max(row["ratio"] for row in group)
        where = f"{least['shape']} {least['layout']}"
        result.append(Summary(*names, geomean, least["ratio"], most, where, len(group)))
    return sorted(result, key=lambda s: (s.dtype, OPS.index(s.op), list(MODE_TITLES).index(s.mode)))


def markdown(machine: dict[str, Any], rows: list[Row], left_out: list[Row], titles: dict[str, str]) -> str:
    """The whole report. `titles`: what each peer is called, in the order of the columns."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# bnfast against its peers",
        f"{machine_of.sentence(machine)}. {versions}. Load before the run: {machine['load_before']}.",
        "Times are medians over interleaved rounds; in brackets the median ratio within a round: time over bnfast's, so"
        " above 1 bnfast is faster. How to read and repeat this: `docs/benchmarks/README.md`.",
        _summary_table(rows, titles),
    ]
    for dtype in _unique(row["dtype"] for row in rows):
        for op in (op for op in OPS if any(row["op"] == op for row in rows)):
            chosen = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            if chosen:
                parts += [f"## {op}, {dtype}, fresh outputs", _case_table(chosen, titles)]
    if left_out:
        parts += ["## Left out", "\n".join(_left_out_lines(left_out, titles))]
    return "\n\n".join(parts) + "\n"


def _summary_table(rows: list[Row], titles: dict[str, str]) -> str:
    table = []
    for s in summarize(rows):
        name = {"torch": "torch, better format", **titles}[s.peer]
        figures = (f"{s.geomean:.2f}", f"{s.worst:.2f}", s.worst_at, s.cases)
        table.append([s.op, s.dtype, name, MODE_TITLES[s.mode], *figures])
    return markdown_table(["op", "dtype", "peer", "outputs", "geomean", "least", "least at", "cases"], table)


def _case_table(rows: list[Row], titles: dict[str, str]) -> str:
    peers = [name for name in titles if name not in ("copy", "bnfast") and any(row["peer"] == name for row in rows)]
    heads = ["shape", "layout", "MB", "copy, ms", "bnfast, ms", "to copy", "reused, ms", "to copy"]
    table = []
    for case in _unique(key(row) for row in rows):
        found = {(row["peer"], row["mode"]): row for row in rows if key(row) == case}
        megabytes = next(iter(found.values()))["bytes"] / 1e6
        line = [case[0], case[1], f"{megabytes:.3g}", _ms(found.get(("copy", "reused")))]
        for mode in ("fresh", "reused"):
            row = found.get(("bnfast", mode))
            line += [_ms(row), f"{row['to_copy']:.2f}" if row and row["to_copy"] else "-"]
        table.append(line + [_ms_and_ratio(found.get((peer, "fresh"))) for peer in peers])
    return markdown_table(heads + [f"{titles[peer]}, ms" for peer in peers], table)


def _left_out_lines(left_out: list[Row], titles: dict[str, str]) -> list[str]:
    reasons = _unique((row["peer"], row["reason"]) for row in left_out)
    count = {reason: sum((row["peer"], row["reason"]) == reason for row in left_out) for reason in reasons}
    return [f"- {titles[peer]}, {count[peer, reason]} cases: {reason}" for peer, reason in reasons]


def digits(value: float) -> str:
    """Three digits, never an exponent: 0.00354, 9.87, 98.8, 98800."""
    return f"{value:.3g}" if 1e-4 <= value < 1000 else f"{value:.0f}" if value >= 1000 else f"{value:.6f}"


def _ms(row: Row | None) -> str:
    return digits(1e3 * row["seconds"]) if row else "-"


def _ms_and_ratio(row: Row | None) -> str:
    return f"{_ms(row)} ({digits(row['ratio'])})" if row and row["ratio"] else _ms(row)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """The text of a table; cells are written with str()."""
    text = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in text)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
