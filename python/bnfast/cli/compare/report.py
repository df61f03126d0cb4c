"""The report of `bnfast run --compare`: one table, and the verdict in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnfast.cli.compare.distance import QUANTITIES, Distance, distances
from bnfast.cli.compare.trainings import Record

OURS, AGAIN, MOVED = "bnfast", "again", "moved"
COLUMNS = {OURS: "bnfast", MOVED: "1 ulp", AGAIN: "again"}
MOST_SHOWN = 4  # trainings in the table
SAME_SIZE = 10.0  # times Keras's own distance: still of its size
CHANCE = 1e-4  # less between two equal runs is rounding, too: threads that add in another order
FORWARD = 16.0  # times epsilon: of the first step's loss and statistics, which come before any update
# Of the weights after one step. A bias before a batch norm has a gradient of 0 but for rounding, and Adam moves it by
# the whole learning rate to one side or the other: 6e-5 in all was seen at a rate of 1e-3.
UPDATE = 1e-2


@dataclass
class Row:
    """One training: its name, steps, Keras's first and last loss, and the distances of each other run by quantity."""

    name: str
    steps: int
    losses: list[float]
    distances: dict[str, dict[str, Distance]] = field(default_factory=dict)

    @property
    def first_step(self) -> float:
        """bnfast's distance in what the first step computes before its update: the loss and the statistics."""
        of_bnfast = self.distances[OURS]
        return max(of_bnfast[name].first or 0.0 for name in ("loss", "moving statistics"))

    def largest(self, run: str) -> float:
        """The distance of the weights after the last step."""
        return self.distances[run]["weights"].last or 0.0


@dataclass
class Report:
    """All trainings that every run has, in order, and what is to be said of them."""

    rows: list[Row]
    steps: int
    moved: bool
    epsilon: float  # of the dtype that the script computes in
    summary: list[str]
    notes: list[str]

    @classmethod
    def of(cls, folder: Path, records: dict[str, Record], *, steps: int) -> Report:
        """Compares the other runs with Keras's."""
        own, *others = records
        rows = []
        for i, training in enumerate(records[own].trainings):
            if all(len(records[run].trainings) > i for run in others):
                row = Row(training.name, training.steps, training.losses)
                for run in others:
                    pair = (folder / own, training), (folder / run, records[run].trainings[i])
                    row.distances[run] = distances(*pair)
                rows.append(row)
        report = cls(rows, steps, records[MOVED].moved, records[own].epsilon, records[OURS].summary, [])
        report.notes = list(report._notes(records))
        return report

    @property
    def worst(self) -> Row:
        """The training in which bnfast's distance is largest beside Keras's own."""
        return max(self.rows, key=lambda row: row.largest(OURS) / (self._own(row) or 1e-30))

    def _own(self, row: Row) -> float:
        return max(row.largest(MOVED), row.largest(AGAIN))

    @property
    def code(self) -> str:
        """What the distances mean: same, rounding, amplified, chance or different."""
        row = self.worst
        ours, first = row.largest(OURS), row.distances[OURS]["weights"].first or 0.0
        if not any(each.largest(OURS) for each in self.rows):
            return "same"
        if row.largest(AGAIN) > max(ours / SAME_SIZE, CHANCE):
            return "chance"
        if ours <= SAME_SIZE * self._own(row):
            return "rounding"
        return "amplified" if row.first_step <= FORWARD * self.epsilon and first <= UPDATE else "different"

    @property
    def verdict(self) -> str:
        """One sentence."""
        row = self.worst
        ours, moved, again = (_number(row.largest(run)) for run in (OURS, MOVED, AGAIN))
        after = f"After {row.steps} step{'s' * (row.steps != 1)}"
        if self.code == "same":
            return f"{after} bnfast's weights are Keras's, bit by bit."
        if self.code == "chance":
            return (
                f"The script isn't reproducible: after {row.steps} steps two runs of Keras alone differ by {again}, "
                f"bnfast and Keras by {ours}. Seeds for all random numbers and data in a fixed order would show more."
            )
        yardstick = f"Keras's own when one weight moves by 1 ulp is {moved}"
        if not self.moved:
            yardstick = "no weight could be moved by 1 ulp"
        meaning = {
            "rounding": "the difference is rounding",
            "amplified": f"in the first step's loss and statistics it was {_number(row.first_step)}, which is "
            "rounding, and training amplified it",
            "different": "that is more than rounding. docs/differences.md has what differs on purpose",
        }[self.code]
        return f"{after} bnfast's distance from Keras is {ours}, {yardstick}: {meaning}."

    def to_dict(self) -> dict[str, Any]:
        """For --json: numbers that aren't finite are null."""
        return {
            "verdict": self.code,
            "sentence": self.verdict,
            "trainings": [
                {
                    "name": row.name,
                    "steps": row.steps,
                    "losses": [_finite(loss) for loss in row.losses],
                    "distances": {
                        run: {
                            quantity.replace(" ", "_"): {"first": _finite(each.first), "last": _finite(each.last)}
                            for quantity, each in found.items()
                        }
                        for run, found in row.distances.items()
                    },
                }
                for row in self.rows
            ],
            "summary": self.summary,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        table = [["", "Keras", *COLUMNS.values()]]
        for row in self.rows[:MOST_SHOWN]:
            table += _lines(row)
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
            for cells in table
        ]
        if len(self.rows) > MOST_SHOWN:
            lines.append(f"... and {len(self.rows) - MOST_SHOWN} more trainings: --json has them")
        head = "Distance from the run with Keras's batch norm: |difference|/|Keras's|"
        return "\n".join([head, "", *(line.rstrip() for line in lines), "", self.verdict, *self.notes])

    def _notes(self, records: dict[str, Record]) -> Any:
        yield from self.summary
        own, ours = records["keras"], records[OURS]
        if own.stopped:
            yield f"The script was stopped {own.stopped}. What it would train later isn't compared."
        if own.error and ours.error:
            yield f"The script then failed, perhaps because its training was cut short: {own.error}"
        elif ours.error:
            yield f"With bnfast the script then failed, with Keras it didn't: {ours.error}"
        elif own.error:
            yield f"With Keras the script then failed, with bnfast it didn't: {own.error}"
        counts = {len(record.trainings) for record in records.values()}
        if len(counts) > 1:
            yield f"The runs differ in their number of trainings: the first {min(counts)} are compared."


def _lines(row: Row) -> list[list[str]]:
    lines = [[row.name, "", "", "", ""]]
    for quantity in QUANTITIES:
        of_runs = [row.distances[run][quantity] for run in COLUMNS]
        for when, step in (("first", 1), ("last", row.steps))[: 1 + (row.steps > 1)]:
            found = [getattr(each, when) for each in of_runs]
            if None not in found:
                own = f"{row.losses[0 if when == 'first' else -1]:.6g}" if quantity == "loss" else ""
                lines.append([f"  {quantity}, step {step}", own, *map(_number, found)])
    return lines


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
