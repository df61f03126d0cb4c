"""accelerate keeps the compiled state: optimizers with their slots, losses, metrics, a custom train_step."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import report, to_keras
from keras import layers as L
from keras_models import KERAS, data, dense_net, fused, quiet, randomize, residual_net

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5), amsgrad=True),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


def assert_equal_weights(model: Any, wanted: Any) -> None:
    """Weights and slots, in order."""
    for a, b in zip(model.weights, wanted.weights, strict=True):
        assert a.path == b.path
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=a.path)
    for a, b in zip(model.optimizer.variables, wanted.optimizer.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9, err_msg=a.path)


@pytest.mark.sample(len(OPTIMIZERS))
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues(name: str, inplace: bool) -> None:
    """Two steps, accelerate, two steps, to_keras, a step: losses, weights and slots as without accelerate."""
    model, twin = (residual_net("float64", OPTIMIZERS[name]()) for _ in range(2))
    for index in range(5):
        if index == 2:
            original, model = model, quiet(model, inplace=inplace)
            assert (model is original) == (model.optimizer is original.optimizer) == inplace
            assert inplace or {row.state for row in report(original).rows} == {"keras"}
            assert_equal_weights(model, twin)
            twin.reset_metrics()  # otherwise Keras 3.5 returns means that include the first two steps
            model.reset_metrics()
        if index == 4:
            assert sorted(fused(model)) == ["", "add + relu", "add + relu", "relu"]
            model = to_keras(model, inplace=inplace)
            twin.reset_metrics()
            model.reset_metrics()
        results = [m.train_on_batch(*data("float64", index), return_dict=True) for m in (model, twin)]
        assert results[0].keys() == results[1].keys() == {"loss", "accuracy"}
        np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-6)
    assert_equal_weights(model, twin)


@pytest.mark.skipif("renorm" not in KERAS().get_config(), reason="Keras 3.14 and later")
@pytest.mark.parametrize("inplace", [False, True])
def test_renorm_is_kept_by_accelerate_and_to_keras(inplace: bool) -> None:
    """accelerate, two steps, to_keras, two steps: equal to Keras throughout, with renorm's weights and slots."""
    kwargs = {"renorm": True, "renorm_clipping": {"rmin": 0.7, "rmax": 1.4, "dmax": 0.3}, "renorm_momentum": 0.8}
    model, twin = (residual_net("float64", keras.optimizers.Adam(0.01), **kwargs) for _ in range(2))
    for index in range(5):
        if index == 1:
            model = quiet(model, inplace=inplace)
            assert {row.state for row in report(model).rows} == {"bnfast"}
        if index == 3:
            assert sorted(fused(model)) == ["", "add + relu", "add + relu", "relu"]
            model = to_keras(model, inplace=inplace)
            assert {row.state for row in report(model).rows} == {"keras"}
        results = [m.train_on_batch(*data("float64", index), return_dict=True) for m in (model, twin)]
        np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-6)
    assert_equal_weights(model, twin)
    assert "bn1s/renorm_stddev" in [weight.path for weight in model.weights]
    for name in ("bn0", "bn1", "bn1s", "bn2"):
        assert type(model.get_layer(name)) is KERAS
        assert model.get_layer(name).get_config() == twin.get_layer(name).get_config()


def test_weights_excluded_from_weight_decay_stay_excluded() -> None:
    model = dense_net()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[model.get_layer("bn").gamma], var_names=["bias"])
    model.compile(optimizer, "mse")
    fast = quiet(model)
    fast.optimizer.build(fast.trainable_variables)
    kept = [v.path for v in fast.trainable_variables if fast.optimizer._use_weight_decay(v)]
    assert kept == ["dense/kernel", "bn/beta", "head/kernel"]


def test_losses_and_metrics_of_many_outputs() -> None:
    inputs = keras.Input((4,))
    x = L.ReLU(name="relu")(KERAS()(inputs))
    model = randomize(keras.Model(inputs, {"a": L.Dense(1, name="a")(x), "b": L.Dense(1, name="b")(x)}))
    metric = keras.metrics.MeanSquaredError(name="error")
    model.compile(
        "adam",
        {"a": "mse", "b": lambda y, p: keras.ops.mean(abs(y - p))},
        metrics={"a": [metric]},
        loss_weights={"a": 2.0, "b": 1.0},
    )
    fast = quiet(model)
    x, y = np.ones((8, 4)), {"a": np.ones((8, 1)), "b": np.zeros((8, 1))}
    wanted, found = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (model, fast))
    assert found.keys() == wanted.keys()
    assert all(abs(found[name] - wanted[name]) < 1e-5 for name in wanted)
    fast.evaluate(x, y, verbose=0)
    assert float(metric.result()) == pytest.approx(wanted["a_error"], rel=1e-5), "not shared with the copy"


class Doubling(keras.Model):
    """A Functional model with a custom train_step and a custom compile."""

    def compile(self, teacher: Any, **kwargs: Any) -> None:
        super().compile(**kwargs)
        self.teacher = teacher

    def train_step(self, data: Any) -> Any:
        return {key: 2 * value for key, value in super().train_step(data).items()}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_custom_train_step_compile_and_jit_compile(inplace: bool) -> None:
    def make() -> Any:
        inputs = keras.Input((4,))
        model = randomize(Doubling(inputs, L.Dense(1)(L.ReLU()(KERAS()(L.Dense(4)(inputs))))))
        model.compile("a teacher", optimizer="sgd", loss="mse", jit_compile=True)
        return model

    model, twin = make(), make()
    x = np.random.default_rng(0).normal(size=(8, 4))
    model.predict(x, verbose=0)
    fast = quiet(model, inplace=inplace)
    assert (type(fast), fast.teacher, fast.compiled) == (Doubling, "a teacher", True)
    assert not fast.jit_compile, "XLA has no kernel for our op"
    losses = [m.train_on_batch(x, np.ones((8, 1)), return_dict=True)["loss"] for m in (fast, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    back = to_keras(fast, inplace=inplace)
    assert all(layer.supports_jit for layer in back.layers)
    back.compile("a teacher", optimizer="sgd", loss="mse", jit_compile=True)
    assert back.jit_compile
    losses = [m.train_on_batch(x, np.ones((8, 1)), return_dict=True)["loss"] for m in (back, twin)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_mixed_precision_keeps_the_loss_scale() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = dense_net()
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(8, 4))
    model.fit(x, x[:, :3], verbose=0)
    model.optimizer.dynamic_scale.assign(1024.0)
    fast = quiet(model)
    assert float(fast.optimizer.dynamic_scale) == 1024
    assert int(fast.optimizer.inner_optimizer.iterations) == 1
    for old, new in zip(model.optimizer.variables, fast.optimizer.variables, strict=True):
        np.testing.assert_array_equal(old, new)
    losses = [m.fit(x, x[:, :3], epochs=2, verbose=0).history["loss"] for m in (fast, model)]
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert fused(fast) == ["relu"]
