"""`bnfast bench --model`: what it compares and writes, that it stops at a wrong variant and names a missing one.

No test here asserts a time. MobileNet(alpha=0.25) at 32x32 is the smallest model of keras.applications. Models of
PyTorch and JAX: test_bench_frameworks.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from bnfast.benchmark import keras_models, model_figure, model_memory, model_report, model_timing, models, timing
from bnfast.benchmark.peers import Unsupported
from bnfast.cli import bench_model, main

pytestmark = pytest.mark.serial  # measures time and memory

SMALL = "MobileNet(alpha=0.25)"
SPEC = models.parse(SMALL, 2, 32)
COMMAND = ["bench", "--model", SMALL, "--batch", "2", "--size", "32", "--rounds", "1", "--memory-runs", "0"]


@pytest.fixture
def tensorflow(need):
    need("keras")
    return need("tensorflow")


@pytest.mark.parametrize(
    ("text", "name", "arguments", "file_name"),
    [
        ("ResNet50", "ResNet50", (), "ResNet50-16x224"),
        (" MobileNetV2( alpha=.35 )", "MobileNetV2", (("alpha", 0.35),), "MobileNetV2-alpha-0.35-16x224"),
        ("A(b='c/d', e=None)", "A", (("b", "c/d"), ("e", None)), "A-b-c-d-e-None-16x224"),
        ("A()", "A", (), "A-16x224"),
    ],
)
def test_a_model_is_a_name_or_a_call(text, name, arguments, file_name):
    spec = models.parse(text)
    assert (spec.name, spec.arguments, spec.file_name) == (name, arguments, file_name)
    assert models.parse(spec.text) == spec
    assert spec.label == f"{spec.text} 16x224x224"


@pytest.mark.needs("tensorflow", "keras", "matplotlib", "rich")
@pytest.mark.parametrize("text", ["", "1", "a.B", "A(1)", "A(b=c)", "A(**{})", "A(weights=None)", "A(", "A B", "A()()"])
def test_anything_else_is_rejected(capsys, text):
    with pytest.raises(ValueError):
        models.parse(text)
    assert main(["bench", f"--model={text}"]) == 2
    message = capsys.readouterr().err
    assert "argument --model: must be a name of keras.applications, or NAME(argument=value, ...)" in message
    assert message.count("\n") == 1
    assert repr(text) in message


@pytest.mark.needs("tensorflow", "keras", "matplotlib", "rich")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "2"], "bnfast: argument --batch: needs --model"),
        (["--framework", "torch"], "bnfast: argument --framework: needs --model"),
        (["--memory-runs", "0"], "bnfast: argument --memory-runs: needs --model"),
        (["--model", "A", "--op", "train"], "bnfast: argument --op: can't be combined with --model A"),
        (["--model", "A", "--shape", "8,32"], "bnfast: argument --shape: can't be combined with --model A"),
        (["--model", "A", "--memory-runs", "-1"], "argument --memory-runs: must be an integer >= 0. Received: -1"),
        (["--model", "A", "--variants", "torch"], "argument --variants: must be all, or some of keras, tf-fused, "),
        (["--model", "A", "--framework", "mxnet"], "argument --framework: invalid choice: 'mxnet'"),
        (["--model", "A", "--size", "0"], "argument --size: must be an integer >= 1. Received: 0"),
    ],
)
def test_options_of_the_other_mode_are_rejected(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        ("MobilNetV2", 32, "must be a name of keras.applications. Received: 'MobilNetV2' (did you mean MobileNetV2"),
        ("MobileNet(beta=1)", 32, "MobileNet has no argument beta"),
        ("MobileNet(alpha='x')", 32, "argument --model: MobileNet(alpha='x') 16x32x32: "),
        ("InceptionV3", 32, "argument --model: InceptionV3 16x32x32: Input size must be at least 75x75"),
    ],
)
def test_models_that_cannot_be_built_are_rejected_in_one_line(tensorflow, capfd, model, size, message):
    assert main(["bench", "--model", model, "--size", str(size)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_a_model_without_batch_norm_is_rejected(tensorflow, capfd, monkeypatch):
    monkeypatch.setattr(keras_models, "batch_norms", lambda model: [])
    assert main(COMMAND) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "bnfast: argument --model: MobileNet has no batch norm"


def test_the_command_with_every_available_variant(tensorflow, tmp_path):
    folder = tmp_path / "new" / "folder"
    command = [sys.executable, "-m", "bnfast", *COMMAND, "--threads", "2", "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads((folder / f"{SPEC.file_name}.json").read_text())
    missing = {row["variant"] for row in found["left_out"]}
    assert missing <= {"bnfast-op"}
    rows = {(row["variant"], row["what"]): row for row in found["rows"]}
    here = [name for name in models.KERAS.titles if name not in missing]
    assert {name for name, what in rows if what == "predict"} == set(here)
    assert {name for name, what in rows if what == "train"} == set(here) - {"bnfast-fold"}
    assert all(row["seconds"] > 0 and row["rounds"] == 1 for (_, what), row in rows.items() if what != "check")
    for name in here:
        distance = rows[name, "check"]["predictions"]
        assert distance > 1e-2 if name == "left-out" else distance <= model_timing.PREDICTION_TOLERANCE
    layers = {name: rows[name, "check"]["batch_norms"] for name in here}
    (count,) = layers["keras"].values()
    assert layers["keras"] == {"keras.BatchNormalization": count}
    assert layers["tf-fused"] == {"FusedBatchNormalization": count}
    assert layers["left-out"] == {}
    assert any(kind.startswith("bnfast.") for kind in layers["bnfast-numpy_function"])
    text = (folder / f"{SPEC.file_name}.md").read_text()
    for name in here:
        assert models.KERAS.titles[name] in done.stdout
        assert f"| {models.KERAS.titles[name]} |" in text
    for name in missing:
        assert f"left out: {models.KERAS.titles[name]}: " in done.stdout
    assert (folder / f"{SPEC.file_name}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_wrong_variant_stops_it_and_a_missing_one_does_not(tensorflow, capfd, monkeypatch):
    def missing(model):
        raise Unsupported("not today")

    def wrong(model):
        made = keras_models._with_fused_op(model)
        keras_models.batch_norms(made)[0].epsilon = 1e-2
        return made

    monkeypatch.setattr(timing, "wait_for_idle_threads", lambda: None)
    monkeypatch.setitem(keras_models._VARIANTS, "tf-fused", missing)
    command = [*COMMAND, "--variants", "tf-fused"]
    assert main(command) == 0
    assert "left out: TF fused op: not today" in capfd.readouterr().out
    monkeypatch.setitem(keras_models._VARIANTS, "tf-fused", wrong)
    assert main(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("bnfast: TF fused op: predictions differ from Keras's by ")


@pytest.mark.parametrize("reason", ["a broken file", None])
def test_without_the_op_its_variant_is_left_out(tensorflow, monkeypatch, reason):
    from bnfast.tensorflow import op

    monkeypatch.setattr(op, "status", lambda: (False, reason))
    if reason is None:
        monkeypatch.delattr(sys.modules["bnfast.tensorflow"], "op")
        monkeypatch.setitem(sys.modules, "bnfast.tensorflow.op", None)
        reason = "import of bnfast.tensorflow.op halted; None in sys.modules"
    with pytest.raises(Unsupported) as caught:
        keras_models.make_variant("bnfast-op", None)
    assert str(caught.value) == f"no TensorFlow op: {reason}"


def make_small(weights, input_shape, width=4):
    """A model of the user's own in keras.applications: nested, with a gamma or beta left out, that rescales pixels."""
    import keras

    layers = keras.layers
    assert weights is None
    inner = keras.Sequential([layers.Conv2D(width, 3), layers.BatchNormalization(scale=False)])
    own = [inner, layers.BatchNormalization(center=False), layers.GlobalAveragePooling2D(), layers.Dense(7)]
    return keras.Sequential([keras.Input(input_shape), layers.Rescaling(1 / 255), *own])


def test_any_model_of_keras_applications(tensorflow, monkeypatch):
    import keras

    monkeypatch.setattr(keras.applications, "Small", make_small, raising=False)
    spec = models.parse("Small(width=3)", 2, 16)
    assert "Small" in keras_models.names()
    model = keras_models.build_model(spec)
    first, second = keras_models.batch_norms(model)
    assert (first.gamma, second.beta) == (None, None)
    for weights in (first.beta.numpy(), second.gamma.numpy() - 1):
        assert weights.shape == (3,)
        assert (weights != 0).all()
        assert (np.abs(weights) < 0.5).all()
    x, y = (tensor.numpy() for tensor in keras_models.make_data(spec, model))
    assert (x.shape, x.min(), x.max()) == ((2, 16, 16, 3), 0, 255)
    assert set(y) <= set(range(7))


def test_keras_on_another_backend_is_said_in_one_line(tensorflow, monkeypatch, capfd):
    import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    assert main(COMMAND) == 2
    wanted = 'TensorFlow or Keras could not be imported (Keras runs on torch): pip install "bnfast[demo]"'
    assert capfd.readouterr().err.splitlines()[-1] == f"bnfast: {wanted}"


def test_threads_that_tensorflow_cannot_change_any_more(tensorflow, capfd):
    tensorflow.constant(0)
    threads = tensorflow.config.threading.get_intra_op_parallelism_threads() + 1
    assert main([*COMMAND, "--threads", str(threads)]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"bnfast: argument --threads: TensorFlow can't change to {threads} threads: ")


def test_a_model_that_is_too_large_is_said_in_one_line(tensorflow, monkeypatch, capfd):
    def fail(*_):
        raise tensorflow.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    monkeypatch.setattr(keras_models, "calibrate", fail)
    assert main(COMMAND) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"bnfast: out of memory: {SMALL} 2x32x32"


def test_where_no_system_reports_peak_memory(tensorflow, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(timing, "wait_for_idle_threads", lambda: None)
    monkeypatch.setattr(model_memory, "STATUS", tmp_path / "absent")
    assert main([*COMMAND[:-1], "2", "--variants", "left-out", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{SPEC.file_name}.json").read_text())
    assert {row["what"] for row in found["rows"]} == {"train", "predict", "check"}
    assert found["left_out"] == []


def test_a_child_says_why_its_variant_is_unsupported(tensorflow, monkeypatch, capsys):
    def missing(model):
        raise Unsupported("not today")

    monkeypatch.setitem(keras_models._VARIANTS, "tf-fused", missing)
    task = {"model": SMALL, "batch": 2, "size": 32, "framework": "keras", "variant": "tf-fused", "threads": None}
    assert model_memory.main([json.dumps(task)]) == model_memory.EXIT_UNSUPPORTED
    assert capsys.readouterr().out == "not today\n"


@pytest.mark.skipif(not model_memory.available(), reason="this system does not report peak memory")
def test_peak_memory_comes_from_a_new_process(tensorflow, monkeypatch):
    said = []
    found, failed = model_memory.peaks(SPEC, ["keras", "bnfast-fold"], 1, None, said.append)
    assert failed == {}
    assert list(found) == ["keras"], "the folded model is not trained"
    assert said == ["memory, 1 of 1: Keras's layer"]
    (run,) = found["keras"]
    assert 100e6 < run["before_bytes"] < run["peak_bytes"] < 4e9
    monkeypatch.setattr(model_memory, "_run_child", lambda spec, name, threads: f"{name} failed")
    assert model_memory.peaks(SPEC, ["keras"], 2, None, said.append) == ({}, {"keras": "keras failed"})


def test_a_child_that_fails_gives_the_reason():
    assert model_memory._run_child(models.Spec("not a name"), "keras", None) == "ValueError: not a name"


@pytest.mark.parametrize("scale", [True, False])
def test_the_fused_layer_computes_what_tf_keras_2_did(tensorflow, scale):
    import keras
    from bnfast.benchmark.model_layers import FusedBatchNormalization

    x = np.random.default_rng(1).normal(3, 2, (4, 5, 6, 7)).astype(np.float32)
    ours, base = (
        kind(scale=scale, center=scale, momentum=0.9)
        for kind in (FusedBatchNormalization, keras.layers.BatchNormalization)
    )
    for training in (True, False):
        np.testing.assert_allclose(
            ours(x, training=training), base(x, training=training), atol=2e-2 - 1.9e-2 * training
        )
    np.testing.assert_allclose(ours.moving_mean, base.moving_mean, rtol=1e-5)
    sample = 0.9 + 0.1 * x.astype(np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(ours.moving_variance, sample, rtol=1e-5)
    flat = FusedBatchNormalization()
    np.testing.assert_allclose(flat(x[:, 0, 0], training=True).numpy().mean(0), 0, atol=1e-5)


def make_result(times: dict[tuple[str, str], list[float]]) -> model_timing.ModelResult:
    measurements = [timing.Measurement(name, mode, int, seconds=seconds) for (name, mode), seconds in times.items()]
    names = dict.fromkeys(name for name, _ in times)
    return model_timing.ModelResult([model_timing.Variant(name, None, {}) for name in names], measurements)


def test_rows_and_tables(tmp_path):
    result = make_result(
        {
            ("keras", "train"): [0.4, 0.8, 4.0],
            ("bnfast-op", "train"): [0.2, 0.2, 2.0],
            ("keras", "predict"): [0.08] * 3,
            ("bnfast-fold", "predict"): [0.06] * 3,
        }
    )
    peaks = {"keras": [3, 1, 2], "bnfast-op": [1, 1, 1]}
    runs = {name: [{"before_bytes": 5, "peak_bytes": n * 10**9} for n in billions] for name, billions in peaks.items()}
    rows = model_report.rows_of(result, runs)
    assert model_report.table(rows) == [
        ("Keras's layer", "800", "1.00", "80", "1.00", "2000", "1.00"),
        ("bnfast, TensorFlow op", "200", "0.50", "-", "-", "1000", "0.50"),
        ("bnfast, folded", "-", "-", "60", "0.75", "-", "-"),
    ]
    machine = {"cpu": "c", "cores": 2, "l2_bytes": 0, "l3_bytes": 0, "isa": "i", "threads": 2, "load_before": 0}
    left_out = [{"variant": "tf-fused", "what": "all", "reason": "gone"}]
    text = model_report.markdown({**machine, "versions": {"python": "3"}}, SPEC, rows, left_out)
    assert "| bnfast, TensorFlow op | 200 | 0.50 | - | - | 1000 | 0.50 |" in text
    assert "- TF fused op: gone" in text
    pytest.importorskip("matplotlib")
    model_figure.save(tmp_path / "all.png", rows, SPEC, "a machine")
    model_figure.save(tmp_path / "one.png", rows[2:3], SPEC, "a machine")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 10_000


def test_the_number_of_stages_is_known_before(tensorflow, monkeypatch):
    monkeypatch.setattr(timing, "wait_for_idle_threads", lambda: None)
    names, said = ["keras", "tf-fused"], []
    result = model_timing.measure(SPEC, names, 2, said.append)
    assert len(said) == model_timing.num_stages(names, 2)
    assert [variant.name for variant in result.variants] == names
    assert result.variants[1].loss is None, "Dropout draws other random numbers in each variant"
    assert all(len(found.seconds) == 2 for found in result.measurements)
    assert result.find("keras", "train") is result.measurements[0]
    assert result.find("left-out", "train") is None


def test_the_help_shows_the_defaults(capsys):
    assert main(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for value in (bench_model.BATCH, bench_model.SIZE, bench_model.MEMORY_RUNS):
        assert f"default: {value})" in text
