"""A CNN in Keras's functional style: convolution, batch norm and ReLU, with a residual block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import keras
from bnfast.keras import BatchNormalization
from keras import layers


def conv_bn(x: Any, filters: int, activation: str | None) -> Any:
    """A 3x3 convolution and batch norm, with the activation fused into it."""
    x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
    return BatchNormalization(momentum=0.9, activation=activation)(x)


def build_model() -> keras.Model:
    """A stem, one residual block, one more convolution, and global average pooling."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 1))
    x = conv_bn(images, 32, "relu")
    shortcut = x
    x = conv_bn(x, 32, "relu")
    x = conv_bn(x, 32, None)
    x = layers.ReLU()(layers.Add()([x, shortcut]))
    x = layers.MaxPooling2D()(x)
    x = conv_bn(x, 64, "relu")
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(10)(x), name="cnn_functional")


def main(argv: Sequence[str] | None = None) -> float:
    """Train and return the test accuracy."""
    steps = common.parse_steps(__doc__, argv)
    return common.fit(build_model(), common.digits(), steps)


if __name__ == "__main__":
    main()
