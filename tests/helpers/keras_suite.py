"""The installed Keras's own tests of its normalization layers, to be run on our layers, on Keras's backend.

Each test module is loaded a second time under another name, and its `layers` is replaced. Keras itself is not changed.
"""

import importlib.util
import types
import unittest
from pathlib import Path

import bnfast.keras
import pytest
from keras.src.layers.normalization import batch_normalization as upstream

KINDS = {"batch": "BatchNormalization", "layer": "LayerNormalization", "group": "GroupNormalization"}
# Lower bounds, because Keras adds tests. Keras 3.15.1 has 33, 7 and 12.
AT_LEAST = {"batch": 25, "layer": 5, "group": 8}


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


# (module, name): pytest would collect the TestCase classes themselves at this module's top level.
CASES = {kind: (_load(kind), name + "Test") for kind, name in KINDS.items()}
NAMES = {
    kind: list(unittest.TestLoader().getTestCaseNames(getattr(module, name))) for kind, (module, name) in CASES.items()
}


def run(kind: str, name: str) -> None:
    module, case = CASES[kind]
    try:
        getattr(module, case)(name).debug()  # runs setUp, the test and tearDown, and raises on failure
    except unittest.SkipTest as skip:  # pytest would report a skip; no test of Keras's should skip itself here
        pytest.fail(f"{case}.{name} was skipped: {skip}")


def check_that_it_was_collected() -> None:
    """Fails if tests of Keras's are missing: the others would pass if there were none."""
    correctness = [name for name in NAMES["batch"] if name.startswith("test_correctness")]
    assert len(correctness) >= 16
    assert {"test_bn_basics", "test_trainable_behavior", "test_masked_broadcast_normalization"} <= set(NAMES["batch"])
    assert {"test_ln_basics", "test_unsorted_axis"} <= set(NAMES["layer"])
    assert {"test_groupnorm", "test_broadcasting_2d_channels_first"} <= set(NAMES["group"])
    for kind, names in NAMES.items():
        assert len(names) >= AT_LEAST[kind], (kind, names)
