"""The results of `bnfast bench --model` as rows (JSON) and as Markdown.

A row is one variant and one quantity, named by "what":
train, predict   seconds: the median over rounds, and the quartiles
memory           bytes: the median over processes
check            the variant's distance from its base, and its batch norms by class
`ratio` is relative to the base, the model with the framework's own batch norm: below 1 is better. For times it is the
median of the ratios within rounds, for memory the ratio of the medians.
"""

from __future__ import annotations

import statistics
from typing import Any

from bnfast.benchmark.machine import load_sentence, sentence
from bnfast.benchmark.model_memory import Runs
from bnfast.benchmark.model_timing import PREDICTION_TOLERANCE, ModelResult, Variant
from bnfast.benchmark.models import KERAS, Framework, Spec
from bnfast.benchmark.report import Row, digits, markdown_table, quartiles, short
from bnfast.benchmark.timing import Measurement, median, ratio

# What is measured: the name in JSON, and the title in tables.
QUANTITIES = {"train": "train step, ms", "predict": "predict, ms", "memory": "peak memory, MB"}


def rows_of(result: ModelResult, memory: Runs, framework: Framework = KERAS) -> list[Row]:
    """One row per variant and quantity."""
    bases = {name: kind.base for name, kind in framework.variants.items()}
    rows = [_time_row(found, result.find(bases[found.peer], found.mode)) for found in result.measurements]
    peaks = {name: _median_bytes(memory[base], "peak_bytes") for name, base in bases.items() if base in memory}
    rows += [_memory_row(name, runs, peaks.get(name)) for name, runs in memory.items()]
    rows += [_check_row(variant) for variant in result.variants]
    return rows


def _time_row(measurement: Measurement, base: Measurement | None) -> Row:
    return {
        "variant": measurement.peer,
        "what": measurement.mode,
        "rounds": len(measurement.seconds),
        "seconds": short(median(measurement.seconds)),
        "quartiles": quartiles(measurement.seconds),
        "ratio": short(ratio(measurement, base)) if base else None,
    }


def _memory_row(name: str, runs: list[dict[str, int]], base_peak: float | None) -> Row:
    peak = _median_bytes(runs, "peak_bytes")
    return {
        "variant": name,
        "what": "memory",
        "bytes": int(peak),
        "before_bytes": int(_median_bytes(runs, "before_bytes")),
        "processes": [run["peak_bytes"] for run in runs],
        "ratio": short(peak / base_peak) if base_peak else None,
    }


def _median_bytes(runs: list[dict[str, int]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _check_row(variant: Variant) -> Row:
    return {
        "variant": variant.name,
        "what": "check",
        "predictions": short(variant.predictions),
        "loss": None if variant.loss is None else short(variant.loss),
        "batch_norms": variant.batch_norms,
    }


def table(rows: list[Row], framework: Framework = KERAS) -> list[tuple[str, ...]]:
    """One line per variant: its title, then value and ratio of each quantity, "-" if it was not measured."""
    found = {(row["variant"], row["what"]): row for row in rows}
    variants = {row["variant"] for row in rows}
    lines = []
    for name in (name for name in framework.variants if name in variants):
        line = [framework.titles[name]]
        for what in QUANTITIES:
            line += _value_and_ratio(found.get((name, what)))
        lines.append(tuple(line))
    return lines


def _value_and_ratio(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    value = row["bytes"] / 1e6 if row["what"] == "memory" else 1e3 * row["seconds"]
    return digits(value), "-" if row["ratio"] is None else f"{row['ratio']:.2f}"


def markdown(machine: dict[str, Any], spec: Spec, rows: list[Row], left_out: list[Row]) -> str:
    """The whole report."""
    framework = spec.framework
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    heads = ["batch norm"]
    for title in QUANTITIES.values():
        heads += [title, f"to {framework.title}"]
    note = f"{framework.note} " if framework.note else ""
    parts = [
        f"# {spec.label}: one model, several batch norms",
        f"{sentence(machine)}. {versions}. {load_sentence(machine)}.",
        f'Times are medians over interleaved rounds. "to {framework.title}" is the median ratio to {_own(framework)}'
        f" within a round; below 1 is faster. {note}Peak memory is VmHWM of a fresh process that runs three training"
        " steps, the median over several processes. `docs/benchmarks/README.md` explains how to repeat this.",
        markdown_table(heads, table(rows, framework)),
        "## Checked before anything was timed",
        f"Differences from {framework.title}'s model. Predictions: the largest difference, relative to the largest"
        f" prediction; {PREDICTION_TOLERANCE:g} is allowed, and the model without batch norm shows that the check"
        " notices errors. Loss: the relative difference in the first training step.",
        markdown_table(["batch norm", "predictions", "loss", "layers"], _check_lines(rows, framework)),
    ]
    if left_out:
        lines = "\n".join(f"- {framework.titles[row['variant']]}: {row['reason']}" for row in left_out)
        parts += ["## Left out", lines]
    return "\n\n".join(parts) + "\n"


def _own(framework: Framework) -> str:
    """The framework's own batch norm, in words."""
    return next(iter(framework.titles.values()))


def _check_lines(rows: list[Row], framework: Framework) -> list[list[str]]:
    lines = []
    for row in rows:
        if row["what"] != "check":
            continue
        loss = "-" if row["loss"] is None else f"{row['loss']:.1e}"
        layers = ", ".join(f"{count} {name}" for name, count in row["batch_norms"].items()) or "none"
        lines.append([framework.titles[row["variant"]], f"{row['predictions']:.1e}", loss, layers])
    return lines
