"""Compatibility with Keras 2 programs and configs: the flag `fused`, and a list as axis."""

import json
from typing import Any

import pytest

pytest.importorskip("tensorflow")
from bnfast.keras import BatchNormalization


@pytest.mark.parametrize("fused", [None, True, False])
def test_fused_round_trip(fused: bool | None) -> None:
    layer = BatchNormalization(axis=[-1], fused=fused, name="bn")
    config = json.loads(json.dumps(layer.get_config()))
    again = BatchNormalization.from_config(config)
    assert (layer.fused, again.fused, again.name) == (fused, fused, "bn")
    assert ("fused" in config) == (fused is not None)


def test_a_config_of_keras_2() -> None:
    config: dict[str, Any] = {"name": "bn", "trainable": True, "dtype": "float32", "axis": [3], "momentum": 0.9}
    config |= {"epsilon": 0.01, "center": True, "scale": True, "fused": True, "virtual_batch_size": 4}
    layer = BatchNormalization.from_config(config)
    assert (layer.fused, layer.axis, layer.momentum, layer.virtual_batch_size) == (True, 3, 0.9, 4)


def test_fused_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="fused must be True or False"):
        BatchNormalization(fused="yes")
