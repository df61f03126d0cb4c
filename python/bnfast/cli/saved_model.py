"""What `bnfast diagnose` and `bnfast recalibrate` share: their options, the saved model, and the data from files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bnfast.benchmark import quiet
from bnfast.cli.errors import REPORTED, UserError, positive_int, require

Result = TypeVar("Result")

MODEL_ENDINGS = (".keras", ".h5")
TARGETS = ("y", "targets", "labels", "y_train")  # arrays with these names in an .npz are no inputs


def add_arguments(parser: Any) -> None:
    """The options of both commands."""
    parser.add_argument("model", type=Path, help="a saved Keras model: .keras or .h5")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="training data: .npy, or .npz with one array, or with an array for each input of the model",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", help="samples per batch (default: 256 or fewer)"
    )
    parser.add_argument("--batches", type=positive_int, metavar="N", help="use at most N batches (default: all)")


def start() -> None:
    """Imports Keras. Raises UserError if that is impossible."""
    require("tensorflow", "keras", extra="keras")
    quiet.prepare_tensorflow()
    with quiet.quiet_stderr(REPORTED):
        try:
            import bnfast.keras  # noqa: F401  # so that files that name its layers can be loaded
        except (ImportError, RuntimeError) as error:
            raise UserError(error) from error


def load_model(path: Path) -> Any:
    """The model in a file. Raises UserError if there is none."""
    if path.suffix not in MODEL_ENDINGS:
        raise UserError(f"argument model: must be a file that ends with .keras or .h5. Received: {path}")
    if not path.is_file():
        raise UserError(f"argument model: there is no file {path}")
    import keras

    with quiet.quiet_stderr(REPORTED):
        try:
            return keras.saving.load_model(path)
        except Exception as error:  # Keras raises nearly anything
            raise UserError(f"argument model: {path} can't be loaded: {error}") from error


def load_data(option: str, path: Path) -> dict[str, Any]:
    """The arrays of an .npy or .npz file by name; that of an .npy is "x"."""
    if not path.is_file():
        raise UserError(f"argument {option}: there is no file {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"argument {option}: {path} must be an .npy or .npz file of numbers: {error}") from error
    if not found or any(not isinstance(array, np.ndarray) for array in found.values()):
        raise UserError(f"argument {option}: {path} must be an .npy or .npz file with arrays. Received: none")
    return found


def inputs_and_targets(option: str, path: Path, targets: str | None) -> tuple[Any, Any]:
    """The model's inputs in a file, and the targets: in the same file by name, or in a file of their own."""
    found = load_data(option, path)
    y = None
    if targets is not None:
        if targets in found:
            y = found.pop(targets)
        elif Path(targets).suffix in (".npy", ".npz"):
            arrays = load_data("--targets", Path(targets))
            if len(arrays) > 1:
                raise UserError(f"argument --targets: {targets} must hold one array. Received: {', '.join(arrays)}")
            y = next(iter(arrays.values()))
        else:
            raise UserError(
                f"argument --targets: must be an array in {path} ({', '.join(found)}) or a file .npy or .npz. "
                f"Received: {targets}"
            )
    if len(found) > 1:
        known = next((name for name in TARGETS if name in found), None)
        if known is not None:
            given = found.pop(known)
            y = given if y is None else y
    return (next(iter(found.values())) if len(found) == 1 else found), y


def guarded(function: Callable[[], Result]) -> Result:
    """The result of a function of bnfast.keras; its errors are the user's."""
    import tensorflow as tf

    try:
        return function()
    except tf.errors.ResourceExhaustedError as error:
        raise UserError("out of memory: use a smaller --batch-size") from error
    except (ValueError, TypeError, RuntimeError, FloatingPointError, tf.errors.OpError) as error:
        raise UserError(error) from error
