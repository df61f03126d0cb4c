"""Every example runs for a few steps on the digits, learns something, and uses bnfast's batch norm."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
KERAS_EXAMPLES = {  # batch norms in the model
    "mlp_bn_before_activation": 2,
    "mlp_bn_after_activation": 2,
    "cnn_functional": 4,
    "cnn_sequential": 2,
}
STEPS = 40  # chance is 0.1; this many reach 0.85 and more


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as if it were run from its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize("name", KERAS_EXAMPLES)
def test_keras_example(need, example, name):
    need("tensorflow")
    keras_layer = example("bnfast.keras").BatchNormalization
    module = example(name)
    assert sum(isinstance(layer, keras_layer) for layer in module.build_model().layers) == KERAS_EXAMPLES[name]
    assert module.main(["--steps", str(STEPS)]) > 0.6


def test_bn_variants(need, example):
    need("tensorflow")
    module = example("bn_variants")
    accuracies = module.main(["--steps", "15"])
    assert accuracies.keys() == module.VARIANTS.keys()
    assert min(accuracies.values()) > 0.3, accuracies


def test_cgan_digits(need, example):
    need("tensorflow")
    assert example("cgan_digits").main(["--steps", "150"]) > 0.4  # 0.9 here; noise that heeds no label has 0.1


def test_compat_v1_mlp(need, example):
    need("tensorflow")
    module = example("compat_v1_mlp")
    accuracies = module.main(["--steps", str(STEPS)])
    assert accuracies.keys() == set(module.UPDATES)
    assert min(accuracies.values()) > 0.6, accuracies


def test_mlp_numpy(example):
    assert example("mlp_numpy").main(["--steps", str(STEPS)]) > 0.8


def test_an_example_is_a_script():
    command = [sys.executable, EXAMPLES / "mlp_numpy.py", "--steps", "3"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("mlp_numpy: last loss")


def test_every_example_is_tested_and_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    assert scripts == {*KERAS_EXAMPLES, "bn_variants", "cgan_digits", "compat_v1_mlp", "mlp_numpy"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{script}.py`" in readme for script in scripts)
