"""Every example runs for a few steps on the digits, learns something, and uses bnfast's batch norm."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
KERAS_EXAMPLES = ("mlp_bn_before_activation", "mlp_bn_after_activation", "cnn_functional", "cnn_sequential")
STEPS = 40  # enough for an accuracy of 0.85 or more; chance is 0.1


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example by name, as if it were run from its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize("name", KERAS_EXAMPLES)
def test_keras_example(need, example, name):
    need("tensorflow")
    keras, bnfast_keras = example("keras"), example("bnfast.keras")
    module = example(name)
    layers = module.build_model().layers
    batch_norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    assert batch_norms
    assert all(isinstance(layer, bnfast_keras.BatchNormalization) for layer in batch_norms)
    assert module.main(["--steps", str(STEPS)]) > 0.6


def test_bn_variants(need, example):
    need("tensorflow")
    module = example("bn_variants")
    accuracies = module.main(["--steps", "15"])
    assert accuracies.keys() == module.VARIANTS.keys()
    assert min(accuracies.values()) > 0.3, accuracies


def test_cgan_digits(need, example):
    need("tensorflow")
    assert example("cgan_digits").main(["--steps", "150"]) > 0.4  # usually 0.9; images that ignore the label have 0.1


def test_compat_v1_mlp(need, example):
    need("tensorflow")
    module = example("compat_v1_mlp")
    accuracies = module.main(["--steps", str(STEPS)])
    assert accuracies.keys() == set(module.UPDATES)
    assert min(accuracies.values()) > 0.6, accuracies


def test_not_working(need, example):
    need("tensorflow")
    module = example("not_working")
    found = module.main(["outlier", "never-trained", "wrong-axis", "always-training"])
    assert {name: diagnosis.verdicts[0].code for name, diagnosis in found.items()} == {name: name for name in found}


def test_not_working_has_every_verdict_and_the_page_shows_it(need, example):
    need("tensorflow")
    module, rules = example("not_working"), example("bnfast.diagnosis.verdicts").RULES
    assert set(module.CAUSES) == {rule.__name__.replace("_", "-") for rule in rules}
    page = (EXAMPLES.parent / "docs" / "not-working.md").read_text()
    for name, cause in module.CAUSES.items():
        assert f"(#{name})" in page
        assert f"\n### {name}\n" in page
        assert inspect.getsource(cause).strip() in page, f"docs/not-working.md shows an old version of {name}"
        assert f"[{name}]" in page.split(f"\n### {name}\n")[1].split("\n### ")[0]


def test_other_norms(need, example):
    need("tensorflow")
    module = example("other_norms")
    accuracies = module.main(["--steps", "60", "--depth", "3"])
    assert accuracies.keys() == set(module.NORMS)
    assert min(accuracies.values()) > 0.6, accuracies
    dropped = module.build("SELU", 2, dropout=0.1)
    assert sum(type(layer).__name__ == "AlphaDropout" for layer in dropped.layers) == 2


@pytest.mark.needs("sklearn", "tensorflow", "keras")
def test_mlp_numpy(example):
    assert example("mlp_numpy").main(["--steps", str(STEPS)]) > 0.8


@pytest.mark.needs("sklearn", "tensorflow", "keras")
def test_an_example_is_a_script():
    command = [sys.executable, EXAMPLES / "mlp_numpy.py", "--steps", "3"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("mlp_numpy: last loss")


def test_every_example_is_tested_and_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    assert scripts == {
        *KERAS_EXAMPLES,
        "bn_variants",
        "cgan_digits",
        "compat_v1_mlp",
        "mlp_numpy",
        "not_working",
        "other_norms",
    }
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{script}.py`" in readme for script in scripts)
