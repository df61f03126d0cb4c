"""The training of `bnfast demo`: one CNN per batch norm layer, with the same seed and the same batches.

The trainings take turns, one step each, and the order is reversed after every step, so that other load on the machine
affects all of them equally. A step time is that of `train_on_batch`, from the NumPy batch to the loss. XLA is off in
all trainings: it can't compile bnfast's layer, and the rest of the model must run the same operations in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bnfast.cli.datasets import Dataset

SEED = 7
RECORDED_LAYER = "norm_2"  # its moving statistics are recorded after every step
UNTIMED_STEPS = 5  # the first step traces the graph (about a second); the others warm up allocator and thread pool


@dataclass
class History:
    """The record of one training: one value per step, but one per epoch for test_accuracy."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moving_mean: list[npt.NDArray[Any]] = field(default_factory=list)
    moving_variance: list[npt.NDArray[Any]] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)

    @property
    def timed_seconds(self) -> list[float]:
        """The step times without the first UNTIMED_STEPS."""
        return self.seconds[UNTIMED_STEPS:]

    @property
    def step_ms(self) -> float:
        """The median of the timed steps in milliseconds; NaN if there are none."""
        return 1e3 * float(np.median(self.timed_seconds)) if self.timed_seconds else float("nan")


def build_model(batch_norm: type, image_shape: tuple[int, ...]) -> Any:
    """A CNN with three convolutions, each followed by `batch_norm` and ReLU; about 30 000 weights."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(SEED)
    model = keras.Sequential([layers.Input(image_shape)])
    for index, filters in enumerate((32, 32, 64), start=1):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv_{index}"))
        model.add(batch_norm(momentum=0.9, name=f"norm_{index}"))
        model.add(layers.ReLU(name=f"relu_{index}"))
        if index > 1:
            model.add(layers.MaxPooling2D(name=f"pool_{index}"))
    model.add(layers.GlobalAveragePooling2D(name="average"))
    model.add(layers.Dense(10, name="logits"))
    model.compile(
        optimizer=keras.optimizers.Adam(2e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def train(
    batch_norms: Mapping[str, type],
    data: Dataset,
    *,
    epochs: int,
    batch: int,
    advance: Callable[[int], object] = lambda steps: None,
) -> dict[str, History]:
    """Train one model for each of `batch_norms`, in turns. `advance(n)` is called after n more steps of each model."""
    models = {name: build_model(layer, data.image_shape) for name, layer in batch_norms.items()}
    histories = {name: History() for name in models}
    turns = list(models)
    shuffle = np.random.default_rng(SEED)
    for _ in range(epochs):
        order = shuffle.permutation(len(data.x_train))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            x, y = data.x_train[chosen], data.y_train[chosen]
            for name in turns:
                _step(models[name], x, y, histories[name])
            turns.reverse()
            advance(1)
        for name, model in models.items():
            _, accuracy = model.evaluate(data.x_test, data.y_test, batch_size=256, verbose=0)
            histories[name].test_accuracy.append(float(accuracy))
    return histories


def _step(model: Any, x: npt.NDArray[Any], y: npt.NDArray[Any], history: History) -> None:
    before = time.perf_counter()
    loss, _ = model.train_on_batch(x, y)
    history.seconds.append(time.perf_counter() - before)
    layer = model.get_layer(RECORDED_LAYER)
    history.loss.append(float(loss))
    history.moving_mean.append(layer.moving_mean.value.numpy())
    history.moving_variance.append(layer.moving_variance.value.numpy())
