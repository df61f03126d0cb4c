"""Rules about how the moving statistics came to be: too few updates, small batches, other weights."""

from __future__ import annotations

import math

import numpy as np

from ..figures import LayerFigures
from .case import DRIFT, EPSILON, NOISE, POSSIBLE_SHARE, START_FIT, START_LEFT, START_SHARE, Case, Verdict, listed


def too_few_updates(case: Case) -> Verdict | None:
    rows = [row for row in case.open if _is_short(row, case.figures.iterations)]
    if not rows:
        return None
    worst = max(rows, key=lambda row: row.start_share[0])
    share, m = worst.start_share[0], worst.momentum
    reasons = [f"{share:.0%} of what the moving statistics of {worst.name} started as is still in them."]
    smaller = m is None or m > 0.9
    cure = "Recalibrate. Or train longer" + (", or with a smaller momentum (0.9 needs 44 updates)." if smaller else ".")
    if m is not None and 0 < m < 1:
        done = math.log(min(share, 0.999999)) / math.log(m)
        more = max(1, math.ceil(math.log(START_LEFT / share) / math.log(m)))
        reasons.append(
            f"That is what about {done:.0f} updates at momentum {m:g} leave. {more} more updates would leave "
            f"{START_LEFT:.0%}."
        )
    return Verdict(
        "too-few-updates",
        "Too few updates for this momentum",
        tuple(row.name for row in rows),
        tuple(reasons),
        cure,
        "bnfast.keras.recalibrate(model, x_train)"
        + ("\n# or, when the model is built: BatchNormalization(momentum=0.9)" if smaller else ""),
    )


def _is_short(row: LayerFigures, iterations: int | None) -> bool:
    share, fit = row.start_share
    if row.frozen or row.at_start or share < START_SHARE or share > 1.05 or fit < START_FIT:
        return False
    m = row.momentum
    if iterations and m is not None and m**iterations < POSSIBLE_SHARE:
        return False
    return row.share_agrees


def small_batches(case: Case) -> Verdict | None:
    if case.settled:
        return None
    figures = case.figures
    rows = [row for row in figures.layers if row.seen and not row.frozen and not row.always_batch]
    if not rows or not math.isfinite(figures.batch_distance):
        return None
    few = min(rows, key=lambda row: row.per_batch)
    if figures.batch_distance < NOISE or few.samples > 32 or figures.batches < 2:
        return None
    case.settled = True
    return Verdict(
        "small-batches",
        "The batches are too small",
        tuple(row.name for row in rows),
        (
            f"Batches of {few.samples:.3g} samples give {few.name} {few.per_batch:.4g} values per channel to take a "
            f"mean and "
            f"variance of: the outputs in training mode are {figures.batch_distance:.2g} standard deviations from "
            f"what they "
            "are with the statistics of all data.",
        ),
        "Use larger batches (32 or more), or a norm that needs no batch: group norm or layer norm. In between, renorm "
        "helps: bnfast.keras.BatchNormalization(renorm=True).",
        "keras.layers.GroupNormalization(groups=8)  # in the place of BatchNormalization()",
    )


def frozen_other_data(case: Case) -> Verdict | None:
    rows = [row for row in case.open if row.frozen]
    if not rows:
        return None
    return Verdict(
        "frozen-other-data",
        "Frozen batch norms have the statistics of other data",
        tuple(row.name for row in rows),
        (
            f"{listed(rows)} {'is' if len(rows) == 1 else 'are'} frozen, and this data is {rows[0].gap:.2g} standard "
            "deviations from the moving statistics.",
        ),
        "Prepare the inputs as for the data it was trained with (scaling, mean, channel order). If the data does "
        "differ, "
        "recalibrate before fine-tuning, or let the batch norms train.",
        f"bnfast.keras.recalibrate(model, x_train, layers={[row.name for row in rows[:4]]!r})",
    )


def epsilon(case: Case) -> Verdict | None:
    loss = case.figures.scores.get("moving", {}).get("loss")
    trial = {key: value for key, value in case.figures.epsilon_trial.items() if math.isfinite(value)}
    if case.settled or loss is None or not trial:
        return None
    best = min(trial, key=lambda key: trial[key])
    if trial[best] > EPSILON * loss:
        return None
    rows = [
        row
        for row in case.figures.layers
        if row.usable and row.epsilon != best and np.mean(row.moving_variance < 10 * max(best, row.epsilon)) > 0.25
    ]
    if not rows:
        return None
    return Verdict(
        "epsilon",
        "epsilon is that of another framework",
        tuple(row.name for row in rows),
        (
            f"With epsilon={best:g} the loss is {trial[best]:.4g}, with epsilon={rows[0].epsilon:g} it is {loss:.4g}. "
            f"The "
            f"variances of {rows[0].name} are small (median {np.median(rows[0].moving_variance):.2g}), so epsilon "
            f"matters.",
        ),
        "Set the epsilon that the weights were trained with: 1e-3 in Keras, 1e-5 in PyTorch, ONNX and Caffe.",
        f"keras.layers.BatchNormalization(epsilon={best:g})",
    )


def drift(case: Case) -> Verdict | None:
    made = case.figures.iterations
    rows = [row for row in case.open if row.step is not None and not row.frozen and _lag(row, made) >= DRIFT * row.gap]
    if not rows:
        return None
    worst = max(rows, key=lambda row: row.gap)
    rate = case.figures.learning_rate
    return Verdict(
        "drift",
        "The weights move faster than the moving statistics follow",
        tuple(row.name for row in rows),
        (
            f"One training step moves what {worst.name} sees by {worst.step:.2g} standard deviations, and momentum "
            f"{worst.momentum:g} averages over {_memory(worst):.0f} steps: the moving statistics belong to weights of "
            f"long ago." + (f" The learning rate is {rate:.3g}." if rate is not None else ""),
        ),
        "Lower the learning rate towards the end of training, or the momentum; recalibrate what you have.",
        "bnfast.keras.recalibrate(model, x_train)\n"
        "keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, decay_steps=10_000))",
    )


def _memory(row: LayerFigures) -> float:
    return 1 / (1 - row.momentum) if row.momentum is not None and row.momentum < 1 else math.inf


def _lag(row: LayerFigures, iterations: int | None) -> float:
    """How far behind an average is that follows something moving at a steady pace, since training began."""
    steps = min(_memory(row), iterations) if iterations else _memory(row)
    return (row.step or 0.0) * steps


def stale(case: Case) -> Verdict | None:
    rows = case.open
    if not rows:
        return None
    return Verdict(
        "stale",
        "The moving statistics are those of other weights or other data",
        tuple(row.name for row in rows),
        (
            f"{rows[0].name} has moving statistics {rows[0].gap:.2g} standard deviations from this data. They aren't "
            f"what "
            "training starts with, and no other cause fits.",
        ),
        "Is this the data, prepared as in training? Were weights averaged (SWA, EMA), pruned, quantized or edited "
        "since? "
        "Then recalibrate.",
        "bnfast.keras.recalibrate(model, x_train)",
    )
