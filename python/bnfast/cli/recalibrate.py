"""`bnfast recalibrate model.keras --data x.npz --out new.keras`: moving statistics computed anew from data."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bnfast.benchmark import quiet
from bnfast.cli import files, saved_model
from bnfast.cli.errors import REPORTED, UserError
from bnfast.cli.output import show


def register(subparsers: Any) -> None:
    """Add `recalibrate` to the command line."""
    parser = subparsers.add_parser("recalibrate", help="compute a Keras model's moving statistics anew from data")
    saved_model.add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new model: .keras or .h5")
    parser.add_argument("--layers", metavar="NAMES", help="batch norms, separated by commas (default: all not frozen)")
    parser.add_argument("--estimator", choices=("population", "average"), default="population")
    parser.add_argument("--sequential", action="store_true", help="layer after layer: exact, one pass per batch norm")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Recalibrate, write the model, print what changed."""
    if arguments.out.suffix not in saved_model.MODEL_ENDINGS:
        raise UserError(f"argument --out: must end with .keras or .h5. Received: {arguments.out}")
    files.prepare("--out", [arguments.out])
    x, _ = saved_model.inputs_and_targets("--data", arguments.data, None)
    saved_model.start()
    model = saved_model.load_model(arguments.model)
    import bnfast.keras

    layers = None if arguments.layers is None else [name.strip() for name in arguments.layers.split(",")]
    with quiet.quiet_stderr(REPORTED):
        found = saved_model.guarded(
            lambda: bnfast.keras.recalibrate(
                model,
                x,
                batches=arguments.batches,
                layers=layers,
                estimator=arguments.estimator,
                sequential=arguments.sequential,
                batch_size=arguments.batch_size,
                verbose=0,
            )
        )
    files.save({arguments.out: _file_of(model, arguments.out.suffix)})
    show(f"{found}\nwrote {arguments.out}")
    return 0


def _file_of(model: Any, suffix: str) -> bytes:
    """The file that holds the model."""
    with tempfile.TemporaryDirectory(prefix="bnfast-") as folder, quiet.quiet_stderr(REPORTED):
        path = Path(folder) / f"model{suffix}"
        try:
            model.save(path)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(f"the model can't be saved: {error}") from error
        return path.read_bytes()
