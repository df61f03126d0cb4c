"""accelerate keeps the compiled state: optimizers with their slots, losses, metrics, a custom train_step."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
from bnfast.keras import report, to_keras
from keras import layers as L
from keras_models import KERAS, data, dense_net, quiet, randomize, residual_net

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True),
    "adam": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 2, 0.5), amsgrad=True),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues(name: str) -> None:
    """Two steps, accelerate, two more steps: the same losses and weights as without accelerate."""
    model = residual_net("float64", OPTIMIZERS[name]())
    for step in range(2):
        model.train_on_batch(*data("float64", step))
    fast = quiet(model)
    assert int(getattr(fast.optimizer, "inner_optimizer", fast.optimizer).iterations) == 2
    assert fast.optimizer is not model.optimizer
    removed = report(fast).removed
    model.reset_metrics()  # otherwise Keras 3.5 returns means that include the first two steps
    for step in (2, 3):
        results = [m.train_on_batch(*data("float64", step), return_dict=True) for m in (model, fast)]
        assert results[0].keys() == results[1].keys() == {"loss", "accuracy"}
        np.testing.assert_allclose(results[1]["loss"], results[0]["loss"], rtol=1e-6)
    found = {weight.path: weight.numpy() for weight in fast.weights}
    for weight in model.weights:
        layer, part = weight.path.split("/")
        np.testing.assert_allclose(
            found[f"{removed.get(layer, layer)}/{part}"], weight, rtol=1e-6, atol=1e-9, err_msg=weight.path
        )


@pytest.mark.skipif("renorm" not in KERAS().get_config(), reason="Keras 3.14 and later")
@pytest.mark.parametrize("inplace", [False, True])
def test_renorm_is_kept_by_accelerate_and_to_keras(inplace: bool) -> None:
    """accelerate, two steps, to_keras, two steps: equal to Keras throughout, with renorm's weights and slots."""
    kwargs = {"renorm": True, "renorm_clipping": {"rmin": 0.7, "rmax": 1.4, "dmax": 0.3}, "renorm_momentum": 0.8}
    model, twin = (residual_net("float64", keras.optimizers.Adam(0.01), **kwargs) for _ in range(2))
    for step in range(5):
        if step == 1:
            model = quiet(model, inplace=inplace)
            assert {row.state.split()[0] for row in report(model).rows} == {"bnfast"}
            assert sum("+" in row.state for row in report(model).rows) == (0 if inplace else 3)
        if step == 3:
            model = to_keras(model, inplace=inplace)
            assert {row.state for row in report(model).rows} == {"keras"}
        results = [m.train_on_batch(*data("float64", step), return_dict=True) for m in (model, twin)]
        np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-6)
    found = {weight.path: weight.numpy() for weight in model.weights}
    assert found.keys() == {weight.path for weight in twin.weights}
    assert "bn1s/renorm_stddev" in found
    for weight in twin.weights:
        np.testing.assert_allclose(found[weight.path], weight, rtol=1e-6, atol=1e-9, err_msg=weight.path)
    for name in ("bn0", "bn1", "bn1s", "bn2"):
        norm = model.get_layer(name)
        assert type(norm) is KERAS
        assert norm.get_config() == twin.get_layer(name).get_config()


def test_slots_follow_the_new_order_of_the_weights(tmp_path: Any) -> None:
    """Fusing may change the order of the weights. The slots follow it, and saved models load correctly."""
    model = residual_net(compiled=keras.optimizers.SGD(0.01, momentum=0.9))
    model.fit(*data(), verbose=0)
    fast = quiet(model)
    assert [v.shape for v in fast.trainable_variables] != [v.shape for v in model.trainable_variables]
    removed = report(fast).removed
    slots = dict(zip([v.path for v in fast.optimizer._trainable_variables], fast.optimizer.momentums, strict=True))
    for weight, slot in zip(model.optimizer._trainable_variables, model.optimizer.momentums, strict=True):
        layer, part = weight.path.split("/")
        np.testing.assert_array_equal(slots[f"{removed.get(layer, layer)}/{part}"], slot)
    fast.save(tmp_path / "fast.keras")
    again = keras.models.load_model(tmp_path / "fast.keras")
    for a, b in zip(again.optimizer.variables, fast.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_excluded_from_weight_decay_stay_excluded() -> None:
    model = dense_net()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[model.get_layer("bn").gamma], var_names=["bias"])
    model.compile(optimizer, "mse")
    fast = quiet(model)
    fast.optimizer.build(fast.trainable_variables)
    kept = [v.path for v in fast.trainable_variables if fast.optimizer._use_weight_decay(v)]
    assert kept == ["dense/kernel", "relu/beta", "head/kernel"]


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
    """A Functional model with a custom train_step."""

    def train_step(self, data: Any) -> Any:
        return {key: 2 * value for key, value in super().train_step(data).items()}


class CustomCompile(keras.Model):
    def compile(self, teacher: Any, **kwargs: Any) -> None:
        super().compile(**kwargs)
        self.teacher = teacher


def test_subclasses_of_functional_models_are_kept() -> None:
    inputs = keras.Input((4,))
    model = randomize(Doubling(inputs, L.Dense(1)(KERAS()(inputs))))
    model.compile("sgd", "mse", jit_compile=True)
    fast = quiet(model)
    assert type(fast) is Doubling
    assert not fast.jit_compile, "XLA has no kernel for our op"
    x = np.random.default_rng(0).normal(size=(8, 4))
    losses = [m.train_on_batch(x, np.ones((8, 1)), return_dict=True)["loss"] for m in (fast, model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_models_with_a_custom_compile_are_not_compiled() -> None:
    inputs = keras.Input((4,))
    model = CustomCompile(inputs, L.Dense(1)(KERAS()(inputs)))
    model.compile("a teacher", optimizer="sgd", loss="mse")
    with pytest.warns(UserWarning, match="CustomCompile has a compile"):
        fast = quiet(model)
    assert not fast.compiled


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
    fast.fit(x, x[:, :3], verbose=0)
