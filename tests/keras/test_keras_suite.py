"""Keras's own tests of its layer, from the installed Keras, run with ours in its place.

The module is loaded a second time under another name and its `layers` replaced, so Keras itself is untouched.
"""

import importlib.util
import types
import unittest

import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import keras
from keras.src.layers.normalization import batch_normalization as upstream


def _load() -> types.ModuleType:
    path = upstream.__file__.replace(".py", "_test.py")
    spec = importlib.util.spec_from_file_location("keras_batch_normalization_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = {"BatchNormalization": bnfast.keras.BatchNormalization}
    module.layers = types.SimpleNamespace(**{**vars(module.layers), **ours})
    return module


MODULE = _load()  # holds the TestCase: at this module's top level pytest would collect it
NAMES = unittest.TestLoader().getTestCaseNames(MODULE.BatchNormalizationTest)
pytestmark = [pytest.mark.usefixtures("each_bridge"), pytest.mark.filterwarnings("ignore")]  # Keras's own warnings


@pytest.mark.parametrize("name", NAMES)
def test_upstream(name: str) -> None:
    MODULE.BatchNormalizationTest(name).debug()  # setUp, test, tearDown; a failure is raised


def test_how_many_there_are() -> None:
    """Nothing above fails where nothing is collected; this does."""
    correctness = [name for name in NAMES if name.startswith("test_correctness")]
    assert len(correctness) == 16
    assert {"test_bn_basics", "test_trainable_behavior", "test_masked_broadcast_normalization"} <= set(NAMES)
    if keras.__version__ == "3.15.1":
        assert len(NAMES) == 33
    assert len(NAMES) >= 25
