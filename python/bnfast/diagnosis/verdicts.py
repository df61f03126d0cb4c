"""Figures -> verdicts: what is wrong, why we think so, and the cure. Pure functions; nothing here knows a framework.

Each rule below looks for one cause. A cause that explains the gaps of a layer keeps later rules from explaining them
again, so the first verdict is the root. Every threshold was chosen between the planted faults of
tests/helpers/planted_faults.py and its healthy models, on three kinds of networks; the figures are beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .figures import LayerFigures, ModelFigures, between

# A gap that matters, and a distance of the outputs. 36 healthy models have gaps up to 0.08 and distances up to 0.10
# (both the moving statistics of training against 397 samples for test); the rules that need a gap see 0.3 and more,
# with distances from 0.4, in the planted faults.
GAP = 0.15
DISTANCE = 0.15
# The share of the starting values from which training was too short, and how well it must explain the gap. 48 updates
# at momentum 0.99 leave 0.62 (fit 0.97 to 1.00); healthy models show shares up to 0.02 with fits below 0.2.
START_SHARE, START_FIT = 0.03, 0.8
START_LEFT = 0.01  # the share that is small enough
# The optimizer has made so many updates that less than this share of the starting values can be left.
POSSIBLE_SHARE = 0.02
# Outputs with the batch's statistics against those with the data's: 0.03 to 0.17 in healthy models (batches of 50 to
# 256), 0.51 to 0.89 with batches of 2. It falls as 1/sqrt(batch): 0.4 is about a batch of 8 of an MLP.
NOISE = 0.4
# Batch means spread by this factor more than samples at random would: up to 1.1 in healthy models, 3.3 to 6.6 where two
# kinds of batches alternate.
MIXED = 2.0
# Between the calls of a shared layer, as a gap: 0.0 where they see the same, 1 to 3 where pixels are inverted.
SITES = 0.5
# The share of channels in which one sample makes more than half of the variance: at most 0.02 in healthy models (sparse
# ReLU features), 1.0 with an outlier.
OUTLIER = 0.25
FEWEST = 8  # samples
CONSTANT = 0.5  # the share of channels with one value: up to 0.2 in healthy models (pixels always 0), 0.34 to 1.0 dead
SHIFT = 0.5  # gap between two data sets: 0.08 between digits for training and for test, 3.4 with other units
MOMENTUM = 0.5  # weights of the old value below it average over fewer than two batches; that needs half a gap, too
OTHER_MOMENTUM = 0.2  # up to here (PyTorch's 0.1, 0.01) no Keras model means it: a CNN may predict well in spite of it
# One step of training, times the number of batches the moving average remembers, against the gap.
DRIFT = 0.5
EPSILON = 0.8  # the loss with the other epsilon, as a share of the loss with this one


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        code: its name for programs: "too-few-updates" ...
        title: one line.
        layers: the batch norms concerned, the first in the data flow first.
        reasons: the figures that say so, in sentences.
        cure: what to do, in words. code_cure: the same as Python, for a Keras model named `model`.
    """

    code: str
    title: str
    layers: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    cure: str = ""
    code_cure: str = ""


@dataclass
class _Case:
    """The figures, and which layers' gaps have been explained."""

    figures: ModelFigures
    explained: set[str] = field(default_factory=set)
    settled: bool = False  # a cause was found that explains gaps anywhere

    @property
    def open(self) -> list[LayerFigures]:
        """Layers whose gap matters and has no explanation yet."""
        if self.settled or self.figures.distance < _limit(DISTANCE, self.figures.samples):
            return []
        least = _limit(GAP, self.figures.samples)
        return [row for row in self.figures.layers if row.gap >= least and row.name not in self.explained]


def gap_limit(figures: ModelFigures) -> float:
    """From which gap on a layer counts."""
    return _limit(GAP, figures.samples)


def _limit(limit: float, samples: int) -> float:
    """A limit of a gap, raised to twice what statistics of so few samples are off by chance.

    n samples give a mean that is off by 1/sqrt(n) standard deviations, and a standard deviation by 1/sqrt(2n) of
    itself: together sqrt(1.5/n), or 0.06 for 397 samples (0.05 to 0.08 was measured). Fewer than 8 say nothing.
    """
    if samples <= 0:  # unknown
        return limit
    return math.inf if samples < FEWEST else max(limit, 2 * math.sqrt(1.5 / samples))


def judge(figures: ModelFigures) -> list[Verdict]:
    """All verdicts, the root cause first; empty for a healthy model."""
    case = _Case(figures)
    found = []
    for rule in RULES:
        verdict = rule(case)
        if verdict is not None:
            found.append(verdict)
            if verdict.code in SETTLING:
                case.settled = True
            case.explained |= set(verdict.layers)
    return found


# ---- state that can't be right ---------------------------------------------------------------------------------------


def not_finite(case: _Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.infinite_state]
    others = case.figures.infinite_weights
    if not rows and not others:
        return None
    reasons = [f"{row.name}: {', '.join(row.infinite_state)} {_invalid(row)}" for row in rows]
    if others and not rows:
        reasons.append(f"weights with NaN or Inf: {', '.join(others[:5])}")
    return Verdict(
        "not-finite",
        "The state holds NaN or Inf, or a negative variance",
        tuple(row.name for row in rows),
        (*reasons, "One non-finite batch in training is enough: it stays in the moving average for ever."),
        "Load weights from before it happened. If gamma, beta and the other weights are finite, recalibrating is "
        "enough. "
        "To keep it from happening again, bnfast's layer has nan_policy='skip_update'.",
        "bnfast.keras.recalibrate(model, x_train)",
    )


def _invalid(row: LayerFigures) -> str:
    negative = row.infinite_state == ("moving_variance",) and bool(np.isfinite(row.moving_variance).all())
    return "is negative" if negative else "is not finite"


def overflow(case: _Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.infinite_batches]
    if not rows or case.figures.infinite_weights:
        return None
    first = rows[0]
    half = first.dtype in ("float16", "bfloat16")
    seen = f"{first.name} sees NaN or Inf in {first.infinite_batches} batches, though the data is finite."
    limit = "float16 ends at 65,504." if first.dtype == "float16" else f"It computes in {first.dtype}."
    return Verdict(
        "overflow",
        "Mixed precision overflows" if half else "The layers before a batch norm overflow",
        (first.name,),
        (seen, limit),
        "Compute the layer before it in float32 (or bfloat16, which has float32's range), or make its output smaller: "
        "weight decay, a smaller learning rate, scaled inputs.",
        'keras.mixed_precision.set_global_policy("mixed_bfloat16")' if half else "",
    )


# ---- how the model is built ------------------------------------------------------------------------------------------


def wrong_axis(case: _Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if _axis_is_wrong(row)]
    if not rows:
        return None
    reasons = [
        f"{row.name} normalizes axis {row.axis[0]} of inputs of shape {row.shape}"
        + (
            ", the samples' own axis."
            if row.axis[0] == 0
            else f"; the other layers keep channels on axis {row.expected_axis}."
        )
        for row in rows
    ]
    axis = rows[0].expected_axis
    return Verdict(
        "wrong-axis",
        "A batch norm works along the wrong axis",
        tuple(row.name for row in rows),
        tuple(reasons),
        "Give the axis of the channels: -1 with channels_last (Keras's default), 1 with channels_first. Train again.",
        f"keras.layers.BatchNormalization(axis={-1 if axis is None or axis == len(rows[0].shape) - 1 else axis})",
    )


def _axis_is_wrong(row: LayerFigures) -> bool:
    if len(row.axis) != 1:
        return False
    return (row.axis[0] == 0 and len(row.shape) > 1) or (
        row.expected_axis is not None and row.axis[0] != row.expected_axis
    )


def never_trained(case: _Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.seen]
    fresh = rows and all(row.at_start and not row.trained for row in rows) and not case.figures.iterations
    if not fresh or not any(row.gap >= GAP for row in rows):
        return None
    case.settled = True
    return Verdict(
        "never-trained",
        "This model has not been trained",
        tuple(row.name for row in rows),
        ("All batch norms have the values they start with: gamma, beta and the moving statistics.",),
        "Train it, or load its weights. If you have loaded weights, they didn't reach the batch norms.",
        'model.load_weights("model.weights.h5")',
    )


def never_updated(case: _Case) -> Verdict | None:
    if case.settled:
        return None
    least = _limit(GAP, case.figures.samples)
    rows = [row for row in case.figures.layers if row.at_start and (row.gap >= least or _untouched(row))]
    if not rows:
        return None
    never, frozen = [row for row in rows if row.never_training], [row for row in rows if row.frozen]
    reasons = [f"moving_mean and moving_variance of {_list(rows)} are exactly what they start as."]
    if never or frozen:
        case.settled = True  # the layers after it were trained with what it gives them
    if never:
        reasons.append(
            f"The model calls {_list(never)} with training=False, in training too. So it has normalized by mean 0 and "
            "variance 1 all the time: the model learned without it."
        )
        cure = "Let the call pass `training` on, and train again. (Recalibrating alone changes what the model learned.)"
        code = "y = self.norm(x, training=training)  # in call(self, x, training=None)"
    elif frozen:
        reasons.append(f"{_list(frozen)} is frozen, so training doesn't update it.")
        cure = (
            "Load the weights, moving statistics included, before the layers are frozen; or let the batch norms train."
        )
        code = "layer.trainable = True  # then compile again"
    else:
        reasons.append(
            "So a custom training loop calls the model without training=True, or (TensorFlow 1) never ran UPDATE_OPS, "
            "or the weights were loaded without the moving statistics (a list of trainable weights only)."
        )
        cure = (
            "Recalibrate now. In a training loop of your own, call model(x, training=True); save all weights, not the "
            "trainable ones."
        )
        code = "bnfast.keras.recalibrate(model, x_train)\ny = model(x, training=True)  # in the training step"
    return Verdict(
        "never-updated",
        "The moving statistics were never updated",
        tuple(row.name for row in rows),
        tuple(reasons),
        cure,
        code,
    )


def _untouched(row: LayerFigures) -> bool:
    """Whether training was watched and doesn't update it; then nothing else is known of it."""
    return row.never_training and not row.seen


def always_training(case: _Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.always_batch == "training=True"]
    if not rows:
        return None
    return Verdict(
        "always-training",
        "A batch norm is in training mode when the model predicts",
        tuple(row.name for row in rows),
        (
            f"{_list(rows)} gets training=True in inference: what the model predicts for a sample depends on the "
            f"others "
            "in its batch, and predicting changes the moving statistics.",
        ),
        "Let the call pass `training` on. Then recalibrate, and evaluate again.",
        "y = self.norm(x, training=training)  # in call(self, x, training=None)",
    )


def momentum(case: _Case) -> Verdict | None:
    rows = [
        row
        for row in case.figures.layers
        if row.momentum is not None and row.momentum < MOMENTUM and not row.frozen and row.seen
    ]
    if not rows or not any(row.gap >= GAP / 2 or (row.momentum or 0) <= OTHER_MOMENTUM for row in rows):
        return None
    m = rows[0].momentum or 0.0
    return Verdict(
        "momentum",
        "momentum has the meaning of another framework",
        tuple(row.name for row in rows),
        (
            f"momentum={m:g} keeps {m:.0%} of the old value at each update: the moving statistics are little more "
            f"than those "
            "of the last batch. In Keras momentum is the weight of the old value, in PyTorch that of the new one.",
        ),
        f"PyTorch's momentum={m:g} is Keras's {1 - m:g}. Set that, and recalibrate.",
        f"keras.layers.BatchNormalization(momentum={1 - m:g})\nbnfast.keras.recalibrate(model, x_train)",
    )


# ---- what the data does ----------------------------------------------------------------------------------------------


def outlier(case: _Case) -> Verdict | None:
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


def shared(case: _Case) -> Verdict | None:
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


def mixed_batches(case: _Case) -> Verdict | None:
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


def too_few_updates(case: _Case) -> Verdict | None:
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


def small_batches(case: _Case) -> Verdict | None:
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


def frozen_other_data(case: _Case) -> Verdict | None:
    rows = [row for row in case.open if row.frozen]
    if not rows:
        return None
    return Verdict(
        "frozen-other-data",
        "Frozen batch norms have the statistics of other data",
        tuple(row.name for row in rows),
        (
            f"{_list(rows)} {'is' if len(rows) == 1 else 'are'} frozen, and this data is {rows[0].gap:.2g} standard "
            "deviations from the moving statistics.",
        ),
        "Prepare the inputs as for the data it was trained with (scaling, mean, channel order). If the data does "
        "differ, "
        "recalibrate before fine-tuning, or let the batch norms train.",
        f"bnfast.keras.recalibrate(model, x_train, layers={[row.name for row in rows[:4]]!r})",
    )


def epsilon(case: _Case) -> Verdict | None:
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


def drift(case: _Case) -> Verdict | None:
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


def constant_channels(case: _Case) -> Verdict | None:
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


def shifted_data(case: _Case) -> Verdict | None:
    least = _limit(SHIFT, case.figures.other_samples)
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


def stale(case: _Case) -> Verdict | None:
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


def _list(rows: list[LayerFigures]) -> str:
    names = [row.name for row in rows]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


RULES: tuple[Callable[[_Case], Verdict | None], ...] = (
    not_finite,
    overflow,
    wrong_axis,
    never_trained,
    never_updated,
    always_training,
    constant_channels,
    outlier,
    shared,
    mixed_batches,
    momentum,
    small_batches,
    too_few_updates,
    frozen_other_data,
    epsilon,
    drift,
    shifted_data,
    stale,
)

# Verdicts that explain gaps in every layer.
SETTLING = frozenset(
    {"not-finite", "overflow", "wrong-axis", "always-training", "outlier", "shared", "mixed-batches", "momentum"}
    | {"epsilon", "frozen-other-data"}
)
