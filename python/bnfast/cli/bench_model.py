"""`bnfast bench --model NAME`: a model with its framework's own batch norm, bnfast's, and none.

On Keras a model of keras.applications; on PyTorch and JAX (--framework) MobileNetV2 or ResNet50 as the benchmark writes
them. Prints a table; with --out it also writes NAME-BATCHxSIZE.json, .md and .png to that folder.
bnfast.benchmark.models says what it compares, bnfast.benchmark.model_timing and model_memory say how it measures.
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
from bnfast.cli.names import name_list
from bnfast.cli.output import show, show_table
from bnfast.cli.progress import progress_bar

ROUNDS, QUICK_ROUNDS = 15, 3
MEMORY_RUNS, QUICK_MEMORY_RUNS = 5, 1
BATCH, SIZE = 16, 224


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    spec = parse(arguments)
    framework = spec.framework
    variants = _variants(arguments.variants, framework)
    require_memory(f"{spec.label} float32", 3 * 4 * 3 * spec.batch * spec.size**2)  # x and what one layer makes of it
    paths = (
        {kind: arguments.out / f"{spec.file_name}.{kind}" for kind in ("json", "md", "png")} if arguments.out else {}
    )
    files.prepare("--out", list(paths.values()))
    with timing.preserve_num_threads():
        module = _start(spec, arguments.threads)
        versions = {**module.versions(), "bnfast": bnfast.__version__}
        about = machine.describe(arguments.threads or bnfast.get_num_threads(), versions)
        if not (arguments.rounds or arguments.quick):
            require_idle(about["others_busy"], about["cores"])
        result, memory, failed = _measure(spec, framework.chosen(variants), arguments)
    rows = model_report.rows_of(result, memory, framework)
    left_out = _left_out_rows(result.left_out, "all") + _left_out_rows(failed, "memory")
    if paths:  # before anything is printed: stdout may be a pipe that nobody reads any more
        settings = {name: getattr(arguments, name) for name in ("rounds", "memory_runs", "quick")}
        settings = {"variants": variants, **settings, "framework": framework.name}
        _save(paths, settings, about, spec, rows, left_out)
    _print(about, spec, rows, left_out)
    if paths:
        show(f"wrote {', '.join(map(str, paths.values()))}")
    return 0


def parse(arguments: argparse.Namespace) -> models.Spec:
    """The model to build. Raises UserError if --model is neither a name nor a call."""
    try:
        return models.parse(arguments.model, arguments.batch or BATCH, arguments.size or SIZE, arguments.framework)
    except ValueError as error:
        wanted = f"must be {models.FRAMEWORKS[arguments.framework].models}, or NAME(argument=value, ...)"
        raise UserError(f"argument --model: {wanted}. Received: {arguments.model!r}") from error


def _variants(text: str | None, framework: models.Framework) -> list[str] | None:
    """The variants of --variants. Raises UserError for a name that isn't one of this framework's."""
    if text is None:
        return None
    try:
        return name_list([*framework.variants], families=True)(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"argument --variants: {error}") from error


def _start(spec: models.Spec, threads: int | None) -> Any:
    """Import the framework, check that it has the model, and return the module that builds the variants."""
    framework = spec.framework
    require(*framework.requires, extra=framework.extra)
    try:
        module = framework.load()
        module.start(threads)
    except ImportError as error:
        libraries = "TensorFlow or Keras" if framework is models.KERAS else framework.title
        raise UserError(
            f'{libraries} could not be imported ({error}): pip install "bnfast[{framework.extra}]"'
        ) from error
    except RuntimeError as error:
        if framework is not models.KERAS:
            raise UserError(f"{framework.title} could not be started: {error}") from error
        raise UserError(f"argument --threads: TensorFlow can't change to {threads} threads: {error}") from error
    known = module.names()
    if spec.name not in known:
        similar = difflib.get_close_matches(spec.name, known)
        hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        raise UserError(f"argument --model: must be {framework.models}. Received: {spec.name!r}{hint}")
    return module


def _measure(
    spec: models.Spec, names: list[str], arguments: argparse.Namespace
) -> tuple[model_timing.ModelResult, model_memory.Runs, dict[str, str]]:
    """The times, the peak memory, and the reason of each variant whose memory could not be measured."""
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    runs = arguments.memory_runs
    if runs is None:
        runs = QUICK_MEMORY_RUNS if arguments.quick else MEMORY_RUNS
    if not model_memory.available():
        runs = 0
    stages = model_timing.num_stages(names, rounds, spec.framework) + runs * len(spec.framework.trained(names))
    with quiet.quiet_stderr(REPORTED), _progress(stages) as announce:
        try:
            result = model_timing.measure(spec, names, rounds, announce)
        except model_timing.Disagreement as error:
            raise UserError(error) from error
        except models.InvalidModel as error:
            raise UserError(f"argument --model: {error}") from error
        except Exception as error:
            if not spec.framework.load().out_of_memory(error):
                raise
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
    framework = spec.framework
    own = "Keras's layer" if framework is models.KERAS else f"{framework.title}'s batch norm"
    show(f"{spec.label}. In brackets: the ratio to {own}; below 1 is faster, or smaller.")
    if framework.note:
        show(framework.note)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("batch norm", no_wrap=True)
    for title in model_report.QUANTITIES.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, *cells in model_report.table(rows, framework):
        pairs = zip(cells[::2], cells[1::2], strict=True)
        table.add_row(name, *(value if ratio == "-" else f"{value} ({ratio})" for value, ratio in pairs))
    show_table(table)
    for row in left_out:
        what = "" if row["what"] == "all" else f", {row['what']}"
        show(f"left out: {framework.titles[row['variant']]}{what}: {row['reason']}")


def _save(
    paths: dict[str, Path],
    settings: Row,
    about: dict[str, Any],
    spec: models.Spec,
    rows: list[Row],
    left_out: list[Row],
) -> None:
    from bnfast.benchmark import model_figure

    settings = settings | {"model": spec.text, "batch": spec.batch, "size": spec.size}
    contents = {
        "json": json_text(about, settings, rows, left_out).encode(),
        "md": model_report.markdown(about, spec, rows, left_out).encode(),
        "png": files.picture(model_figure.save, rows, spec, machine.sentence(about)),
    }
    files.save({paths[kind]: content for kind, content in contents.items()})
