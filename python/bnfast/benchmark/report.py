"""The results of `bnfast bench` as rows (JSON) and as Markdown.

A row is one measurement: one peer in one output mode on one case.
ratio     its time over bnfast's in the same mode (for "warm": over bnfast's "fresh"); above 1, bnfast is faster
to_copy   its time over the time that the unavoidable bytes take at the copy's speed in the same round: one copy for
          train and infer (two tensors), one and a half for grad (three tensors)
The peer "torch" is added to the summaries: the faster of torch's two memory formats in each case.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bnfast.benchmark.cases import OPS
from bnfast.benchmark.machine import load_sentence, sentence
from bnfast.benchmark.peers import BASELINES
from bnfast.benchmark.timing import MODES, CaseResult, Measurement, median, ratio

SCHEMA = 1
TORCHES = ("torch-contiguous", "torch-channels_last")
COPIES = {"train": 1.0, "infer": 1.0, "grad": 1.5}  # the unavoidable bytes, in copies of one tensor
Row = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """The ratios of one peer in one mode, over all cases of an operation and dtype."""

    op: str
    dtype: str
    peer: str
    mode: str
    geomean: float
    smallest: float
    largest: float
    smallest_at: str  # the shape and layout
    cases: int


def rows_of(result: CaseResult) -> list[Row]:
    """One row per measurement."""
    case = result.case
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
    return [{**about, **_figures(result, measurement)} for measurement in result.measurements]


def _figures(result: CaseResult, measurement: Measurement) -> Row:
    base = result.find("bnfast", "fresh" if measurement.mode == "warm" else measurement.mode)
    copy = result.find("copy", "reused")
    return {
        "peer": measurement.peer,
        "mode": measurement.mode,
        "rounds": len(measurement.seconds),
        "calls": measurement.calls,
        "seconds": short(median(measurement.seconds)),
        "quartiles": quartiles(measurement.seconds),
        "ratio": short(ratio(measurement, base)) if base and measurement.peer != "copy" else None,
        "to_copy": short(ratio(measurement, copy, 1 / COPIES[result.case.op])) if copy else None,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return [short(values[0]), short(values[0])]
    first, _, third = statistics.quantiles(values, n=4)
    return [short(first), short(third)]


def short(value: float) -> float:
    """Round to four significant digits, as in the JSON."""
    return float(f"{value:.4g}")


def json_text(machine: dict[str, Any], settings: Row, rows: list[Row], left_out: list[Row]) -> str:
    """Everything as one JSON object with one line per row, so that `diff` can compare two runs."""
    head = json.dumps({"schema": SCHEMA, "machine": machine, "settings": settings}, indent=1)
    head = head.removesuffix("\n}")
    return f"{head},\n{_json_list('rows', rows)},\n{_json_list('left_out', left_out)}\n}}\n"


def _json_list(name: str, rows: list[Row]) -> str:
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f' "{name}": [\n{lines}\n ]'


def key(row: Row) -> tuple[str, str, str, str]:
    """The case of a row: shape, layout, operation, dtype."""
    return row["shape"], row["layout"], row["op"], row["dtype"]


def with_best_torch(rows: Iterable[Row]) -> list[Row]:
    """`rows`, preceded by a peer "torch": for each case and mode the faster of torch's two memory formats."""
    rows = list(rows)
    fastest: dict[Any, Row] = {}
    for row in rows:
        if row["peer"] in TORCHES:
            measured = (key(row), row["mode"])
            if measured not in fastest or row["seconds"] < fastest[measured]["seconds"]:
                fastest[measured] = {**row, "peer": "torch"}
    return [*fastest.values(), *rows]


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Summaries sorted by dtype, operation and mode; "torch" comes before the peers, which keep their order."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in with_best_torch(rows):
        if row["ratio"] and row["peer"] != "bnfast":
            groups.setdefault((row["op"], row["dtype"], row["peer"], row["mode"]), []).append(row)
    result = []
    for (op, dtype, peer, mode), group in groups.items():
        ratios = [row["ratio"] for row in group]
        smallest = min(group, key=lambda row: row["ratio"])
        summary = Summary(
            op=op,
            dtype=dtype,
            peer=peer,
            mode=mode,
            geomean=statistics.geometric_mean(ratios),
            smallest=min(ratios),
            largest=max(ratios),
            smallest_at=f"{smallest['shape']} {smallest['layout']}",
            cases=len(group),
        )
        result.append(summary)
    return sorted(result, key=lambda s: (s.dtype, OPS.index(s.op), list(MODES).index(s.mode)))


def markdown(machine: dict[str, Any], rows: list[Row], left_out: list[Row], titles: dict[str, str]) -> str:
    """The whole report. `titles` gives the title of each peer, in the order of the columns."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# bnfast against its peers",
        f"{sentence(machine)}. {versions}. {load_sentence(machine)}.",
        "Times are medians over interleaved rounds. The figure in brackets is the median ratio to bnfast's time within"
        " a round: above 1, bnfast is faster. `docs/benchmarks/README.md` explains how to read and repeat this.",
        _summary_table(rows, titles),
    ]
    for dtype in _unique(row["dtype"] for row in rows):
        for op in (op for op in OPS if any(row["op"] == op for row in rows)):
            chosen = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            if chosen:
                parts += [f"## {op}, {dtype}, outputs dropped each call", _case_table(chosen, titles)]
    if left_out:
        parts += ["## Left out", "\n".join(_left_out_lines(left_out, titles))]
    return "\n\n".join(parts) + "\n"


def _summary_table(rows: list[Row], titles: dict[str, str]) -> str:
    titles = {"torch": "torch, faster format", **titles}
    heads = ["op", "dtype", "peer", "outputs", "geomean", "smallest", "smallest at", "cases"]
    lines = []
    for s in summarize(rows):
        geomean, smallest = f"{s.geomean:.2f}", f"{s.smallest:.2f}"
        lines.append([s.op, s.dtype, titles[s.peer], MODES[s.mode], geomean, smallest, s.smallest_at, s.cases])
    return markdown_table(heads, lines)


def _case_table(rows: list[Row], titles: dict[str, str]) -> str:
    peers = [name for name in titles if name not in BASELINES and any(row["peer"] == name for row in rows)]
    heads = ["shape", "layout", "MB", "copy, ms", "bnfast, ms", "to copy", "reused, ms", "to copy"]
    heads += [f"{titles[peer]}, ms" for peer in peers]
    lines = []
    for case in _unique(key(row) for row in rows):
        found = {(row["peer"], row["mode"]): row for row in rows if key(row) == case}
        shape, layout, _, _ = case
        megabytes = next(iter(found.values()))["bytes"] / 1e6
        line = [shape, layout, f"{megabytes:.3g}", _ms(found.get(("copy", "reused")))]
        for mode in ("fresh", "reused"):
            row = found.get(("bnfast", mode))
            line += [_ms(row), f"{row['to_copy']:.2f}" if row and row["to_copy"] else "-"]
        line += [_ms_and_ratio(found.get((peer, "fresh"))) for peer in peers]
        lines.append(line)
    return markdown_table(heads, lines)


def _left_out_lines(left_out: list[Row], titles: dict[str, str]) -> list[str]:
    reasons = _unique((row["peer"], row["reason"]) for row in left_out)
    count = {reason: sum((row["peer"], row["reason"]) == reason for row in left_out) for reason in reasons}
    return [f"- {titles[peer]}, {count[peer, reason]} cases: {reason}" for peer, reason in reasons]


def digits(value: float) -> str:
    """Three significant digits, never an exponent: 0.00354, 9.87, 98.8, 98800."""
    if value >= 999.5:  # "g" would write 1e+03
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"


def _ms(row: Row | None) -> str:
    return digits(1e3 * row["seconds"]) if row else "-"


def _ms_and_ratio(row: Row | None) -> str:
    return f"{_ms(row)} ({digits(row['ratio'])})" if row and row["ratio"] else _ms(row)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; cells are converted with str()."""
    rows = [heads, ["---" for _ in heads], *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
