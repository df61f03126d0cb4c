"""A Sequential CNN with batch norm in two usual places: after a convolution, and after a pooling layer.

After the pooling there are a quarter as many values, so the batch norm takes a quarter of the time; the values have
also passed ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

import common
import keras
from bnfast.keras import BatchNormalization
from keras import layers


def build_model() -> keras.Model:
    """Two convolutions, and one batch norm in each place."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            BatchNormalization(momentum=0.9),  # after the convolution, before the activation
            layers.ReLU(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            BatchNormalization(momentum=0.9),  # after the pooling
            layers.Flatten(),
            layers.Dense(10),
        ],
        name="cnn_sequential",
    )


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the test accuracy."""
    steps = common.parse_steps(__doc__, argv)
    return common.fit(build_model(), common.digits(), steps)


if __name__ == "__main__":
    main()
