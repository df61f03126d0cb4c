"""An MLP with batch norm after the activation: Dense with ReLU, then batch norm.

Each layer passes on values with mean beta and standard deviation gamma. The Dense layer needs its bias, since the
activation lies between it and beta.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import keras
from bnfast.keras import BatchNormalization


def build_model() -> keras.Model:
    """Two hidden layers of 128 units."""
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
