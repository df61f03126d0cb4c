"""`bnfast demo`: the same CNN trained on real images with Keras's batch norm and with bnfast's, side by side.

Prints a table and writes a picture. Both trainings start from the same weights and see the same batches in the same
order; see training.py for how steps are timed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from bnfast.cli import datasets, quiet
from bnfast.cli.errors import UserError, positive_int, require

FILE_NAME = "bnfast-demo.png"
KERAS, OURS = "Keras", "bnfast"
EPOCHS = {"digits": 12}  # elsewhere 1: MNIST and CIFAR have 30 to 40 times as many images
BATCH = 64


def register(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser("demo", help="train a small CNN with Keras's batch norm and with bnfast's")
    parser.add_argument(
        "--data",
        choices=datasets.NAMES,
        default="digits",
        help="images to train on; digits (default) is bundled with scikit-learn, the others are downloaded once",
    )
    parser.add_argument("--epochs", type=positive_int, help="passes over the images (default: digits 12, others 1)")
    parser.add_argument("--batch", type=positive_int, default=BATCH, help=f"images a step (default: {BATCH})")
    parser.add_argument(
        "--out", type=Path, default=Path(FILE_NAME), help=f"the picture: a .png file or a folder (default: {FILE_NAME})"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table, write the picture."""
    needed = ["tensorflow", "keras", "rich", "matplotlib"] + ["sklearn"] * (arguments.data == "digits")
    require(*needed, extra="demo")
    picture = _picture_path(arguments.out)
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr():
        layers = batch_norms()
    data = datasets.load(arguments.data)
    if arguments.batch > len(data.x_train):
        raise UserError(
            f"argument --batch: {data.name} has {len(data.x_train)} training images. Received: {arguments.batch}"
        )
    epochs = arguments.epochs or EPOCHS.get(data.name, 1)
    histories = _train(layers, data, epochs, arguments.batch)
    _print_table(histories)
    _draw(picture, histories, data, epochs, arguments.batch)
    print(f"wrote {picture}")
    return 0


def batch_norms() -> dict[str, type]:
    """The two layers, by the name they have in the table. UserError where they can't be imported."""
    try:
        import keras

        import bnfast.keras
    except ImportError as error:
        raise UserError(f'TensorFlow or Keras could not be imported ({error}): pip install "bnfast[demo]"') from error
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"the demo needs Keras's TensorFlow backend. Received: {keras.backend.backend()}")
    return {KERAS: keras.layers.BatchNormalization, OURS: bnfast.keras.BatchNormalization}


def _picture_path(out: Path) -> Path:
    """Where the picture goes. UserError now, before any training, if nothing can be written there."""
    if out.suffix and not out.is_dir():
        path = out
        if path.suffix.lower() != ".png":
            raise UserError(f"argument --out: must be a .png file or a folder. Received: {out}")
    else:
        path = out / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"argument --out: {path} can't be written: {error.strerror}") from error
    return path


def _train(layers: dict[str, type], data: datasets.Dataset, epochs: int, batch: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bnfast.cli import training

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # TensorFlow speaks once more when it first runs, so what goes to stderr is set aside here too: bar to stdout.
    console = Console()
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with quiet.quiet_stderr(), bar as progress:
        steps = epochs * (len(data.x_train) // batch)
        task = progress.add_task(f"{data.name}, {epochs} epochs, {' and '.join(layers)} in turn", total=steps)
        return training.train(
            layers, data, epochs=epochs, batch=batch, advance=lambda count: progress.advance(task, count)
        )


def _print_table(histories: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    base = histories[KERAS].step_ms
    table = Table("batch norm", title_justify="left")
    for heading in ("test accuracy", "ms a step (median)", "speed-up"):
        table.add_column(heading, justify="right")
    for name, history in histories.items():
        accuracy = f"{100 * history.test_accuracy[-1]:.1f} %"
        table.add_row(name, accuracy, *_figures(history.step_ms, base))
    Console().print(table)


def _figures(step_ms: float, base: float) -> tuple[str, str]:
    """Milliseconds and speed-up as text; a dash each where no step was timed (NaN)."""
    return ("-", "-") if math.isnan(step_ms) else (f"{step_ms:.2f}", f"{base / step_ms:.2f}x")


def _draw(picture: Path, histories: Any, data: datasets.Dataset, epochs: int, batch: int) -> None:
    from bnfast.cli import figure

    seen = f"{epochs} epoch{'s' * (epochs > 1)} of {len(data.x_train)} images, {batch} a step"
    figure.save(
        picture,
        histories,
        title=f"One CNN on {data.name}, two batch norms",
        subtitle=f"Same initial weights, same batches: {seen}; {len(data.x_test)} test images.",
    )
