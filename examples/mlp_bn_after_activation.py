"""An MLP with batch norm after the activation: Dense with ReLU, then batch norm, so that each layer hands on values of
mean 0 and variance 1. gamma and beta then belong to the next layer's input, and the Dense layer keeps its bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import keras
from bnfast.keras import BatchNormalization


def build_model() -> keras.Model:
    """Two hidden layers of 128."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            BatchNormalization(momentum=0.9),
            keras.layers.Dense(128, activation="relu"),
            BatchNormalization(momentum=0.9),
            keras.layers.Dense(10),
        ],
        name="mlp_bn_after_activation",
    )


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the test accuracy."""
    steps = common.parse_steps(__doc__, argv)
    return common.fit(build_model(), common.digits(flat=True), steps)


if __name__ == "__main__":
    main()
