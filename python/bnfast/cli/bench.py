"""`bnfast bench`: the public API against torch, TensorFlow's fused op, Keras's layer and JAX, and against a copy.

Prints a summary; with --out also leaves bench.json, bench.md and bench.png in that folder. How it measures:
bnfast.benchmark.timing. With --model it times a whole Keras model instead: bnfast.cli.bench_model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnfast.benchmark import allocator, cases, machine, models, report, timing
from bnfast.benchmark.peers import PEERS, Peer
from bnfast.cli import bench_model
from bnfast.cli.errors import UserError, positive_int, require

SETS = ("resnet50", "dense", "tiny")
QUICK_ROUNDS = 3
HEADINGS = {"fresh": "dropped", "held": "3 alive", "reused": "reused", "warm": "warm malloc"}
TITLES = {peer.name: peer.title for peer in PEERS}
NEEDED = {"copy", "bnfast"}  # every figure is relative to one of them
SHAPES_ONLY = ("set", "shape", "op", "layout", "dtype", "peers", "outputs")
MODEL_ONLY = ("batch", "size", "variants", "memory_runs")


def register(subparsers: Any) -> None:
    """Add `bench` to the command line."""
    sets = list(dict.fromkeys(shape.set for shape in cases.read_shapes()))
    peers = [name for name in TITLES if name not in NEEDED]
    parser = subparsers.add_parser("bench", help="time batch norm against torch, TensorFlow, Keras and JAX")
    add = parser.add_argument
    add("--set", type=_names(sets), help=f"shapes of the table: {', '.join(sets)}, all (default: {','.join(SETS)})")
    add("--shape", type=_shape, action="append", default=[], metavar="N,C[,HxW]", help="your own; repeatable")
    add("--op", type=_names(cases.OPS), default=list(cases.OPS), help="train, grad, infer (default: all)")
    add("--layout", type=_names(cases.LAYOUTS), default=list(cases.LAYOUTS), help="channels_first, channels_last (all)")
    add("--dtype", type=_names(cases.DTYPES), default=["float32"], help=f"{', '.join(cases.DTYPES)} (default: float32)")
    add("--peers", type=_names(peers, families=True), default=peers, help=f"{', '.join(peers)} (default: all here)")
    add("--outputs", type=_names(timing.MODES), default=list(timing.MODES), help="fresh, held, reused, warm (all)")
    add("--threads", type=positive_int, help="of every peer (default: what bnfast uses)")
    add("--rounds", type=positive_int, help="of every case (default: 5 to 15, by how long one takes)")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: to see that it works, not for figures")
    add("--out", type=Path, metavar="DIR", help="leave bench.json, bench.md and bench.png there")
    _add_model(parser)
    parser.set_defaults(run=run, default=parser.get_default)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a whole model",
        "one keras.applications model with several batch norms; of the options above it takes"
        " --threads, --rounds, --quick and --out",
    )
    add = group.add_argument
    add("--model", metavar="NAME", help='MobileNetV2, say, or with arguments of its own "MobileNetV2(alpha=0.35)"')
    add("--batch", type=positive_int, help=f"images (default: {bench_model.BATCH})")
    add("--size", type=positive_int, help=f"of an image, in both directions (default: {bench_model.SIZE})")
    add("--variants", type=_names(models.TITLES, families=True), help=f"{', '.join(models.TITLES)} (default: all)")
    runs = f"fresh processes a variant for its peak memory, 0: none (default: {bench_model.MEMORY_RUNS})"
    add("--memory-runs", type=_count, metavar="N", help=runs)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    require("rich", *(["matplotlib"] if arguments.out else []), extra="demo")
    for option in MODEL_ONLY if arguments.model is None else SHAPES_ONLY:
        if getattr(arguments, option) != arguments.default(option):
            clash = "needs --model" if arguments.model is None else f"not together with --model {arguments.model}"
            raise UserError(f"argument --{option.replace('_', '-')}: {clash}")
    if arguments.model is not None:
        _prepare_folder(arguments.out)
        return bench_model.run(arguments)
    import bnfast

    work = _cases(arguments)
    if "bfloat16" in arguments.dtype:
        require("ml_dtypes", extra="test")
    _prepare_folder(arguments.out)
    threads_before = bnfast.get_num_threads()
    threads = arguments.threads or bnfast.build_info()["default_threads"]
    try:
        peers, missing = _start(arguments.peers, threads)
        if missing:
            print(f"not installed here, left out: {', '.join(missing)}")
        about = machine.describe(threads, {peer.distribution: peer.version() for peer in peers})
        rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else None)
        rows, left_out = _measure(work, peers, arguments.outputs, rounds)
    finally:
        at_default = threads_before == bnfast.build_info()["default_threads"]
        bnfast.set_num_threads(None if at_default else threads_before)
    _print_summary(about, rows, left_out)
    if arguments.out:
        settings = {name: getattr(arguments, name) for name in ("op", "layout", "dtype", "outputs", "rounds", "quick")}
        settings |= {"peers": [peer.name for peer in peers], "missing": missing}
        _write(arguments.out, about, settings, rows, left_out)
    return 0


def _cases(arguments: argparse.Namespace) -> list[cases.Case]:
    sets = arguments.set if arguments.set is not None else ([] if arguments.shape else list(SETS))
    shapes = [shape for shape in cases.read_shapes() if shape.set in sets] + arguments.shape
    return cases.make_cases(shapes, arguments.layout, arguments.op, arguments.dtype)


def _prepare_folder(folder: Path | None) -> None:
    """UserError now, not after minutes of measuring, if nothing can be written there."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").open("ab").close()
    except OSError as error:
        raise UserError(f"argument --out: {folder} can't be written: {error.strerror}") from error


def _start(chosen: list[str], threads: int) -> tuple[list[Peer], list[str]]:
    """The peers, and the names of those that can't be imported."""
    peers: list[Peer] = []
    missing = []
    for peer in PEERS:
        if peer.name not in NEEDED.union(chosen):
            continue
        try:
            peers.append(peer(threads))
        except ImportError:
            missing.append(peer.name)
        except RuntimeError as error:
            raise UserError(f"argument --threads: {peer.title} can't have {threads} now: {error}") from error
    return peers, missing


def _measure(
    work: list[cases.Case], peers: list[Peer], modes: list[str], rounds: int | None
) -> tuple[list[report.Row], list[report.Row]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bnfast.cli import quiet

    allocator.settle()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=1)
    rows: list[report.Row] = []
    left_out: list[report.Row] = []
    arrays, made_for = None, None
    with quiet.quiet_stderr(), bar as progress:  # TensorFlow and XLA speak when they first run
        task = progress.add_task("", total=len(work))
        for case in work:
            progress.update(task, description=f"{case.op} {case.shape.label} {case.layout} {case.dtype}", refresh=True)
            if arrays is None or made_for != (case.shape, case.layout, case.dtype):
                arrays = None  # before the next ones are made
                arrays, made_for = cases.make_arrays(case), (case.shape, case.layout, case.dtype)
            measured = timing.measure(case, arrays, peers, modes, rounds)
            rows += report.rows_of(measured)
            place = {"shape": case.shape.label, "layout": case.layout, "op": case.op, "dtype": case.dtype}
            left_out += [{**place, "peer": name, "reason": why} for name, why in measured.left_out.items()]
            progress.advance(task)
    return rows, left_out


def _print_summary(about: dict[str, Any], rows: list[report.Row], left_out: list[report.Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(machine.sentence(about))
    summaries = [s for s in report.summarize(rows) if s.peer not in report.TORCHES]  # "torch" is the better of them
    cells = {(s.dtype, s.op, s.peer, s.mode): f"{_digits(s.geomean)} ({_digits(s.worst)})" for s in summaries}
    title = "Time over bnfast's: geomean (least); above 1 bnfast is faster"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("peer", no_wrap=True, min_width=19)
    modes = [mode for mode in timing.MODES if any(s.mode == mode for s in summaries)]
    for mode in modes:
        table.add_column(HEADINGS[mode], justify="right", no_wrap=True)
    last = None
    for dtype, op, peer in dict.fromkeys((s.dtype, s.op, s.peer) for s in summaries):
        if last != (dtype, op):
            table.add_section()
            table.add_row(f"[bold]{op}[/bold]" if dtype == "float32" else f"[bold]{op} {dtype}[/bold]")
        last = dtype, op
        figures = (cells.get((dtype, op, peer, mode), "-") for mode in modes)
        table.add_row(f"  {TITLES.get(peer, peer)}", *figures)
    Console().print(table)
    for row in (row for row in left_out if row["reason"].startswith("wrong result")):
        print(f"{TITLES[row['peer']]}, {row['op']} {row['shape']} {row['layout']} {row['dtype']}: {row['reason']}")


def _write(
    folder: Path, about: dict[str, Any], settings: report.Row, rows: list[report.Row], left_out: list[report.Row]
) -> None:
    from bnfast.benchmark import figure

    report.save_json(folder / "bench.json", about, settings, rows, left_out)
    (folder / "bench.md").write_text(report.markdown(about, rows, left_out, TITLES))
    figure.save(folder / "bench.png", rows, TITLES, machine.sentence(about))
    print(f"wrote {', '.join(str(folder / f'bench.{kind}') for kind in ('json', 'md', 'png'))}")


def _digits(value: float) -> str:
    """9.87, 98.8, 988: three digits, and never an exponent."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _names(known: Any, families: bool = False) -> Callable[[str], list[str]]:
    """An argparse type: a comma list of `known` names, or all; with `families`, torch stands for every torch-*."""

    def parse(text: str) -> list[str]:
        chosen: set[str] = set()
        for name in text.split(","):
            found = {k for k in known if name in (k, "all") or (families and k.startswith(f"{name}-"))}
            if not found:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(known)} or all. Received: {name!r}")
            chosen |= found
        return [name for name in known if name in chosen]

    return parse


def _count(text: str) -> int:
    """An argparse type: an integer >= 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer >= 0. Received: {text}")
    return int(text)


def _shape(text: str) -> cases.NamedShape:
    """An argparse type: N,C or N,C,HxW."""
    try:
        return cases.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N,C or N,C,HxW, each >= 1. Received: {text!r}") from error
