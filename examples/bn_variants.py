"""The options of batch norm: regularizers, constraints, initializers, epsilon, momentum, and activations.

All options are those of Keras's layer, except `activation=`: relu, relu6 and leaky_relu are fused into the
normalization; any other activation is applied after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import keras
from bnfast.keras import BatchNormalization
from keras import constraints, initializers, regularizers

VARIANTS: dict[str, dict[str, Any]] = {
    "regularizers": {"gamma_regularizer": regularizers.L2(1e-4), "beta_regularizer": regularizers.L1(1e-5)},
    "constraints": {"gamma_constraint": constraints.NonNeg(), "beta_constraint": constraints.MaxNorm(2.0)},
    "initializers": {"gamma_initializer": initializers.Constant(0.5), "beta_initializer": initializers.Constant(0.1)},
    "pytorch_defaults": {
        "epsilon": 1e-5,
        "momentum": 0.9,
    },  # PyTorch calls it momentum 0.1: the weight of the new value
    "large_epsilon": {"epsilon": 0.1},
    "no_gamma": {"scale": False, "activation": "relu"},  # the next Dense layer can scale instead
    "no_beta": {"center": False, "activation": "leaky_relu"},
    "relu6": {"activation": "relu6"},
    "leaky_relu": {"activation": "leaky_relu"},
    "silu": {"activation": "silu"},
}


def build_model(name: str) -> keras.Model:
    """A model with one hidden layer of 128 units and the batch norm of that variant."""
    keras.utils.set_random_seed(0)
    options = {"momentum": 0.9, "activation": "relu"} | VARIANTS[name]
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, use_bias=False),
            BatchNormalization(**options),
            keras.layers.Dense(10),
        ],
        name=name,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train every variant and return its test accuracy by name."""
    steps = common.parse_steps(__doc__, argv)
    data = common.digits(flat=True)
    return {name: common.fit(build_model(name), data, steps) for name in VARIANTS}


if __name__ == "__main__":
    main()
