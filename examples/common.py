"""Code shared by the examples: the images, the batches, the command line, and Keras's compile and fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from bnfast.cli.datasets import Dataset, load
from bnfast.cli.errors import positive_int

BATCH = 64
STEPS = 220  # 10 epochs: 1437 training images give 22 batches of 64


def parse_steps(description: str | None, argv: Sequence[str] | None) -> int:
    """Read `--steps N` from the command line."""
    parser = argparse.ArgumentParser(description=description)
    help_text = f"training steps, with {BATCH} images each (default: {STEPS})"
    parser.add_argument("--steps", type=positive_int, default=STEPS, help=help_text)
    return int(parser.parse_args(argv).steps)


def digits(*, flat: bool = False) -> Dataset:
    """scikit-learn's handwritten digits: images of shape (8, 8, 1), or with `flat` rows of 64 values for an MLP."""
    data = load("digits")
    if not flat:
        return data
    return data._replace(x_train=data.x_train.reshape(-1, 64), x_test=data.x_test.reshape(-1, 64))


def batches(data: Dataset, steps: int) -> Iterator[tuple[Any, Any]]:
    """`steps` random batches of the training images. No image is repeated within a pass over the data."""
    shuffle = np.random.default_rng(0)
    order = np.empty(0, int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = shuffle.permutation(len(data.x_train))
        chosen, order = order[:BATCH], order[BATCH:]
        yield data.x_train[chosen], data.y_train[chosen]


def fit(model: Any, data: Dataset, steps: int) -> float:
    """Train a Keras classifier whose outputs are logits; print and return its accuracy on the test images."""
    import keras

    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(batches(data, steps), steps_per_epoch=steps, shuffle=False, verbose=0)
    _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=256, verbose=0)
    print(f"{model.name}: mean loss {history.history['loss'][-1]:.3f}, test accuracy {100 * accuracy:.1f} %")
    return float(accuracy)
