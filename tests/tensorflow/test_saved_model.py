"""SavedModels with bnfast's ops are loaded after `import bnfast.keras` alone; exports hold none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")
import keras
import tensorflow as tf
from bnfast.keras import accelerate
from keras import layers as L

LOAD = """
import bnfast.keras
import numpy, tensorflow
from tensorflow.python.eager import context
assert not context.context()._initialized  # devices can still be configured
model = tensorflow.saved_model.load("saved")
numpy.save("gradient.npy", model.step(tensorflow.constant(numpy.load("x.npy"))))
"""


class Training(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [keras.Input((8,)), L.Dense(4), L.BatchNormalization(), L.ReLU()]
        self.model = accelerate(keras.Sequential(layers), verbose=False, bridge="op")

    @tf.function(input_signature=[tf.TensorSpec([None, 8])])
    def step(self, x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(self.model(x, training=True)))
        return tape.gradient(loss, self.model.trainable_variables[0].value)


def test_a_training_signature_loads_with_bnfast_alone(tmp_path: Path) -> None:
    module = Training()
    x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    wanted = module.step(tf.constant(x))
    tf.saved_model.save(module, tmp_path / "saved")
    np.save(tmp_path / "x.npy", x)
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "gradient.npy"), wanted, rtol=1e-6, atol=1e-7)


def test_export_holds_only_inference(tmp_path: Path) -> None:
    module = Training()
    module.step(tf.zeros([2, 8]))
    module.model.export(tmp_path / "exported", verbose=False)
    graph = tf.saved_model.load(tmp_path / "exported").signatures["serving_default"].graph
    assert not [op.type for op in graph.get_operations() if "Bnfast" in op.type or "PyFunc" in op.type]
