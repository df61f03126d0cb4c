"""`diagnose(model, data)`: why a model trains well and predicts badly."""

from __future__ import annotations

import logging
from typing import Any

from ....diagnosis.figures import ModelFigures
from ....diagnosis.report import Diagnosis
from ....diagnosis.verdicts import judge
from ....diagnosis.verdicts.case import GAP
from ..copy import duplicate
from ..norms import check_model
from .collect import Collector
from .drift import drift
from .probe import Probe
from .source import Source

_logger = logging.getLogger("bnfast")


def diagnose(
    model: Any,
    data: Any,
    targets: Any = None,
    *,
    data2: Any = None,
    batch_size: int | None = None,
    batches: int | None = None,
) -> Diagnosis:
    """Say why training and prediction differ, layer by layer, and how to cure it. The model stays as it is, to the bit.

    Batch norm uses the statistics of the batch in training, and moving averages of them in prediction. Where the two
    differ, a model with a training accuracy of 99 % may predict at random. This function runs `data` through the model
    both ways, compares each batch norm's moving statistics with those of the data, and names the cause.

        x, y = ...                                     # training data
        print(bnfast.keras.diagnose(model, x, y))

    For each batch norm the result has (mean, variance of all data, normalized by batches in the layers before):

        mean off         (moving_mean - mean)/sqrt(variance + epsilon), root mean square of the channels
        variance         log2 of (moving_variance + epsilon)/(variance + epsilon), the median channel
        gap              sqrt(mean(shift^2 + ln(sqrt(ratio))^2)): both together, in standard deviations of its output
        values           values per channel in a batch
        start left       the share of the starting values that is still in the moving statistics, where that explains
                         the gap
        effect           how far the outputs move if this batch norm alone uses its moving statistics
        notes            frozen, never trained, constant channels, variances below epsilon, gammas near 0, NaN or Inf

    The verdicts: not-finite, overflow, wrong-axis, never-trained, never-updated, always-training, constant-channels,
    outlier, shared, mixed-batches, momentum, small-batches, too-few-updates, frozen-other-data, epsilon, drift,
    shifted-data, stale; docs/not-working.md explains each. A model without any is healthy.

    It takes one pass over the data, a quarter of one twice (at least 128 samples), one batch for each batch norm with a
    gap, and one pass over data2. If a gap has no other explanation and there are targets, a copy of the model is
    trained for two steps.

    Args:
        model: a built keras.Model (TensorFlow backend) with batch norms of Keras or bnfast, compiled or not.
        data: training data: an array; a list or dict of arrays; a tuple (inputs, targets, sample_weights); a
            tf.data.Dataset, PyDataset, generator or any iterable of batches.
        targets: of arrays. Without targets the outputs are compared instead of loss and metrics. For a compiled model
            the loss and the metrics are those of compile; otherwise accuracy, for class numbers.
        data2: other data of the same form, to be compared with data: that for test, or from production.
        batch_size: where data is arrays: the batch size of training. None: 256, or fewer if a batch had more than
            8 MiB. To find out whether batches are too small, give this one, or a dataset of such batches.
        batches: use at most so many batches of data, and of data2.

    Returns:
        A Diagnosis: print it; `verdicts`, `healthy`, `figures`, `first_gap`, `to_dict()`, `plot("x.png")`.

    Raises:
        TypeError, ValueError: an argument is wrong, the model isn't built or has no batch norm, the data is empty, its
            inputs hold NaN or Inf, or a mask varies along the channel axis of a batch norm.
        RuntimeError: Keras runs on another backend than TensorFlow; or an RNN's cell calls a batch norm in its own
            tf.function, so that the RNN's extra call for the shape of the output can't be told from its steps.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import diagnose
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        >>> x = np.random.default_rng(0).normal(5, 2, (1000, 3)).astype("float32")
        >>> diagnose(model, x).verdicts[0].code
        'never-trained'
    """
    check_model(model)
    source = Source(model, data, targets, batch_size=batch_size, batches=batches)
    other = None if data2 is None else Source(model, data2, batch_size=batch_size, batches=batches, name="data2")
    if not Probe(model).taps:
        raise ValueError(f"model {model.name} has no batch norm")
    collector = Collector(model, source, other)
    figures = collector.collect()
    if _unexplained(figures) and model.compiled and model.optimizer is not None:
        _try_drift(model, figures, collector)
    return Diagnosis.of(figures)


def _unexplained(figures: ModelFigures) -> bool:
    """Whether there is a gap in a layer that trains, and no cause for it yet."""
    codes = {verdict.code for verdict in judge(figures)}
    return "stale" in codes and any(row.gap >= GAP and not row.frozen for row in figures.layers)


def _try_drift(model: Any, figures: ModelFigures, collector: Collector) -> None:
    if any(data.targets is None for data in collector.kept[:2]):
        figures.notes.append("Whether the weights drift is unknown: that needs targets.")
        return
    try:
        drift(duplicate(model), figures, collector.kept)
        figures.passes += 6 * sum(map(len, collector.kept[:2])) / max(figures.samples, 1)
    except Exception as error:
        figures.notes.append(f"Whether the weights drift is unknown: a copy of the model can't be trained: {error}")
