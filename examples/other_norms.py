"""Batch norm against nets without it: self-normalizing (SELU), weight normalization, layer norm, and nothing.

The same deep MLP on the same digits, in the same order of batches, each alternative as its authors want it:

    plain          ReLU, He initialization
    batch norm     Dense without bias, batch norm, ReLU (Ioffe and Szegedy 2015)
    layer norm     Dense, layer norm, ReLU (Ba, Kiros and Hinton 2016)
    weight norm    w = g*v/|v|, initialized from the first batch, ReLU (Salimans and Kingma 2016)
    SELU           LeCun normal initialization, SELU, standardized inputs; AlphaDropout (Klambauer et al. 2017)

    python other_norms.py --steps 300 --batch 64 --rate 0.003 --depth 8

docs/other-norms.md has the results and what they mean.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import common
import keras
import numpy as np
from bnfast.cli.errors import positive_int
from bnfast.keras import BatchNormalization, LayerNormalization, WeightNormalization
from keras import layers

WIDTH = 64
NORMS = ("plain", "batch norm", "layer norm", "weight norm", "SELU")


def hidden(norm: str, dropout: float) -> list[Any]:
    """The layers that replace one hidden Dense layer of a plain net."""
    drop = [layers.Dropout(dropout)] if dropout else []
    if norm == "batch norm":
        return [layers.Dense(WIDTH, use_bias=False), BatchNormalization(momentum=0.9, activation="relu"), *drop]
    if norm == "layer norm":
        return [layers.Dense(WIDTH), LayerNormalization(), layers.ReLU(), *drop]
    if norm == "weight norm":
        return [WeightNormalization(layers.Dense(WIDTH)), layers.ReLU(), *drop]
    if norm == "SELU":
        alpha = [layers.AlphaDropout(dropout)] if dropout else []
        return [layers.Dense(WIDTH, activation="selu", kernel_initializer="lecun_normal"), *alpha]
    return [layers.Dense(WIDTH, activation="relu", kernel_initializer="he_normal"), *drop]


def build(norm: str, depth: int, dropout: float = 0.0, seed: int = 0) -> Any:
    """`depth` hidden layers and a softmax of 10 classes, as logits."""
    keras.utils.set_random_seed(seed)
    stack = [layer for _ in range(depth) for layer in hidden(norm, dropout)]
    return keras.Sequential([keras.Input((64,)), *stack, layers.Dense(10)], name=norm.replace(" ", "_"))


def train(model: Any, data: Any, steps: int, batch: int, rate: float, seed: int = 0) -> tuple[float, float]:
    """The accuracy on the test images, and the seconds per step (without the first, which traces the model)."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss, metrics=["accuracy"])
    rows = np.random.default_rng(seed).integers(0, len(data.y_train), (steps, batch))
    model.train_on_batch(data.x_train[rows[0]], data.y_train[rows[0]])
    started = time.perf_counter()
    flat = rows[1:].ravel()
    model.fit(data.x_train[flat], data.y_train[flat], batch_size=batch, shuffle=False, verbose=0)
    seconds = (time.perf_counter() - started) / max(steps - 1, 1)
    return float(model.evaluate(data.x_test, data.y_test, verbose=0)[1]), seconds


def standardized() -> Any:
    """The digits with mean 0 and variance 1 per pixel, as SELU nets need them; the same for all."""
    data = common.digits(flat=True)
    mean, spread = data.x_train.mean(0), data.x_train.std(0) + 0.1
    return data._replace(x_train=(data.x_train - mean) / spread, x_test=(data.x_test - mean) / spread)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train each net with each seed; print and return the mean test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive_int, default=300)
    parser.add_argument("--batch", type=positive_int, default=64)
    parser.add_argument("--depth", type=positive_int, default=8)
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--dropout", type=float, default=0.0)
    given = parser.parse_args(argv)
    data, means = standardized(), {}
    for norm in NORMS:
        found = [
            train(build(norm, given.depth, given.dropout, seed), data, given.steps, given.batch, given.rate, seed)
            for seed in range(given.seeds)
        ]
        accuracies = [accuracy for accuracy, _ in found]
        means[norm] = float(np.mean(accuracies))
        step = 1000 * np.median([seconds for _, seconds in found])
        spread = f"{100 * min(accuracies):.1f} to {100 * max(accuracies):.1f}"
        print(f"{norm:<12} test accuracy {100 * means[norm]:5.1f} % ({spread}), {step:.2f} ms per step")
    return means


if __name__ == "__main__":
    main()
