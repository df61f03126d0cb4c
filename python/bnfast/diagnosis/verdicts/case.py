"""A verdict, the case that rules judge, and the thresholds.

Every threshold was chosen between the planted faults of tests/helpers/planted_faults.py and its healthy models, on
three kinds of networks; the figures are beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..figures import LayerFigures, ModelFigures

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
class Case:
    """The figures, and which layers' gaps have been explained."""

    figures: ModelFigures
    explained: set[str] = field(default_factory=set)
    settled: bool = False  # a cause was found that explains gaps anywhere

    @property
    def open(self) -> list[LayerFigures]:
        """Layers whose gap matters and has no explanation yet."""
        if self.settled or self.figures.distance < limit(DISTANCE, self.figures.samples):
            return []
        least = limit(GAP, self.figures.samples)
        return [row for row in self.figures.layers if row.gap >= least and row.name not in self.explained]


def gap_limit(figures: ModelFigures) -> float:
    """From which gap on a layer counts."""
    return limit(GAP, figures.samples)


def limit(least: float, samples: int) -> float:
    """A limit of a gap, raised to twice what statistics of so few samples are off by chance.

    n samples give a mean that is off by 1/sqrt(n) standard deviations, and a standard deviation by 1/sqrt(2n) of
    itself: together sqrt(1.5/n), or 0.06 for 397 samples (0.05 to 0.08 was measured). Fewer than 8 say nothing.
    """
    if samples <= 0:  # unknown
        return least
    return math.inf if samples < FEWEST else max(least, 2 * math.sqrt(1.5 / samples))


def listed(rows: list[LayerFigures]) -> str:
    names = [row.name for row in rows]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
