"""accelerate and to_keras on every keras.applications family: predictions, a step, weights, names, reports."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import families
import tensorflow as tf
from bnfast.keras import accelerate, report, to_keras

STEPS = {"", "add", "relu", "relu6", "add + relu", "silu", "hard_silu"}
FUSED = {"DenseNet121": 121, "MobileNet": 27, "MobileNetV2": 45, "ResNet50": 49}  # batch norms with an operation


def marked(name: str) -> Any:
    return (
        name if name in families.EVERY_RUN else pytest.param(name, marks=(pytest.mark.families, pytest.mark.sample(5)))
    )


@pytest.mark.parametrize("name", [marked(name) for name in families.FAMILIES])
def test_accelerate_and_to_keras(name: str) -> None:
    model = families.build(name)
    x = families.batch(model)
    wanted, weights = model(x).numpy(), model.get_weights()
    fast = accelerate(model, strict=True, verbose=False)
    np.testing.assert_allclose(fast(x), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())

    names = [layer.name for layer in model.layers]
    assert [layer.name for layer in fast.layers] == names
    tf.function(fast).get_concrete_function(tf.TensorSpec((2, *x.shape[1:])), training=True)
    rows = report(fast).rows
    assert {(row.state, row.bridge) for row in rows} == {("bnfast", "op")}
    assert {row.fused for row in rows} <= STEPS
    fused = sum(bool(row.fused) for row in rows)
    assert fused == FUSED.get(name, fused)

    restored = to_keras(fast)
    assert [(type(layer), layer.name) for layer in restored.layers] == [(type(n), n.name) for n in model.layers]
    assert [weight.path for weight in restored.weights] == [weight.path for weight in model.weights]
    for copied in (restored, model):
        assert all(np.array_equal(a, b) for a, b in zip(copied.get_weights(), weights, strict=True))
    np.testing.assert_array_equal(restored(x), wanted)


@pytest.mark.families
@pytest.mark.parametrize("name", families.WITHOUT_BATCH_NORM)
def test_a_family_without_batch_norm(name: str) -> None:
    with pytest.raises(ValueError, match="has no batch norm"):
        accelerate(families.build(name))
