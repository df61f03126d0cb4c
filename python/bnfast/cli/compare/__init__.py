"""`bnfast run --compare SCRIPT`: how far training with bnfast is from training with Keras's own batch norm.

The script runs four times, each time in a process of its own, for a few steps: with Keras's layer, with bnfast's, with
Keras's again, and with Keras's while one weight is moved by 1 ulp. The last two are the yardstick: training amplifies
any rounding error, and what the script leaves to chance differs in any two runs. All runs start with the same seeds,
and in a fresh copy of the working directory.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bnfast import _child_process
from bnfast.cli.compare import folder, trainings
from bnfast.cli.compare.report import AGAIN, MOVED, OURS, Report
from bnfast.cli.errors import UserError
from bnfast.cli.output import say, show

KERAS = "keras"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {  # what each run says of itself, and its task
    KERAS: ("Keras", {"bnfast": False, "move": False}),
    OURS: ("bnfast", {"bnfast": True, "move": False}),
    AGAIN: ("Keras again", {"bnfast": False, "move": False}),
    MOVED: ("Keras, one weight moved by 1 ulp", {"bnfast": False, "move": True}),
}


def run(command: list[str], *, module: bool, steps: int, in_place: bool, as_json: bool, quiet: bool) -> int:
    """Run the script, print the report, return the exit status."""
    here = _working_directory()
    if not module and not Path(command[0]).exists():
        raise UserError(f"run: can't open {command[0]}: No such file or directory")
    if not in_place:
        folder.check(here)
    where = "in the working directory" if in_place else "each time in a copy of the working directory"
    if not quiet:
        say(f"bnfast: running {command[0]} {len(RUNS)} times for {steps} steps, {where}")
    with tempfile.TemporaryDirectory(prefix="bnfast-compare-") as results:
        records = {}
        for number, (name, (title, task)) in enumerate(RUNS.items(), 1):
            if not quiet:
                say(f"bnfast: {number}/{len(RUNS)} {title}")
            there = Path(results) / name
            there.mkdir()
            task = {**task, "command": command, "module": module, "steps": steps, "folder": str(there)}
            records[name] = _run_once(task, title, here, in_place)
            _check(records[name], command[0], name)
        report = Report.of(Path(results), records, steps=steps)
    show(json.dumps({"script": command[0], **report.to_dict()}, indent=2) if as_json else str(report))
    return 0


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise UserError("run: the working directory was deleted") from error


def _run_once(task: dict[str, Any], title: str, here: Path, in_place: bool) -> trainings.Record:
    with contextlib.nullcontext(here) if in_place else folder.copy(here) as there:
        command = list(task["command"])
        if not task["module"]:
            command[0] = folder.moved(command[0], here, there)
        task = {**task, "command": command, "safe_path": bool(sys.flags.safe_path)}
        done = _child_process.run_module(
            "bnfast.cli.compare.child",
            json.dumps(task),
            folder=str(there),
            environment={"PYTHONHASHSEED": "0"},  # sets of strings have one order
        )
    record = trainings.read(Path(task["folder"]))
    if record is None:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        raise UserError(f"run --compare: with {title} the process died (status {done.returncode}): {last}")
    return record


def _check(record: trainings.Record, name: str, run: str) -> None:
    """Raises UserError if there is nothing to compare with this run."""
    title = RUNS[run][0]
    if record.legacy is not None:
        raise UserError(f"run --compare: {record.legacy}: there is nothing to compare")
    if not record.keras and record.error is None:
        raise UserError(f"run --compare: {name} didn't import Keras: there is nothing to compare")
    if run == OURS and record.untouched:
        raise UserError(f"run --compare: {record.summary[0]}: there is nothing to compare")
    if not record.trainings:
        if record.error is not None:
            raise UserError(f"run --compare: with {title} {name} failed before it trained: {record.error}")
        raise UserError(
            f"run --compare: {name} took no training step that can be seen: fit, train_on_batch, or a step of one of "
            "Keras's optimizers. There is nothing to compare"
        )
    if not record.batch_norms:
        raise UserError(f"run --compare: {name} made no batch norm: there is nothing to compare")
