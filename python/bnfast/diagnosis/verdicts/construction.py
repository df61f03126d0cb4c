"""Rules about the state of a model and how it is built."""

from __future__ import annotations

import numpy as np

from ..figures import LayerFigures
from .case import GAP, MOMENTUM, OTHER_MOMENTUM, Case, Verdict, limit, listed


def not_finite(case: Case) -> Verdict | None:
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


def overflow(case: Case) -> Verdict | None:
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


def wrong_axis(case: Case) -> Verdict | None:
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


def never_trained(case: Case) -> Verdict | None:
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


def never_updated(case: Case) -> Verdict | None:
    if case.settled:
        return None
    least = limit(GAP, case.figures.samples)
    rows = [row for row in case.figures.layers if row.at_start and (row.gap >= least or _untouched(row))]
    if not rows:
        return None
    never, frozen = [row for row in rows if row.never_training], [row for row in rows if row.frozen]
    reasons = [f"moving_mean and moving_variance of {listed(rows)} are exactly what they start as."]
    if never or frozen:
        case.settled = True  # the layers after it were trained with what it gives them
    if never:
        reasons.append(
            f"The model calls {listed(never)} with training=False, in training too. So it has normalized by mean 0 and "
            "variance 1 all the time: the model learned without it."
        )
        cure = "Let the call pass `training` on, and train again. (Recalibrating alone changes what the model learned.)"
        code = "y = self.norm(x, training=training)  # in call(self, x, training=None)"
    elif frozen:
        reasons.append(f"{listed(frozen)} is frozen, so training doesn't update it.")
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


def always_training(case: Case) -> Verdict | None:
    rows = [row for row in case.figures.layers if row.always_batch == "training=True"]
    if not rows:
        return None
    return Verdict(
        "always-training",
        "A batch norm is in training mode when the model predicts",
        tuple(row.name for row in rows),
        (
            f"{listed(rows)} gets training=True in inference: what the model predicts for a sample depends on the "
            f"others "
            "in its batch, and predicting changes the moving statistics.",
        ),
        "Let the call pass `training` on. Then recalibrate, and evaluate again.",
        "y = self.norm(x, training=training)  # in call(self, x, training=None)",
    )


def momentum(case: Case) -> Verdict | None:
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
