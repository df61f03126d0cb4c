"""`bnfast diagnose model.keras --data x.npz`: why a saved model trains well and predicts badly."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bnfast.benchmark import quiet
from bnfast.cli import files, saved_model
from bnfast.cli.errors import REPORTED, UserError, require
from bnfast.cli.output import show

PICTURES = (".png", ".svg", ".pdf")


def register(subparsers: Any) -> None:
    """Add `diagnose` to the command line."""
    parser = subparsers.add_parser("diagnose", help="say why a Keras model's training and prediction differ")
    saved_model.add_arguments(parser)
    parser.add_argument(
        "--targets", metavar="NAME", help="the targets: an array in --data, or a file (default: y, if it is in --data)"
    )
    parser.add_argument("--data2", type=Path, metavar="FILE", help="other data to compare with: test, production")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Diagnose, write the picture, print."""
    if arguments.plot is not None:
        require("matplotlib", extra="demo")
        if arguments.plot.suffix not in PICTURES:
            raise UserError(f"argument --plot: must end with .png, .svg or .pdf. Received: {arguments.plot}")
        files.prepare("--plot", [arguments.plot])
    x, y = saved_model.inputs_and_targets("--data", arguments.data, arguments.targets)
    other = None
    if arguments.data2 is not None:
        x2, y2 = saved_model.inputs_and_targets("--data2", arguments.data2, None)
        other = (x2,) if y2 is None else (x2, y2)
    saved_model.start()
    model = saved_model.load_model(arguments.model)
    import bnfast.keras

    with quiet.quiet_stderr(REPORTED):
        found = saved_model.guarded(
            lambda: bnfast.keras.diagnose(
                model, x, y, data2=other, batch_size=arguments.batch_size, batches=arguments.batches
            )
        )
    if arguments.plot is not None:
        kind = arguments.plot.suffix[1:]
        files.save({arguments.plot: files.picture(lambda file: found.plot(file, format=kind))})
    show(json.dumps(found.to_dict(), indent=2) if arguments.json else str(found))
    return 0
