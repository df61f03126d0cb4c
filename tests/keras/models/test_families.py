"""accelerate and to_keras on every keras.applications family: predictions, weights, names, reports."""

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import families
from bnfast.keras import accelerate, report, to_keras

STATES = r"bnfast( \+ add)?( \+ (relu|relu6))?"


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

    rows = report(fast).rows
    assert all(re.fullmatch(STATES, row.state) and row.bridge for row in rows)
    assert all(row.reason for row in rows if row.state == "bnfast")
    names = {layer.name for layer in fast.layers}
    assert {layer.name for layer in model.layers} == names | set(report(fast).removed)
    assert fast.output_names == model.output_names

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
