"""Keras's own tests of its layers, from the installed Keras, run with ours in their place.

The modules are loaded a second time under other names and their `layers` replaced, so Keras itself is untouched.
"""

import importlib.util
import types
import unittest
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")
import bnfast.keras
import keras
from keras.src.layers.normalization import batch_normalization as upstream

KINDS = {"batch": "BatchNormalization", "layer": "LayerNormalization", "group": "GroupNormalization"}


def _load(kind: str) -> types.ModuleType:
    path = Path(upstream.__file__).with_name(f"{kind}_normalization_test.py")
    spec = importlib.util.spec_from_file_location(f"keras_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = {name: getattr(bnfast.keras, name) for name in KINDS.values()}
    module.layers = types.SimpleNamespace(**{**vars(module.layers), **ours})
    return module


# Modules hold the TestCases: at this module's top level pytest would collect them.
CASES = {kind: (_load(kind), name + "Test") for kind, name in KINDS.items()}
NAMES = {
    kind: list(unittest.TestLoader().getTestCaseNames(getattr(module, name))) for kind, (module, name) in CASES.items()
}
pytestmark = pytest.mark.filterwarnings("ignore")  # Keras's own warnings


def run(kind: str, name: str) -> None:
    module, case = CASES[kind]
    getattr(module, case)(name).debug()  # setUp, test, tearDown; a failure is raised


@pytest.mark.usefixtures("each_bridge")
@pytest.mark.parametrize("name", NAMES["batch"])
def test_upstream(name: str) -> None:
    run("batch", name)


@pytest.mark.parametrize("small_too", [False, True], ids=["as it is", "kernels"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("layer", "group") for name in NAMES[kind]])
def test_upstream_of_the_relatives(kind: str, name: str, small_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras's tensors are small; with no lower limit they train on the kernels all the same."""
    if small_too:
        monkeypatch.setattr("bnfast.tensorflow.group_norm.SMALL_BYTES", 0)
    run(kind, name)


def test_how_many_there_are() -> None:
    """Nothing above fails where nothing is collected; this does."""
    correctness = [name for name in NAMES["batch"] if name.startswith("test_correctness")]
    assert len(correctness) == 16
    assert {"test_bn_basics", "test_trainable_behavior", "test_masked_broadcast_normalization"} <= set(NAMES["batch"])
    assert {"test_ln_basics", "test_unsorted_axis"} <= set(NAMES["layer"])
    assert {"test_groupnorm", "test_broadcasting_2d_channels_first"} <= set(NAMES["group"])
    if keras.__version__ == "3.15.1":
        assert {kind: len(names) for kind, names in NAMES.items()} == {"batch": 33, "layer": 7, "group": 12}
    assert len(NAMES["batch"]) >= 25
