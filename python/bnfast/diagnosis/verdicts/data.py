"""Rules about what the data does to the statistics."""

from __future__ import annotations

import numpy as np

from ..figures import LayerFigures, between
from .case import CONSTANT, FEWEST, GAP, MIXED, OUTLIER, SHIFT, SITES, Case, Verdict, limit


def outlier(case: Case) -> Verdict | None:
    for row in case.figures.layers:
        if row.top_share is None or row.top_row is None or len(row.top_share) < 2:
            continue
        live = row.top_share[~row.constant] if row.seen else row.top_share
        if live.size and float(np.mean(live > 0.5)) > OUTLIER and row.count / max(row.per_batch, 1) * row.samples >= 16:
            strong = int(np.sum(row.top_share > 0.5))
            where = f"sample {row.top_row} of the data" if isinstance(row.top_row, int) else row.top_row
            index = row.top_row if isinstance(row.top_row, int) else 0
            return Verdict(
                "outlier",
                "One sample makes most of the variance",
                (row.name,),
                (
                    f"In {strong} of {len(row.top_share)} channels of {row.name}, {where} makes "
                    f"{float(np.max(row.top_share)):.0%} of the variance. Everything else is squeezed together.",
                ),
                "Look at that sample: a wrong unit, a missing value stored as a large number, a division by 0? Repair "
                "or "
                "remove it, then recalibrate, or train again if it was there in training.",
                f"print(x[{index}])\nbnfast.keras.recalibrate(model, np.delete(x, {index}, axis=0))",
            )
    return None


def shared(case: Case) -> Verdict | None:
    rows = []
    for row in case.figures.layers:
        if len(row.sites) > 1 and row.seen and not row.frozen:
            farthest = max(between(a, b, row.epsilon) for a in row.sites for b in row.sites)
            if farthest >= SITES:
                rows.append((row, farthest))
    if not rows:
        return None
    first, farthest = rows[0]
    return Verdict(
        "shared",
        "A shared batch norm sees two distributions",
        tuple(row.name for row, _ in rows),
        (
            f"{first.name} is called {len(first.sites)} times per step, and its inputs differ by {farthest:.2g} "
            f"standard "
            "deviations. Training normalizes each call by itself, inference both by one mixture of the two.",
        ),
        "Share the layers before it, but give each input a batch norm of its own; or put both inputs into one batch "
        "(concatenate them along axis 0, call once, split).",
        "y = tower(keras.ops.concatenate([a, b], axis=0))\nya, yb = keras.ops.split(y, 2, axis=0)",
    )


def mixed_batches(case: Case) -> Verdict | None:
    if case.settled or any(len(row.sites) > 1 for row in case.figures.layers):
        return None
    rows = [row for row in case.figures.layers if _spread(row) >= MIXED]
    if not rows:
        return None
    return Verdict(
        "mixed-batches",
        "Batches come from different distributions",
        tuple(row.name for row in rows),
        (
            f"The means of {rows[0].batches} batches in {rows[0].name} spread {_spread(rows[0]):.3g} times as much as "
            f"those "
            "of batches drawn at random could. Training normalizes each kind of batch by itself, inference all by the "
            "average of both.",
        ),
        "Shuffle the data. Where the kinds are meant (real and generated images of a GAN, two domains), put both in "
        "every "
        "batch, or give each kind batch norms of its own.",
        "dataset = dataset.unbatch().shuffle(10_000).batch(64)",
    )


def _spread(row: LayerFigures) -> float:
    """How many times more batch means spread than means of samples drawn at random."""
    if not row.seen or row.batches < 4 or row.between is None or row.variance is None or row.samples < 8:
        return 0.0
    live = ~row.constant
    if not live.any():
        return 0.0
    spread = row.samples * row.between[live] * row.batches / (row.batches - 1) / (row.variance[live] + 1e-30)
    return float(np.median(spread))


def constant_channels(case: Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.seen and np.mean(row.constant) >= CONSTANT]
    if case.settled or not rows or 0 < case.figures.samples < FEWEST:
        return None
    case.settled = True
    row = rows[0]
    return Verdict(
        "constant-channels",
        "Channels are constant: they carry no information",
        tuple(row.name for row in rows),
        (
            f"{int(np.sum(row.constant))} of {len(row.constant)} channels of {row.name} have one value for all "
            f"samples. Batch "
            "norm makes beta of them, whatever the input.",
        ),
        "The layers before it are dead (ReLUs that are never positive, often after a learning rate that was too high) "
        "or "
        "the features are constant. Train again with a smaller learning rate, or batch norm before the activation, or "
        "leave such features out.",
        "x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))",
    )


def shifted_data(case: Case) -> Verdict | None:
    least = limit(SHIFT, case.figures.other_samples)
    rows = [
        row
        for row in case.figures.layers
        if row.other is not None and row.usable and between(row.other, (row.mean, row.variance), row.epsilon) >= least  # type: ignore[arg-type]
    ]
    if not rows:
        return None
    row = rows[0]
    far = between(row.other, (row.mean, row.variance), row.epsilon)  # type: ignore[arg-type]
    return Verdict(
        "shifted-data",
        "data2 has another distribution",
        tuple(row.name for row in rows),
        (
            f"In {row.name} data2 is {far:.2g} standard deviations from data, whose statistics the model "
            f"{'has' if row.gap < GAP else 'should have'}.",
        ),
        "Prepare both alike: the same scaling, colour order, resizing. If the new data is meant to differ and has no "
        "labels, recalibrating on it is the simplest domain adaptation.",
        "bnfast.keras.recalibrate(model, data2)",
    )
