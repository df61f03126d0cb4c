"""`bnfast bench --model NAME`: a keras.applications model with Keras's batch norm, TF's fused op, bnfast's, and none.

Prints a table; with --out also leaves NAME-BATCHxSIZE.json, .md and .png in that folder. What it compares:
bnfast.benchmark.models; how it measures: bnfast.benchmark.model_timing and model_memory.
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
from bnfast.benchmark import machine, model_memory, model_report, model_timing, models
from bnfast.benchmark.report import Row, save_json
from bnfast.cli.errors import UserError, require

ROUNDS, QUICK_ROUNDS = 15, 3
MEMORY_RUNS, QUICK_MEMORY_RUNS = 5, 1
BATCH, SIZE = 16, 224
Progress = Callable[[str], object]


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    spec = parse(arguments)
    names = [name for name in models.TITLES if name == models.BASE or name in (arguments.variants or models.TITLES)]
    threads_before = bnfast.get_num_threads()
    try:
        _start(spec, arguments.threads)
        about = _describe(arguments.threads)
        measured, memory, failed = _measure(spec, names, arguments)
    finally:
        at_default = threads_before == bnfast.build_info()["default_threads"]
        bnfast.set_num_threads(None if at_default else threads_before)
    rows = model_report.rows_of(measured, memory)
    reasons = [(name, "all", why) for name, why in measured.left_out.items()]
    reasons += [(name, "memory", why) for name, why in failed.items()]
    here = f"{Path(bnfast.__file__).parents[1]}{os.sep}"  # reports name no folder of the machine they come from
    left_out: list[Row] = [
        {"variant": name, "what": what, "reason": why.replace(here, "")} for name, what, why in reasons
    ]
    _print(about, spec, rows, left_out)
    if arguments.out:
        _write(arguments, about, spec, rows, left_out)
    return 0


def parse(arguments: argparse.Namespace) -> models.Spec:
    """The model that is asked for."""
    try:
        return models.parse(arguments.model, arguments.batch or BATCH, arguments.size or SIZE)
    except ValueError as error:
        wanted = "must be a name of keras.applications, or NAME(argument=value, ...) with arguments of its own"
        raise UserError(f"argument --model: {wanted}. Received: {arguments.model!r}") from error


def _start(spec: models.Spec, threads: int | None) -> None:
    """Keras, and the name looked up in it."""
    require("keras", "tensorflow", extra="demo")
    try:
        keras = models.load(threads)
    except ImportError as error:
        raise UserError(f'TensorFlow or Keras could not be imported ({error}): pip install "bnfast[demo]"') from error
    except RuntimeError as error:
        raise UserError(f"argument --threads: TensorFlow can't have {threads} now: {error}") from error
    known = models.known(keras)
    if spec.name not in known:
        near = difflib.get_close_matches(spec.name, known)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"argument --model: must be a name of keras.applications. Received: {spec.name!r}{meant}")


def _describe(threads: int | None) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    versions = {"tensorflow": tf.__version__, "keras": keras.__version__, "bnfast": bnfast.__version__}
    return machine.describe(threads or bnfast.get_num_threads(), versions)


def _measure(
    spec: models.Spec, names: list[str], arguments: argparse.Namespace
) -> tuple[model_timing.Measured, model_memory.Runs, dict[str, str]]:
    from bnfast.cli import quiet

    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    runs = arguments.memory_runs
    if runs is None:
        runs = QUICK_MEMORY_RUNS if arguments.quick else MEMORY_RUNS
    if not model_memory.available():
        runs = 0
    trained = sum(name in models.TRAINS for name in names)
    with quiet.quiet_stderr(), _progress(model_timing.tells(names, rounds) + runs * trained) as tell:
        try:
            measured = model_timing.measure(spec, names, rounds, tell)
        except model_timing.Disagreement as error:
            raise UserError(error) from error
        except models.Refused as error:
            raise UserError(f"argument --model: {error}") from error
        here = [variant.name for variant in measured.variants]
        memory, failed = model_memory.peaks(spec, here, runs, arguments.threads, tell)
    return measured, memory, failed


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A function that names the piece of work that begins, and thereby ends the one before."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=1)
    with bar as progress:
        task = progress.add_task("", total=total)
        pieces = iter(range(total))

        def tell(description: str) -> None:
            progress.update(task, completed=next(pieces, total), description=description, refresh=True)

        yield tell


def _print(about: dict[str, Any], spec: models.Spec, rows: list[Row], left_out: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(machine.sentence(about))
    print(f"{spec.label}; in brackets the ratio to Keras's layer: below 1 is faster, or smaller")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch norm", no_wrap=True)
    for head in model_report.HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for name, *cells in model_report.table(rows):
        pairs = zip(cells[::2], cells[1::2], strict=True)
        table.add_row(name, *(value if ratio == "-" else f"{value} ({ratio})" for value, ratio in pairs))
    Console().print(table)
    for row in left_out:
        what = "" if row["what"] == "all" else f", {row['what']}"
        print(f"left out: {models.TITLES[row['variant']]}{what}: {row['reason']}")


def _write(
    arguments: argparse.Namespace, about: dict[str, Any], spec: models.Spec, rows: list[Row], left_out: list[Row]
) -> None:
    from bnfast.benchmark import model_figure

    settings = {name: getattr(arguments, name) for name in ("variants", "rounds", "memory_runs", "quick")}
    settings |= {"model": spec.text, "batch": spec.batch, "size": spec.size}
    paths = {kind: arguments.out / f"{spec.file_name}.{kind}" for kind in ("json", "md", "png")}
    save_json(paths["json"], about, settings, rows, left_out)
    paths["md"].write_text(model_report.markdown(about, spec.label, rows, left_out))
    model_figure.save(paths["png"], rows, spec.label, machine.sentence(about))
    print(f"wrote {', '.join(map(str, paths.values()))}")
