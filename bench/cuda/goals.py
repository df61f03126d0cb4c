"""The goals of the CUDA kernels, met or not met, from what measure.py wrote. Reads JSON, needs no GPU.

    python bench/cuda/goals.py results.json

cp(X) is the time of a device copy of X bytes in the same run; its traffic is 2X. The goals were reasoned before
anything was measured, for H100 and H200. A goal's line names the rows that are furthest from it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ON_CHIP, KEPT, SMALL = 26e6, 45e6, 1 << 20  # bytes
CHANNEL = 8 * 195e3  # a channel that a cluster of blocks can keep

Row = dict[str, Any]


class Line(NamedTuple):
    goal: str
    worst: float  # measured over allowed; at most 1 is met
    where: str
    rows: int

    def __str__(self) -> str:
        if not self.rows:
            return f"{'not measured':<13}{'':>8}  {self.goal}"
        verdict = "met" if self.worst <= 1 else "NOT MET"
        return f"{verdict:<13}{self.worst:>7.2f}x  {self.goal}  [{self.rows} rows; {self.where}]"


def kept_whole(row: Row) -> bool:
    """Whether x can stay on chip, or each of its channels in a cluster."""
    per_channel = row["bytes"] / row["C"]
    return row["bytes"] <= ON_CHIP or (row["layout"] == "channels_first" and per_channel <= CHANNEL)


def allowed_train(row: Row) -> float:
    copy, X = row["copy"]["us"], row["bytes"]
    return 1.15 * copy + 5 if kept_whole(row) else (3 - min(1, KEPT / X)) / 1.8 * copy


def allowed_grad(row: Row) -> float:
    copy, X = row["copy"]["us"], row["bytes"]
    whole = kept_whole(row) and (row["layout"] == "channels_first" or 2 * X <= ON_CHIP)
    return 1.73 * copy + 6 if whole else (5 - min(2, KEPT / X)) / 1.8 * copy


def worst(goal: str, rows: list[Row], allowed: Callable[[Row], float]) -> Line:
    found = [(row["bnfast"]["us"] / allowed(row), name_of(row)) for row in rows]
    ratio, where = max(found, default=(math.nan, ""))
    return Line(goal, ratio, where, len(found))


def name_of(row: Row) -> str:
    return f"({row['N']}, {row['C']}, {row['height']}, {row['height']}) {row['dtype']} {row['layout']}"


def peers(rows: list[Row], suffix: str = "") -> list[tuple[float, str]]:
    """The better peer's time of train + grad over ours, one per tensor."""
    found = []
    for row in rows:
        if row["kind"] != "train" + suffix:
            continue
        back = next(each for each in rows if name_of(each) == name_of(row) and each["kind"] == "grad" + suffix)
        best = min(row[peer]["us"] + back[peer]["us"] for peer in ("cudnn", "aten"))
        found.append((best / (row["bnfast"]["us"] + back["bnfast"]["us"]), name_of(row)))
    return found


def against_peers(rows: list[Row]) -> Iterator[Line]:
    for layout in ("channels_last", "channels_first"):
        found = peers([row for row in rows if row["layout"] == layout])
        ratios = [ratio for ratio, _ in found]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
        least = min(found, default=(math.nan, ""))
        yield Line(f"train + grad, {layout}: geometric mean >= 1.3x the better of cuDNN and ATen", 1.3 / mean,
                   f"{mean:.2f}x", len(found))  # fmt: skip
        yield Line(f"train + grad, {layout}: no tensor below 0.95x", 0.95 / least[0], least[1], len(found))
    found = peers(rows, "+relu")
    mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found)) if found else math.nan
    yield Line("train + grad with Add + ReLU: geometric mean >= 1.6x", 1.6 / mean, f"{mean:.2f}x", len(found))


def lines(facts: dict[str, Any]) -> list[Line]:
    """Every goal's line."""
    rows: list[Row] = facts["rows"]
    large = [row for row in rows if row["bytes"] > SMALL]

    def of(kind: str, those: list[Row]) -> list[Row]:
        return [row for row in those if row["kind"] == kind]

    small = [row for row in rows if row["bytes"] <= SMALL]
    host = facts["host_us"]
    return [
        worst("train, kept on chip: 1.15 cp + 5 us", [r for r in of("train", large) if kept_whole(r)], allowed_train),
        worst(
            "train, larger: (3 - min(1, 45 MB/X))/1.8 cp",
            [r for r in of("train", large) if not kept_whole(r)],
            allowed_train,
        ),
        worst("grad: 1.73 cp + 6 us, or (5 - min(2, 45 MB/X))/1.8 cp", of("grad", large), allowed_grad),
        worst("infer: 1.05 cp + 2 us", of("infer", large), lambda row: 1.05 * row["copy"]["us"] + 2),
        worst("train up to 1 MB: 9 us", of("train", small), lambda row: 9.0),
        worst("grad up to 1 MB: 10 us", of("grad", small), lambda row: 10.0),
        *(Line(f"host time of {kind}: 12 us per call", us / 12, f"{us:.1f} us", 1) for kind, us in host.items()),
        *against_peers(rows),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    facts = json.loads(parser.parse_args().results.read_text())
    print(f"{facts['card']}, {facts['sms']} SMs, torch {facts['torch']}, CUDA {facts['cuda']}")
    print(*lines(facts), sep="\n")
    return 0  # a goal that isn't met is a result, not an error


if __name__ == "__main__":
    raise SystemExit(main())
