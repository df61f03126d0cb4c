"""A training call takes five Python frames from the Keras layer to TensorFlow's op, and seven to numpy_function."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorflow")
import bnfast
import tensorflow as tf
from bnfast.keras import BatchNormalization
from bnfast.tensorflow import op

HOME = Path(bnfast.__file__).parent
BEFORE = ["batch_norm.call", "step.step", "record.train_step", "record.run"]
FRAMES = {
    "op": [*BEFORE, "op.train_step"],
    "numpy_function": [
        *BEFORE,
        "numpy_callback.train_step",
        "custom_gradient.custom_gradient",
        "numpy_callback.forward",
    ],
}


def package_frames() -> list[str]:
    """The name, file.function, of every stack frame whose code is in the package, outermost first."""
    found = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(HOME):
            found.append(f"{path.stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return found[::-1]


def test_the_frames_of_a_training_call(each_bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = (op._load().ops, "bnfast_train") if each_bridge == "op" else (tf, "numpy_function")
    original, seen = getattr(owner, name), []

    def recorder(*args: Any, **kwargs: Any) -> Any:
        seen.append(package_frames())
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorder)
    layer = BatchNormalization()
    layer.build((None, 4))
    tf.function(lambda x: layer(x, training=True)).get_concrete_function(tf.TensorSpec([None, 4]))
    assert seen == [FRAMES[each_bridge]]
