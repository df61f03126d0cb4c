"""Compatibility with Keras 2 programs and configs: the flag `fused`, and a list as axis."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("tensorflow")
from bnfast.keras import BatchNormalization


@pytest.mark.parametrize("fused", [None, True, False])
def test_fused_round_trip(fused: bool | None) -> None:
    layer = BatchNormalization(axis=[-1], fused=fused, name="bn")
    layer.build((None, 2, 2, 3))
    config = json.loads(json.dumps(layer.get_config()))
    again = BatchNormalization.from_config(config)
    assert (layer.fused, again.fused, again.name) == (fused, fused, "bn")
    assert ("fused" in config) == (fused is not None)


def test_a_config_of_keras_2() -> None:
    config: dict[str, Any] = {"name": "bn", "trainable": True, "dtype": "float32", "axis": [3], "momentum": 0.9}
    config |= {"epsilon": 0.01, "center": True, "scale": True, "fused": False, "virtual_batch_size": 4}
    layer = BatchNormalization.from_config(config)
    assert (layer.fused, layer.axis, layer.momentum, layer.virtual_batch_size) == (False, 3, 0.9, 4)


REFUSED: list[dict[str, Any]] = [
    {"synchronized": True},
    {"renorm": True},
    {"virtual_batch_size": 4},
    {"adjustment": lambda shape: (1.0, 0.0)},
    {"axis": [1, 3]},
    {"axis": 0},
    {"axis": 2},
    {"axis": -2},
    {"axis": 5},
]


@pytest.mark.parametrize("kwargs", REFUSED, ids=lambda kwargs: next(iter(kwargs)))
def test_fused_is_refused_where_keras_2_refuses_it(need: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fused=True"):
        BatchNormalization(fused=True, **kwargs)
    BatchNormalization(fused=False, **kwargs)
    with pytest.raises(ValueError, match="fused"):
        need("tf_keras").layers.BatchNormalization(fused=True, **kwargs)


@pytest.mark.parametrize("shape", [(8, 3), (8, 2, 3), (8, 2, 2, 3), (8, 2, 2, 2, 3), (8, 2, 2, 2, 2, 3)], ids=len)
@pytest.mark.parametrize("axis", [-4, -3, -1, 1, 3, 4])
def test_fused_and_the_shape_as_in_keras_2(need: Callable[[str], Any], axis: int, shape: tuple[int, ...]) -> None:
    def builds(layer: Any) -> bool:
        try:
            layer.build(shape)
        except (ValueError, IndexError):
            return False
        return True

    theirs = need("tf_keras").layers.BatchNormalization(axis=axis, fused=True)
    assert builds(BatchNormalization(axis=axis, fused=True)) == builds(theirs)


def test_the_errors_of_fused() -> None:
    for kwargs in ({"renorm": True}, {"virtual_batch_size": 4}, {"synchronized": True}):
        ((name, value),) = kwargs.items()
        message = f"fused must be None or False with {name}. Received: fused=True, {name}={value}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            BatchNormalization(fused=True, **kwargs)
    with pytest.raises(ValueError, match=r"^axis must be 1 or 3 of inputs of rank 4 .*\. Received: axis=-4$"):
        BatchNormalization(fused=True, axis=-4).build((8, 2, 2, 3))
    with pytest.raises(ValueError, match=r"^inputs must have rank 4 or 5 with fused=True\. Received: rank 2$"):
        BatchNormalization(fused=True).build((8, 3))


def test_fused_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="fused must be True or False"):
        BatchNormalization(fused="yes")
