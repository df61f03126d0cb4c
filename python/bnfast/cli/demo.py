"""`bnfast demo`: trains the same CNN on real images twice, with Keras's batch norm and with bnfast's.

Prints a table and writes a picture. Both trainings start from the same weights and see the same batches in the same
order. demo_training.py says how the steps are timed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from bnfast.benchmark import quiet
from bnfast.cli import datasets, files
from bnfast.cli.errors import REPORTED, UserError, positive_int, require
from bnfast.cli.output import show, show_table
from bnfast.cli.progress import progress_bar

FILE_NAME = "bnfast-demo.png"
KERAS, OURS = "Keras", "bnfast"
EPOCHS = {"digits": 12}  # 1 for the others, which have 35 to 42 times as many images
BATCH = 64


def register(subparsers: Any) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser("demo", help="train a small CNN with Keras's batch norm and with bnfast's")
    parser.add_argument(
        "--data",
        choices=datasets.NAMES,
        default="digits",
        help="images to train on (default: digits, part of scikit-learn); the others are downloaded once",
    )
    parser.add_argument("--epochs", type=positive_int, help="passes over the images (default: 12 for digits, else 1)")
    parser.add_argument("--batch", type=positive_int, default=BATCH, help=f"images per step (default: {BATCH})")
    parser.add_argument(
        "--out", type=Path, default=Path(FILE_NAME), help=f"a .png file or a folder (default: {FILE_NAME})"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, print the table, write the picture."""
    require("tensorflow", "keras", "rich", "matplotlib", extra="demo")
    if arguments.data == "digits":
        require("sklearn", extra="demo")
    picture = _picture_path(arguments.out)
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr(REPORTED):
        layers = layer_classes()
    data = datasets.load(arguments.data)
    if arguments.batch > len(data.x_train):
        raise UserError(
            f"argument --batch: {data.name} has {len(data.x_train)} training images. Received: {arguments.batch}"
        )
    epochs = arguments.epochs or EPOCHS.get(data.name, 1)
    histories = _train(layers, data, epochs, arguments.batch)
    _draw(picture, histories, data, epochs, arguments.batch)  # first: stdout may be a pipe that nobody reads any more
    _print_table(histories)
    show(f"wrote {picture}")
    return 0


def layer_classes() -> dict[str, type]:
    """The two batch norm layers by their name in the table. Raises UserError if they can't be imported."""
    try:
        import keras

        import bnfast.keras
        from bnfast.tensorflow import op
    except ImportError as error:
        raise UserError(f'TensorFlow or Keras could not be imported ({error}): pip install "bnfast[demo]"') from error
    if keras.backend.backend() != "tensorflow":
        raise UserError(f"the demo needs Keras's TensorFlow backend. Keras runs on {keras.backend.backend()}")
    try:
        op.choose("auto")
    except (ValueError, RuntimeError) as error:  # BNFAST_BRIDGE is wrong, or asks for an op that can't be used
        raise UserError(error) from error
    return {KERAS: keras.layers.BatchNormalization, OURS: bnfast.keras.BatchNormalization}


def _picture_path(out: Path) -> Path:
    """The path of the picture. Raises UserError if it can't be written: now, not after the training."""
    if out.suffix and not out.is_dir():
        path = out
        if path.suffix.lower() != ".png":
            raise UserError(f"argument --out: must be a .png file or a folder. Received: {out}")
    else:
        path = out / FILE_NAME
    files.prepare("--out", [path])
    return path


def _train(layers: dict[str, type], data: datasets.Dataset, epochs: int, batch: int) -> Any:
    from bnfast.cli import demo_training

    with quiet.quiet_stderr(REPORTED), progress_bar() as progress:  # TensorFlow logs once more when it first runs
        steps = epochs * (len(data.x_train) // batch)
        task = progress.add_task(f"{data.name}, {epochs} epochs, {' and '.join(layers)} in turn", total=steps)
        return demo_training.train(
            layers, data, epochs=epochs, batch=batch, advance=lambda count: progress.advance(task, count)
        )


def _print_table(histories: Any) -> None:
    from rich.table import Table

    base = histories[KERAS].step_ms
    table = Table("batch norm", title_justify="left")
    for heading in ("test accuracy", "ms per step (median)", "speed-up"):
        table.add_column(heading, justify="right")
    for name, history in histories.items():
        accuracy = f"{100 * history.test_accuracy[-1]:.1f} %"
        table.add_row(name, accuracy, *_figures(history.step_ms, base))
    show_table(table)


def _figures(step_ms: float, base: float) -> tuple[str, str]:
    """Milliseconds and speed-up as text; dashes if no step was timed (NaN)."""
    return ("-", "-") if math.isnan(step_ms) else (f"{step_ms:.2f}", f"{base / step_ms:.2f}x")


def _draw(picture: Path, histories: Any, data: datasets.Dataset, epochs: int, batch: int) -> None:
    from bnfast.cli import demo_figure

    plural = "s" if epochs > 1 else ""
    amount = f"{epochs} epoch{plural} of {len(data.x_train)} images, {batch} per step"
    content = files.picture(
        demo_figure.save,
        histories,
        title=f"One CNN on {data.name}, two batch norms",
        subtitle=f"Same initial weights, same batches: {amount}; {len(data.x_test)} test images.",
    )
    files.save({picture: content})
