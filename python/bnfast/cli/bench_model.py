"""`bnfast bench --model NAME`: a keras.applications model with Keras's batch norm, TF's fused op, bnfast's, and none.

Prints a table; with --out it also writes NAME-BATCHxSIZE.json, .md and .png to that folder. bnfast.benchmark.models
says what it compares, bnfast.benchmark.model_timing and model_memory say how it measures.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bnfast
from bnfast.benchmark import machine, model_memory, model_report, model_timing, models, quiet, timing
from bnfast.benchmark.report import Row, json_text
from bnfast.cli import files
from bnfast.cli.errors import REPORTED, UserError, require, require_idle, require_memory
from bnfast.cli.output import show, show_table
from bnfast.cli.progress import progress_bar

ROUNDS, QUICK_ROUNDS = 15, 3
MEMORY_RUNS, QUICK_MEMORY_RUNS = 5, 1
BATCH, SIZE = 16, 224


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    spec = parse(arguments)
    require_memory(f"{spec.label} float32", 3 * 4 * 3 * spec.batch * spec.size**2)  # x and what one layer makes of it
    paths = (
        {kind: arguments.out / f"{spec.file_name}.{kind}" for kind in ("json", "md", "png")} if arguments.out else {}
    )
    files.prepare("--out", list(paths.values()))
    names = [name for name in models.TITLES if name == models.BASE or name in (arguments.variants or models.TITLES)]
    with timing.preserve_num_threads():
        _start(spec, arguments.threads)
        about = _describe(arguments.threads)
        if not (arguments.rounds or arguments.quick):
            require_idle(about["others_busy"], about["cores"])
        result, memory, failed = _measure(spec, names, arguments)
    rows = model_report.rows_of(result, memory)
    left_out = _left_out_rows(result.left_out, "all") + _left_out_rows(failed, "memory")
    if paths:  # before anything is printed: stdout may be a pipe that nobody reads any more
        _save(paths, arguments, about, spec, rows, left_out)
    _print(about, spec, rows, left_out)
    if paths:
        show(f"wrote {', '.join(map(str, paths.values()))}")
    return 0


def parse(arguments: argparse.Namespace) -> models.Spec:
    """The model to build. Raises UserError if --model is neither a name nor a call."""
    try:
        return models.parse(arguments.model, arguments.batch or BATCH, arguments.size or SIZE)
    except ValueError as error:
        wanted = "must be a name of keras.applications, or NAME(argument=value, ...)"
        raise UserError(f"argument --model: {wanted}. Received: {arguments.model!r}") from error


def _start(spec: models.Spec, threads: int | None) -> None:
    """Import Keras and check that it has the model."""
    require("keras", "tensorflow", extra="demo")
    try:
        keras = models.load_keras(threads)
    except ImportError as error:
        raise UserError(f'TensorFlow or Keras could not be imported ({error}): pip install "bnfast[demo]"') from error
    except RuntimeError as error:
        raise UserError(f"argument --threads: TensorFlow can't change to {threads} threads: {error}") from error
    known = models.application_names(keras)
    if spec.name not in known:
        similar = difflib.get_close_matches(spec.name, known)
        hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        raise UserError(f"argument --model: must be a name of keras.applications. Received: {spec.name!r}{hint}")


def _describe(threads: int | None) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "bnfast": bnfast.__version__}
    return machine.describe(threads or bnfast.get_num_threads(), versions)


def _measure(
    spec: models.Spec, names: list[str], arguments: argparse.Namespace
) -> tuple[model_timing.ModelResult, model_memory.Runs, dict[str, str]]:
    """The times, the peak memory, and the reason of each variant whose memory could not be measured."""
    import tensorflow as tf

    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    runs = arguments.memory_runs
    if runs is None:
        runs = QUICK_MEMORY_RUNS if arguments.quick else MEMORY_RUNS
    if not model_memory.available():
        runs = 0
    trained = sum(name in models.TRAINABLE for name in names)
    with quiet.quiet_stderr(REPORTED), _progress(model_timing.num_stages(names, rounds) + runs * trained) as announce:
        try:
            result = model_timing.measure(spec, names, rounds, announce)
        except model_timing.Disagreement as error:
            raise UserError(error) from error
        except models.InvalidModel as error:
            raise UserError(f"argument --model: {error}") from error
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(f"out of memory: {spec.label}") from error
        available = [variant.name for variant in result.variants]
        memory, failed = model_memory.peaks(spec, available, runs, arguments.threads, announce)
    return result, memory, failed


@contextmanager
def _progress(num_stages: int) -> Iterator[Callable[[str], None]]:
    """A progress bar. Calling the function it yields ends the current stage and names the next one."""
    with progress_bar(remaining=False) as progress:
        task = progress.add_task("", total=num_stages)
        stages = iter(range(num_stages))

        def announce(description: str) -> None:
            progress.update(task, completed=next(stages, num_stages), description=description, refresh=True)

        yield announce


def _left_out_rows(reasons: dict[str, str], what: str) -> list[Row]:
    """A row per variant that was left out of `what`. Reasons name no folder of this machine."""
    folder = f"{Path(bnfast.__file__).parents[1]}{os.sep}"
    return [{"variant": name, "what": what, "reason": reason.replace(folder, "")} for name, reason in reasons.items()]


def _print(about: dict[str, Any], spec: models.Spec, rows: list[Row], left_out: list[Row]) -> None:
    from rich import box
    from rich.table import Table

    show(machine.sentence(about))
    show(machine.load_sentence(about))
    show(f"{spec.label}. In brackets: the ratio to Keras's layer; below 1 is faster, or smaller.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch norm", no_wrap=True)
    for title in model_report.QUANTITIES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, *cells in model_report.table(rows):
        pairs = zip(cells[::2], cells[1::2], strict=True)
        table.add_row(name, *(value if ratio == "-" else f"{value} ({ratio})" for value, ratio in pairs))
    show_table(table)
    for row in left_out:
        what = "" if row["what"] == "all" else f", {row['what']}"
        show(f"left out: {models.TITLES[row['variant']]}{what}: {row['reason']}")


def _save(
    paths: dict[str, Path],
    arguments: argparse.Namespace,
    about: dict[str, Any],
    spec: models.Spec,
    rows: list[Row],
    left_out: list[Row],
) -> None:
    from bnfast.benchmark import model_figure

    settings = {name: getattr(arguments, name) for name in ("variants", "rounds", "memory_runs", "quick")}
    settings |= {"model": spec.text, "batch": spec.batch, "size": spec.size}
    contents = {
        "json": json_text(about, settings, rows, left_out).encode(),
        "md": model_report.markdown(about, spec.label, rows, left_out).encode(),
        "png": files.picture(model_figure.save, rows, spec.label, machine.sentence(about)),
    }
    files.save({paths[kind]: content for kind, content in contents.items()})
