"""`bnfast bench --model --framework`: MobileNetV2 and ResNet50 in PyTorch and JAX, the variants, files and errors.

No test here asserts a time. The command runs with a model of two batch norms.
"""

from __future__ import annotations

import importlib
import json

import bnfast
import numpy as np
import pytest
from bnfast.benchmark import model_memory, model_timing, models, timing
from bnfast.cli import main

pytestmark = pytest.mark.serial  # measures time and memory

FRAMEWORKS = ["torch", "jax"]
SIZES = ["--batch", "4", "--size", "16", "--rounds", "2", "--memory-runs", "0"]
# Parameters of the papers' models without statistics: torchvision says so of MobileNetV2 and ResNet50.
PARAMETERS = {"MobileNetV2": 3_504_872, "ResNet50": 25_557_032}
BATCH_NORMS = {"MobileNetV2": 52, "ResNet50": 53}


@pytest.fixture
def small(need, monkeypatch):
    """Adds a model "Small" to a framework, and returns the framework's module."""

    def add(name):
        need(name)
        need("matplotlib")
        need("rich")
        monkeypatch.setattr(timing, "wait_for_idle_threads", lambda: None)
        module = importlib.import_module(models.FRAMEWORKS[name].module)
        monkeypatch.setitem(module.MODELS, "Small", torch_model if name == "torch" else jax_model)
        return module

    return add


def torch_model():
    from bnfast.benchmark.torch_models import _convolution
    from torch import nn

    layers = _convolution(3, 8, 3, 2, activation=nn.ReLU6), _convolution(8, 16, activation=nn.ReLU)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1000))


def jax_model():
    from bnfast.benchmark.jax_models import Block, Convolution

    first = Convolution(3, 8, 3, 2, activation="relu6")
    return [Block((first,), residual=False), Block((Convolution(8, 4), Convolution(4, 8, activation="relu")))]


def run(framework, *arguments):
    return main(["bench", "--model", "Small", "--framework", framework, *SIZES, *map(str, arguments)])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_command_with_every_variant(small, framework, tmp_path, capfd):
    small(framework)
    kinds = models.FRAMEWORKS[framework].variants
    assert run(framework, "--out", tmp_path) == 0
    out, err = capfd.readouterr()
    assert err == ""
    found = json.loads((tmp_path / f"{framework}-Small-4x16.json").read_text())
    assert found["left_out"] == []
    assert found["settings"]["framework"] == framework
    assert framework in found["machine"]["versions"]
    rows = {(row["variant"], row["what"]): row for row in found["rows"]}
    assert set(rows) == {(name, what) for name in kinds for what in ("train", "predict", "check")}
    for name, kind in kinds.items():
        check = rows[name, "check"]
        assert check["predictions"] > 1e-2 if not kind.must_agree else check["predictions"] <= 1e-5
        assert check["loss"] < 1e-5 or not kind.must_agree
        count = 0 if name.startswith("left-out") else 2 + (framework == "jax")
        assert sum(check["batch_norms"].values()) == count
        assert all(own.startswith("bnfast") == name.startswith("bnfast") for own in check["batch_norms"])
        for what in ("train", "predict"):
            row = rows[name, what]
            assert row["seconds"] > 0
            assert row["rounds"] == 2
            assert (row["ratio"] == 1.0) or kind.base != name
    text = (tmp_path / f"{framework}-Small-4x16.md").read_text()
    for title in models.FRAMEWORKS[framework].titles.values():
        assert title in out
        assert f"| {title} |" in text
    assert (tmp_path / f"{framework}-Small-4x16.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "ResNet5"],
            "argument --model: must be MobileNetV2 or ResNet50. Received: 'ResNet5' (did you mean",
        ),
        (["--model", "ResNet50(alpha=1)"], "argument --model: ResNet50 has no argument alpha"),
        (["--model", "1"], "argument --model: must be MobileNetV2 or ResNet50, or NAME(argument=value, ...). Received"),
        (["--variants", "tf-fused"], "argument --variants: must be all, or some of {variants}. Received: 'tf-fused'"),
        (["--size", "2147483647"], "needs at least "),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(small, framework, arguments, message, tmp_path, capfd):
    small(framework)
    assert run(framework, "--out", tmp_path, *arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message.format(variants=", ".join(models.FRAMEWORKS[framework].variants)) in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_busy_machine_is_refused(small, framework, monkeypatch, tmp_path, capfd):
    small(framework)
    monkeypatch.setattr("bnfast.benchmark.machine.others_busy", lambda: 99.0)
    command = ["bench", "--model", "Small", "--framework", framework, "--out", str(tmp_path)]
    assert main(command) == 2
    assert "other programs keep 99.0 of " in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("exhausted", [True, False])
def test_a_model_that_is_too_large_is_said_in_one_line(small, framework, exhausted, monkeypatch, capfd):
    module = small(framework)
    words = {"torch": "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't", "jax": "RESOURCE_EXHAUSTED: "}
    kind = {"torch": RuntimeError, "jax": getattr(getattr(module, "jax", None), "errors", None)}[framework]
    kind = getattr(kind, "JaxRuntimeError", kind)

    def fail(*_):
        raise kind(f"{words[framework]} allocate 17 GiB" if exhausted else "something else")

    monkeypatch.setattr(module, "calibrate", fail)
    if not exhausted:
        with pytest.raises(kind, match="something else"):
            run(framework)
        return
    assert run(framework) == 2
    title = models.FRAMEWORKS[framework].title
    assert capfd.readouterr().err.splitlines()[-1] == f"bnfast: out of memory: Small 4x16x16 in {title}"


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_a_framework_that_does_not_start_is_said_in_one_line(small, framework, error, monkeypatch, capfd):
    module = small(framework)

    def fail(threads):
        raise error("no such\nsymbol")

    monkeypatch.setattr(module, "start", fail)
    assert run(framework) == 2
    title, extra = models.FRAMEWORKS[framework].title, models.FRAMEWORKS[framework].extra
    wanted = f'{title} could not be imported (no such symbol): pip install "bnfast[{extra}]"'
    if error is RuntimeError:
        wanted = f"{title} could not be started: no such symbol"
    assert capfd.readouterr() == ("", f"bnfast: {wanted}\n")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_threads_are_set(small, framework):
    """JAX's own can't be changed once it runs."""
    module = small(framework)
    before = bnfast.get_num_threads()
    with timing.preserve_num_threads():
        module.start(before + 1)
        assert bnfast.get_num_threads() == before + 1
        module.start(None)
        assert bnfast.get_num_threads() == before + 1
        if framework == "torch":
            assert module.torch.get_num_threads() == before + 1
            module.torch.set_num_threads(before)


def test_torch_needs_more_than_one_value_per_channel(small, capfd):
    small("torch")
    assert run("torch", "--batch", "1", "--size", "1") == 2
    assert "argument --model: a batch of shape (1, 3, 1, 1) is too small: Expected more than 1 value" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_wrong_variant_stops_it_before_anything_is_timed(small, framework, monkeypatch, capfd):
    module = small(framework)
    own = module.make_variant

    def wrong(name, model):
        variant = own(name, model)
        if name.startswith("bnfast"):
            predict = variant.predict_on_batch
            variant.predict_on_batch = lambda x: predict(x) * np.float32(1.001)
        return variant

    monkeypatch.setattr(module, "make_variant", wrong)
    monkeypatch.setattr(model_timing, "_run_rounds", lambda *_: pytest.fail("it was timed"))
    assert run(framework) == 2
    title = models.FRAMEWORKS[framework].title
    assert f"bnfast: bnfast: predictions differ from {title}'s by 0.001 of" in capfd.readouterr().err


def test_a_variant_brings_its_base_and_jax_without_kernels_has_no_bnfast(small, monkeypatch, capfd):
    assert models.TORCH.chosen(["bnfast-channels_last"]) == ["torch-channels_last", "bnfast-channels_last"]
    assert models.KERAS.chosen(["left-out"]) == ["keras", "left-out"]
    module = small("jax")
    monkeypatch.setattr(module, "status", lambda: (False, "not today"))
    assert run("jax", "--variants", "bnfast") == 0
    assert "left out: bnfast: no kernels for JAX: not today" in capfd.readouterr().out


def test_channels_last_is_measured_in_that_format(small):
    module = small("torch")
    import torch

    base = module.build_model(models.parse("Small", 4, 16, "torch"))
    x, y = module.make_data(models.parse("Small", 4, 16, "torch"), base)
    variant = module.make_variant("bnfast-channels_last", base)
    seen = []
    variant.model[0].register_forward_hook(lambda module, given, y: seen.append((given[0], y)))
    variant.train_on_batch(x, y)
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen[0])
    assert seen[0][0] is not x
    variant.predict_on_batch(x)
    assert seen[1][0] is seen[0][0], "x is converted once"


@pytest.mark.parametrize("name", PARAMETERS)
def test_torch_models_are_those_of_the_papers(need, name):
    need("torch")
    from bnfast.benchmark import torch_models

    model = torch_models.build_model(models.parse(name, 1, 32, "torch"))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert len(torch_models.batch_norms(model)) == BATCH_NORMS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_jax_models_are_those_of_the_papers(need, name):
    need("jax")
    import jax
    from bnfast.benchmark import jax_models

    model = jax_models.build_model(models.parse(name, 1, 32, "jax"))
    count = sum(leaf.size for leaf in jax.tree.leaves(model.parameters))
    assert count == PARAMETERS[name] - jax_models.CLASSES, "the last product has no bias"
    assert len(model.moving) == BATCH_NORMS[name]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_training_steps_move_the_statistics_alike(small, framework):
    module = small(framework)
    spec = models.parse("Small", 4, 16, framework)
    base = module.build_model(spec)
    x, y = module.make_data(spec, base)
    module.calibrate(base, x)
    found = {}
    for name in (framework, "bnfast"):
        variant = module.make_variant(name, base)
        losses = [variant.train_on_batch(x, y) for _ in range(3)]
        moving = variant.model.moving if framework == "jax" else variant.model.buffers()
        found[name] = losses, [np.asarray(array, np.float64) for pair in moving for array in np.atleast_1d(pair)]
    np.testing.assert_allclose(found["bnfast"][0], found[framework][0], rtol=1e-5)
    assert len(found["bnfast"][1]) > 2
    for ours, theirs in zip(found["bnfast"][1], found[framework][1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not model_memory.available(), reason="this system does not report peak memory")
def test_peak_memory_of_a_pytorch_model(need):
    need("torch")
    spec = models.parse("MobileNetV2", 2, 32, "torch")
    found, failed = model_memory.peaks(spec, ["bnfast"], 1, None, lambda line: None)
    assert failed == {}
    (run,) = found["bnfast"]
    assert 50e6 < run["before_bytes"] < run["peak_bytes"] < 4e9
