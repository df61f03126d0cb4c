"""What a script trained, step by step, and the files that carry it from the process of the script to `bnfast run`.

A training is one call of fit, all train_on_batch calls of one model, or all steps of one optimizer in a loop of the
script's own. Its weights are kept after the first and after the last step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Values = dict[str, Any]  # array by the name of the variable

FILE = "trainings.json"
FIRST, LAST = "first", "last"


@dataclass
class Training:
    """One training of the script. `losses` has one entry per step that reported one."""

    name: str
    number: int
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # FIRST, LAST

    def keep(self, folder: Path, when: str, weights: Iterable[Any], moving: Iterable[Any]) -> None:
        """Writes the values of variables of Keras."""
        values = {
            f"{kind}/{i:05d}/{getattr(variable, 'path', '')}": _array(variable)
            for kind, variables in (("weights", weights), ("moving", moving))
            for i, variable in enumerate(variables)
        }
        np.savez(_path(folder, self.number, when), **values)
        self.kept.append(when)


@dataclass
class Record:
    """All trainings of one run of the script, and how the run ended."""

    trainings: list[Training] = field(default_factory=list)
    keras: bool = False  # the script imported Keras
    legacy: str | None = None  # that it used tf_keras, which is Keras 2
    batch_norms: int = 0  # made by the script
    error: str | None = None  # the exception that ended the script
    stopped: str | None = None  # why bnfast ended the script
    moved: bool = False  # a weight was moved by 1 ulp
    epsilon: float = 2.0**-23  # of the dtype that the script computes in
    summary: list[str] = field(default_factory=list)  # of the run with bnfast
    untouched: bool = False  # bnfast replaced nothing

    def write(self, folder: Path) -> None:
        """All but the values, which `Training.keep` has written."""
        (folder / FILE).write_text(json.dumps(asdict(self)))


def read(folder: Path) -> Record | None:
    """What a run wrote; None if it ended before."""
    try:
        found = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return None
    return Record(**{**found, "trainings": [Training(**each) for each in found["trainings"]]})


def values(folder: Path, training: Training, when: str, kind: str) -> Values:
    """The values of the "weights" or "moving" statistics."""
    with np.load(_path(folder, training.number, when)) as file:
        return {name: file[name] for name in file.files if name.startswith(kind)}


def moving_statistics(variables: Sequence[Any]) -> list[Any]:
    """Those of batch norms, by the names that Keras's layer and bnfast's give them."""
    return [each for each in variables if each.name.startswith(("moving_", "renorm_"))]


def _path(folder: Path, number: int, when: str) -> Path:
    return folder / f"{number}-{when}.npz"


def _array(variable: Any) -> Any:
    import keras

    array = keras.ops.convert_to_numpy(variable)
    return array.astype("float32") if array.dtype.itemsize < 4 else array.copy()  # npz files have no bfloat16
