"""`bnfast bench`: times the public API against torch, TensorFlow's fused op, Keras's layer, JAX, and a plain copy.

Prints a summary; with --out it also writes bench.json, bench.md and bench.png to that folder. bnfast.benchmark.timing
says how it measures. With --model it times a whole model instead, of Keras, PyTorch or JAX: bnfast.cli.bench_model.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bnfast
from bnfast.benchmark import allocator, cases, machine, models, quiet, report, timing
from bnfast.benchmark.peers import BASELINES, PEERS, Peer
from bnfast.cli import bench_model, files
from bnfast.cli.errors import (
    REPORTED,
    UserError,
    non_negative_int,
    positive_int,
    require,
    require_idle,
    require_memory,
    thread_count,
)
from bnfast.cli.names import name_list
from bnfast.cli.output import show, show_table
from bnfast.cli.progress import progress_bar

DEFAULT_SETS = ("resnet50", "dense", "tiny")
QUICK_ROUNDS = 3
MOST_VALUES, MOST_SPATIAL = 2**60, 16  # the bytes of float64 fit into an int64; NumPy takes up to 32 axes
TITLES = {peer.name: peer.title for peer in PEERS}
# The options that apply only without --model, and only with it.
SHAPES_ONLY: tuple[str, ...] = ("set", "shape", "op", "layout", "dtype", "peers", "outputs")
MODEL_ONLY: tuple[str, ...] = ("framework", "batch", "size", "variants", "memory_runs")


def register(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="time batch norm against torch, TensorFlow, Keras and JAX",
        description="Time bnfast's functions against torch, TensorFlow, Keras and JAX. NAMES is a comma-separated list,"
        " or all.",
    )
    _add_shape_options(parser)
    add = parser.add_argument
    add("--threads", type=thread_count, metavar="N", help="threads of each library (default: bnfast's default)")
    add(
        "--rounds",
        type=positive_int,
        metavar="N",
        help="rounds (default: 5 to 15 per case, or 15 with --model), also on a busy machine",
    )
    add("--quick", action="store_true", help=f"only {QUICK_ROUNDS} rounds: shows that it works; figures mean little")
    add("--out", type=Path, metavar="DIR", help="also write JSON, Markdown and a picture to this folder")
    _add_model_options(parser)
    parser.set_defaults(run=run, default=parser.get_default)


def _add_shape_options(parser: argparse.ArgumentParser) -> None:
    sets = list(dict.fromkeys(shape.set for shape in cases.read_shapes()))
    peers = [name for name in TITLES if name not in BASELINES]
    default_sets = ",".join(DEFAULT_SETS)

    def add(option: str, known: Iterable[str], default: list[str] | None, text: str, families: bool = False) -> None:
        known = list(known)
        parser.add_argument(
            option,
            type=name_list(known, families),
            default=default,
            metavar="NAMES",
            help=text.format(known=", ".join(known)),
        )

    add("--set", sets, None, f"sets of shapes: {{known}} (default: {default_sets})")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        default=[],
        metavar="N,C[,HxW]",
        help="a shape of your own, instead of the default sets; can be repeated",
    )
    add("--op", cases.OPS, list(cases.OPS), "operations: {known} (default: all)")
    add("--layout", cases.LAYOUTS, list(cases.LAYOUTS), "memory layouts: {known} (default: all)")
    add("--dtype", cases.DTYPES, ["float32"], "dtypes: {known} (default: float32)")
    add("--peers", peers, peers, "libraries: {known} (default: all that are installed)", families=True)
    outputs = "; ".join(f"{mode}: {title}" for mode, title in timing.MODES.items())
    add("--outputs", timing.MODES, list(timing.MODES), f"what happens to the outputs ({outputs}) (default: all)")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a whole model",
        "--model times one model with different batch norms: one of keras.applications, or with --framework torch or"
        " jax MobileNetV2 or ResNet50, as written in the benchmark. Of the options above, only --threads, --rounds,"
        " --quick and --out can be combined with it.",
    )
    add = group.add_argument
    add("--model", metavar="NAME", help='the model, such as MobileNetV2 or "MobileNetV2(alpha=0.35)"')
    add("--framework", choices=models.FRAMEWORKS, default="keras", help="what the model runs on (default: keras)")
    add("--batch", type=positive_int, metavar="N", help=f"images per batch (default: {bench_model.BATCH})")
    add("--size", type=positive_int, metavar="N", help=f"image height and width (default: {bench_model.SIZE})")
    variants = "; ".join(f"{name}: {', '.join(framework.variants)}" for name, framework in models.FRAMEWORKS.items())
    add("--variants", metavar="NAMES", help=f"batch norms ({variants}) (default: all)")
    runs = f"processes per variant that measure peak memory, 0: none (default: {bench_model.MEMORY_RUNS})"
    add("--memory-runs", type=non_negative_int, metavar="N", help=runs)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    require("rich", extra="demo")
    if arguments.out:
        require("matplotlib", extra="demo")
    _reject_other_mode(arguments)
    if arguments.model is None:
        return _run_shapes(arguments)
    return bench_model.run(arguments)


def _reject_other_mode(arguments: argparse.Namespace) -> None:
    """UserError for an option that needs --model, or that cannot be combined with it."""
    if arguments.model is None:
        rejected, problem = MODEL_ONLY, "needs --model"
    else:
        rejected, problem = SHAPES_ONLY, f"can't be combined with --model {arguments.model}"
    for option in rejected:
        if getattr(arguments, option) != arguments.default(option):
            raise UserError(f"argument --{option.replace('_', '-')}: {problem}")


def _run_shapes(arguments: argparse.Namespace) -> int:
    chosen_cases = _choose_cases(arguments)
    if "bfloat16" in arguments.dtype:
        require("ml_dtypes", extra="test")
    _require_memory(chosen_cases)
    if arguments.out:
        files.prepare("--out", _paths(arguments.out))
    threads = arguments.threads or bnfast.build_info()["default_threads"]
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else None)
    with timing.preserve_num_threads():
        peers, missing = _start_peers(arguments.peers, threads)
        if missing:
            show(f"not installed, left out: {', '.join(missing)}")
        about = machine.describe(threads, {peer.distribution: peer.version() for peer in peers})
        if rounds is None:
            require_idle(about["others_busy"], about["cores"])
        rows, left_out = _measure(chosen_cases, peers, arguments.outputs, rounds)
    if arguments.out:  # before anything is printed: stdout may be a pipe that nobody reads any more
        settings = {name: getattr(arguments, name) for name in ("op", "layout", "dtype", "outputs", "rounds", "quick")}
        settings |= {"peers": [peer.name for peer in peers], "missing": missing}
        _save(arguments.out, about, settings, rows, left_out)
    _print_summary(about, rows, left_out)
    if arguments.out:
        show(f"wrote {', '.join(map(str, _paths(arguments.out)))}")
    return 0


def _choose_cases(arguments: argparse.Namespace) -> list[cases.Case]:
    sets = arguments.set
    if sets is None:
        sets = [] if arguments.shape else DEFAULT_SETS
    shapes = [shape for shape in cases.read_shapes() if shape.set in sets] + arguments.shape
    return cases.make_cases(shapes, arguments.layout, arguments.op, arguments.dtype)


def _require_memory(chosen_cases: list[cases.Case]) -> None:
    for case in chosen_cases:  # x, dy and one output
        require_memory(f"{case.shape.label} {case.dtype}", 3 * case.nbytes)


def _paths(folder: Path) -> list[Path]:
    """The files of --out."""
    return [folder / f"bench.{kind}" for kind in ("json", "md", "png")]


def _start_peers(chosen: list[str], threads: int) -> tuple[list[Peer], list[str]]:
    """The chosen peers, and the names of those whose library is not installed."""
    peers: list[Peer] = []
    missing = []
    for peer in PEERS:
        if peer.name not in BASELINES and peer.name not in chosen:
            continue
        try:
            peers.append(peer(threads))
        except ImportError:
            missing.append(peer.name)
        except RuntimeError as error:
            raise UserError(f"argument --threads: {peer.title} can't change to {threads} threads: {error}") from error
    return peers, missing


def _measure(
    chosen_cases: list[cases.Case], peers: list[Peer], modes: list[str], rounds: int | None
) -> tuple[list[report.Row], list[report.Row]]:
    """The rows of all cases, and a row for each peer that was left out of a case."""
    allocator.restore_defaults()
    rows: list[report.Row] = []
    left_out: list[report.Row] = []
    arrays, made_for = None, None
    with quiet.quiet_stderr(REPORTED), progress_bar() as progress:  # TensorFlow and XLA log when they first run
        task = progress.add_task("", total=len(chosen_cases))
        for case in chosen_cases:
            progress.update(task, description=f"{case.op} {case.shape.label} {case.layout} {case.dtype}", refresh=True)
            if arrays is None or made_for != (case.shape, case.layout, case.dtype):
                arrays = None  # frees the old arrays before the new ones are made
                arrays, made_for = cases.make_arrays(case), (case.shape, case.layout, case.dtype)
            result = timing.measure(case, arrays, peers, modes, rounds)
            rows += report.rows_of(result)
            about = {"shape": case.shape.label, "layout": case.layout, "op": case.op, "dtype": case.dtype}
            left_out += [{**about, "peer": name, "reason": reason} for name, reason in result.left_out.items()]
            progress.advance(task)
    return rows, left_out


def _print_summary(about: dict[str, Any], rows: list[report.Row], left_out: list[report.Row]) -> None:
    show(machine.sentence(about))
    show(machine.load_sentence(about))
    show("Time over bnfast's: the geometric mean over the cases, in brackets the smallest. Above 1, bnfast is faster.")
    show("The columns differ in what happens to the outputs.")
    summaries = [s for s in report.summarize(rows) if s.peer not in report.TORCHES]  # "torch" stands for both
    show_table(_summary_table(summaries))
    for row in left_out:
        if row["reason"].startswith("wrong result"):
            show(f"{TITLES[row['peer']]}, {row['op']} {row['shape']} {row['layout']} {row['dtype']}: {row['reason']}")


def _summary_table(summaries: list[report.Summary]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("peer", no_wrap=True, min_width=19)
    modes = [mode for mode in timing.MODES if any(s.mode == mode for s in summaries)]
    for mode in modes:
        table.add_column(timing.MODES[mode], justify="right", min_width=11)
    cells = {(s.dtype, s.op, s.peer, s.mode): f"{_digits(s.geomean)} ({_digits(s.smallest)})" for s in summaries}
    section = None
    for dtype, op, peer in dict.fromkeys((s.dtype, s.op, s.peer) for s in summaries):
        if section != (dtype, op):
            section = dtype, op
            table.add_section()
            table.add_row(f"[bold]{op}[/bold]" if dtype == "float32" else f"[bold]{op} {dtype}[/bold]")
        table.add_row(f"  {TITLES.get(peer, peer)}", *(cells.get((dtype, op, peer, mode), "-") for mode in modes))
    return table


def _save(
    folder: Path, about: dict[str, Any], settings: report.Row, rows: list[report.Row], left_out: list[report.Row]
) -> None:
    from bnfast.benchmark import figure

    contents = (
        report.json_text(about, settings, rows, left_out).encode(),
        report.markdown(about, rows, left_out, TITLES).encode(),
        files.picture(figure.save, rows, TITLES, machine.sentence(about)),
    )
    files.save(dict(zip(_paths(folder), contents, strict=True)))


def _digits(value: float) -> str:
    """Three digits, never an exponent: 9.87, 98.8, 988."""
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _shape(text: str) -> cases.NamedShape:
    """An argparse type: N,C or N,C,HxW."""
    try:
        shape = cases.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N,C or N,C,HxW, each >= 1. Received: {text!r}") from error
    if shape.size > MOST_VALUES or len(shape.spatial) > MOST_SPATIAL:
        wanted = f"at most {MOST_VALUES} values and {MOST_SPATIAL} spatial extents"
        raise argparse.ArgumentTypeError(f"must have {wanted}. Received: {text!r}")
    return shape
