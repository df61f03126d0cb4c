"""A small model trained with Keras's layer and with ours has the same weights after 20 steps of SGD(1e-3).

float64: to 1e-6 in relative norm. float32: the difference is at most 3 times that between two runs of Keras, one with
all values of a kernel moved by 1 ulp; any change of the summation order gives noise of that size. Biases of layers
before a batch norm are excluded: their true gradient is zero, so they hold only rounding errors.
"""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import BatchNormalization

pytestmark = pytest.mark.usefixtures("each_bridge")

ZERO_GRADIENT = {"conv1/bias", "conv2/bias", "hidden/bias"}
STEPS = 20


def build(kind: Any, dtype: str, fused: bool = False) -> Any:
    """conv, BN, ReLU, conv, BN, ReLU, pool, dense, BN, ReLU, dense. fused: each BN contains its ReLU."""

    def normalized(x: Any, **kwargs: Any) -> Any:
        if fused:
            return kind(dtype=dtype, momentum=0.9, activation="relu", **kwargs)(x)
        return keras.layers.ReLU(dtype=dtype)(kind(dtype=dtype, momentum=0.9, **kwargs)(x))

    inputs = keras.Input((10, 10, 3), dtype=dtype)
    x = keras.layers.Conv2D(8, 3, dtype=dtype, name="conv1")(inputs)
    x = normalized(x, name="bn1")
    x = keras.layers.Conv2D(8, 3, dtype=dtype, name="conv2")(x)
    x = normalized(x, name="bn2", scale=False)
    x = keras.layers.MaxPooling2D(dtype=dtype)(x)
    x = keras.layers.Flatten(dtype=dtype)(x)
    x = keras.layers.Dense(16, dtype=dtype, name="hidden")(x)
    x = normalized(x, name="bn3", epsilon=1e-5)
    model = keras.Model(inputs, keras.layers.Dense(4, dtype=dtype, name="head")(x))
    rng = np.random.default_rng(11)
    weights = [(w.path, w.shape) for w in model.weights]
    model.set_weights([rng.normal(0, 0.2, s) if "kernel" in path else rng.uniform(0.5, 1.5, s) for path, s in weights])
    return model


def train(kind: Any, dtype: str, fused: bool = False, ulp: bool = False) -> dict[str, np.ndarray]:
    model = build(kind, dtype, fused)
    if ulp:
        kernel = model.get_layer("conv1").kernel
        kernel.assign(np.nextafter(np.asarray(kernel), np.inf, dtype=dtype))
    model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(12)
    for _ in range(STEPS):
        x, label = rng.normal(1, 2, (32, 10, 10, 3)).astype(dtype), rng.integers(0, 4, 32)
        model.train_on_batch(x, label)
    weights = {weight.path: np.asarray(weight) for weight in model.weights}
    assert set(weights) >= ZERO_GRADIENT
    return {path: value for path, value in weights.items() if path not in ZERO_GRADIENT}


def relative_differences(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Per weight: the norm of the difference divided by the norm of the wanted weight."""
    assert actual.keys() == wanted.keys()
    return {
        path: float(np.linalg.norm(actual[path].astype(float) - wanted[path]) / np.linalg.norm(wanted[path]))
        for path in wanted
    }


@pytest.mark.parametrize("fused", [False, True])
def test_float64_weights_are_equal(fused: bool) -> None:
    wanted = train(keras.layers.BatchNormalization, "float64")
    differences = relative_differences(train(BatchNormalization, "float64", fused), wanted)
    assert len(differences) == 16
    assert max(differences.values()) <= 1e-6, differences
    assert max(differences.values()) <= 1e-10, differences  # the actual size of float64's rounding errors


def test_float32_differs_at_most_three_times_the_noise() -> None:
    wanted = train(keras.layers.BatchNormalization, "float32")
    noise = relative_differences(train(keras.layers.BatchNormalization, "float32", ulp=True), wanted)
    ours = relative_differences(train(BatchNormalization, "float32"), wanted)
    # without the kernel that `ulp` changes
    kernels = [path for path in wanted if path.endswith("kernel") and path != "conv1/kernel"]
    assert len(kernels) == 3
    norms = [float(np.linalg.norm([d[path] for path in kernels])) for d in (ours, noise)]
    assert 0 < norms[1] < 1e-6
    assert norms[0] <= 3 * norms[1], (ours, noise)


def test_training_changes_the_weights() -> None:
    """Without this, the equalities above would hold for models that never learn."""
    before = {weight.path: np.asarray(weight) for weight in build(BatchNormalization, "float64").weights}
    after = train(BatchNormalization, "float64")
    assert min(relative_differences(after, {path: before[path] for path in after}).values()) > 1e-6


@pytest.fixture
def problem(rng: np.random.Generator) -> tuple[Any, Any]:
    label = rng.integers(0, 4, 256)
    return rng.normal(size=(256, 10, 10, 3)).astype("float32") + 3 * np.eye(4)[label][:, None, None, :3], label


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"jit_compile": "auto"}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model doesn't support `jit_compile=True`")
def test_fit_evaluate_predict(kwargs: dict[str, Any], problem: tuple[Any, Any]) -> None:
    x, label = problem
    model = build(BatchNormalization, "float32", fused=True)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], **kwargs)
    assert model.jit_compile is False
    history = model.fit(x, label, batch_size=32, epochs=3, validation_data=(x, label), verbose=0).history
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    metrics = model.evaluate(x, label, batch_size=60, verbose=0, return_dict=True)  # the last batch is shorter
    assert metrics["accuracy"] > 0.9
    accuracy = (model.predict(x, batch_size=60, verbose=0).argmax(1) == label).mean()
    assert accuracy == pytest.approx(metrics["accuracy"])


def test_mixed_precision_fit_with_loss_scaling(problem: tuple[Any, Any]) -> None:
    x, label = problem
    for policy in ("mixed_float16", "mixed_bfloat16"):
        inputs = keras.Input((10, 10, 3))
        y = keras.layers.Conv2D(8, 3, dtype=policy)(inputs)
        layer = BatchNormalization(dtype=policy, activation="relu")
        y = keras.layers.GlobalAveragePooling2D(dtype=policy)(layer(y))
        model = keras.Model(inputs, keras.layers.Dense(4)(y))
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2))
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        losses = model.fit(x, label, batch_size=32, epochs=4, verbose=0).history["loss"]
        assert losses[-1] < 0.7 * losses[0]
        assert [w.dtype for w in layer.weights] == ["float32"] * 4
        assert all(np.isfinite(w).all() for w in layer.get_weights())
