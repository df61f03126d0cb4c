"""What `bnfast bench --model` measured, as rows (JSON) and as Markdown.

A row is a variant and what was measured of it: "train" and "predict" (seconds, median over rounds, quartiles), "memory"
(bytes, median over processes), "check" (its distance from Keras's model and its batch norms by class). `ratio` is over
Keras's, below 1 is better: the median of the ratios within rounds, for memory that of the medians.
"""

from __future__ import annotations

import statistics
from typing import Any

from bnfast.benchmark import machine as machine_of
from bnfast.benchmark.model_memory import Runs
from bnfast.benchmark.model_timing import PREDICTIONS, Measured
from bnfast.benchmark.models import BASE, TITLES
from bnfast.benchmark.report import Row, digits, markdown_table, quartiles, short
from bnfast.benchmark.timing import median, ratio

WHAT = ("train", "predict", "memory")
HEADS = ("train step, ms", "predict, ms", "peak memory, MB")


def rows_of(measured: Measured, memory: Runs) -> list[Row]:
    """One row a variant and a thing measured."""
    rows = []
    for way in measured.ways:
        base = measured.find(BASE, way.mode)
        figures = {
            "rounds": len(way.seconds),
            "seconds": short(median(way.seconds)),
            "quartiles": quartiles(way.seconds),
            "ratio": short(ratio(way, base)) if base else None,
        }
        rows.append({"variant": way.peer, "what": way.mode, **figures})
    peaks = {name: statistics.median(run["peak_bytes"] for run in runs) for name, runs in memory.items()}
    for name, runs in memory.items():
        figures = {
            "bytes": int(peaks[name]),
            "before_bytes": int(statistics.median(run["before_bytes"] for run in runs)),
            "processes": [run["peak_bytes"] for run in runs],
            "ratio": short(peaks[name] / peaks[BASE]) if BASE in peaks else None,
        }
        rows.append({"variant": name, "what": "memory", **figures})
    for variant in measured.variants:
        loss = None if variant.loss is None else short(variant.loss)
        found = {"predictions": short(variant.predictions), "loss": loss, "batch_norms": variant.layers}
        rows.append({"variant": variant.name, "what": "check", **found})
    return rows


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    """(title, then figure and ratio of each of WHAT) for each variant, in their order; "-" where there is nothing."""
    found = {(row["variant"], row["what"]): row for row in rows}
    lines = []
    for name in (name for name in TITLES if any(row["variant"] == name for row in rows)):
        line = [TITLES[name]]
        for what in WHAT:
            row = found.get((name, what))
            value = None if row is None else row["bytes"] / 1e6 if what == "memory" else 1e3 * row["seconds"]
            line.append("-" if value is None else digits(value))
            line.append("-" if row is None or row["ratio"] is None else f"{row['ratio']:.2f}")
        lines.append(tuple(line))
    return lines


def markdown(machine: dict[str, Any], label: str, rows: list[Row], left_out: list[Row]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    heads = ["batch norm", *(cell for head in HEADS for cell in (head, "to Keras"))]
    parts = [
        f"# {label}: one model, several batch norms",
        f"{machine_of.sentence(machine)}. {versions}. Load before the run: {machine['load_before']}.",
        'Times are medians over interleaved rounds; "to Keras" is the median ratio within a round, below 1 is faster.'
        " Peak memory is VmHWM of a fresh process that takes three training steps, median of several processes."
        " How to repeat this: `docs/benchmarks/README.md`.",
        markdown_table(heads, table(rows)),
        "## Checked before anything was timed",
        f"Differences from Keras's model, relative: of the predictions, over the largest (allowed: {PREDICTIONS:g}; the"
        " model without batch norm shows that the check sees one), and of the loss of the first training step.",
        markdown_table(["batch norm", "predictions", "loss", "layers"], _check_lines(rows)),
    ]
    if left_out:
        parts += ["## Left out", "\n".join(f"- {TITLES[row['variant']]}: {row['reason']}" for row in left_out)]
    return "\n\n".join(parts) + "\n"


def _check_lines(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in (row for row in rows if row["what"] == "check"):
        loss = "-" if row["loss"] is None else f"{row['loss']:.1e}"
        layers = ", ".join(f"{count} {name}" for name, count in row["batch_norms"].items()) or "none"
        lines.append([TITLES[row["variant"]], f"{row['predictions']:.1e}", loss, layers])
    return lines
