"""The command `bnfast`: exit statuses, messages, `info`, and a short `demo` with its table and picture."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import bnfast
import numpy as np
import pytest
from bnfast.benchmark import quiet
from bnfast.cli import datasets, demo, demo_figure, demo_training, info, main
from bnfast.cli.errors import UserError
from bnfast.tensorflow import op_library


def fails_with_one_line(capfd, arguments: list[str], *parts: str) -> None:
    """Assert that `main(arguments)` returns 2 and writes one line, with all of `parts`, to stderr."""
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("bnfast: "), err
    assert all(part in lines[0] for part in parts), err
    assert out == ""


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "info" in err
    assert "demo" in err


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bnfast {bnfast.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["info", "--yaml"], "unrecognized arguments: --yaml"),
        (["demo", "--epochs", "0"], "argument --epochs: must be an integer >= 1. Received: 0"),
        (["demo", "--batch", "-3"], "argument --batch: must be an integer >= 1. Received: -3"),
        (["demo", "--batch", "many"], "argument --batch: must be an integer >= 1. Received: many"),
        (["demo", "--data", "imagenet"], "argument --data: invalid choice: 'imagenet'"),
    ],
)
def test_errors_name_the_accepted_values(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_info_shows_what_runs_and_why(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    facts = bnfast.build_info()
    for part in (facts["version"], facts["isa"], facts["isa_reason"], facts["threads_reason"], facts["compiler"], "L2"):
        assert str(part) in out
    assert f"numpy            {np.__version__}" in out


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(bnfast.build_info(), default=list))
    assert {key: facts[key] for key in expected} == expected
    assert set(facts) - set(expected) == {"python", "platform", "packages", "bridge", "cuda"}
    assert facts["packages"]["numpy"] == np.__version__


def test_info_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "tensorflow       not installed" in out
    assert "Keras bridge     none (TensorFlow is not installed)" in out


def test_info_without_cuda_and_of_a_package_without_a_version(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bnfast.cuda", None)
    assert main(["info"]) == 0
    assert "CUDA             not built (it is built on Linux alone)\n" in capsys.readouterr().out
    (tmp_path / "module_of_no_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert info.package_version("module_of_no_package") == "unknown"


@pytest.mark.skipif(sys.platform != "linux", reason="the TensorFlow op is built only on Linux")
def test_info_shows_which_bridge_and_why(need, monkeypatch, tmp_path):
    need("tensorflow")
    monkeypatch.delenv("BNFAST_BRIDGE", raising=False)
    assert info.bridge() == {"name": "op", "reason": "_tf.so fits the installed TensorFlow"}
    monkeypatch.setattr(op_library, "PATH", tmp_path / "_tf.so")
    reason = f"{tmp_path / '_tf.so'} is not there"
    assert info.bridge() == {"name": "numpy_function", "reason": reason}
    with monkeypatch.context() as patched:
        patched.setattr(op_library, "gpus", lambda: "GPU:0, GPU:1")
        seen = "TensorFlow sees GPU:0, GPU:1, where bnfast's kernels can't run"
        assert info.bridge() == {"name": "tensorflow", "reason": seen}
    monkeypatch.setenv("BNFAST_BRIDGE", "op")
    assert info.bridge() == {"name": None, "reason": reason}
    monkeypatch.setenv("BNFAST_BRIDGE", "numpy_function")
    assert info.bridge() == {"name": "numpy_function", "reason": "BNFAST_BRIDGE"}
    monkeypatch.setenv("BNFAST_BRIDGE", "stone")
    assert info.bridge()["reason"].startswith("BNFAST_BRIDGE must be one of")


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys; from bnfast.cli import main; main(['info']); "
        "assert not {'tensorflow', 'keras', 'torch', 'matplotlib', 'rich', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_bnfast_is_the_command():
    run = subprocess.run([sys.executable, "-m", "bnfast", "dance"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid choice" in run.stderr


@pytest.mark.needs("sklearn", "tensorflow", "keras", "matplotlib", "rich")
@pytest.mark.parametrize("module", ["tensorflow", "keras", "rich", "matplotlib", "sklearn"])
def test_a_missing_extra_is_named(capfd, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    fails_with_one_line(capfd, ["demo"], module, 'pip install "bnfast[demo]"')


def test_an_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnfast.cli.info.gather", lambda: interrupt(None))
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "bnfast: interrupted\n"


def test_demo_trains_prints_and_draws(need, tmp_path):
    need("tensorflow")
    folder = tmp_path / "new" / "folder"
    command = [sys.executable, "-m", "bnfast", "demo", "--epochs", "1", "--out", folder]
    run = subprocess.run(command, capture_output=True, text=True)  # a new process, in which TensorFlow starts
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    picture = folder / demo.FILE_NAME
    assert all(part in run.stdout for part in ("Keras", "bnfast", "speed-up", f"wrote {picture}"))
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 50_000


def test_demo_with_too_few_steps_to_time_prints_a_dash(need, capfd, tmp_path):
    need("tensorflow")
    assert main(["demo", "--epochs", "1", "--batch", "1437", "--out", str(tmp_path / "one.png")]) == 0
    assert " - " in capfd.readouterr().out
    assert (tmp_path / "one.png").exists()


@pytest.mark.parametrize("name", ["plot.jpg", "a-file/plot.png"])
def test_demo_rejects_a_picture_it_cannot_write_before_it_trains(need, capfd, tmp_path, name):
    need("tensorflow")
    (tmp_path / "a-file").write_text("in the way")
    fails_with_one_line(capfd, ["demo", "--out", str(tmp_path / name)], "argument --out", name)


def test_demo_rejects_a_batch_larger_than_the_data(need, capfd, tmp_path):
    need("tensorflow")
    fails_with_one_line(capfd, ["demo", "--batch", "1438", "--out", str(tmp_path)], "1437 training images", "1438")
    assert list(tmp_path.iterdir()) == []


def test_demo_where_keras_runs_on_another_backend_or_is_broken(need, monkeypatch):
    need("tensorflow")
    keras = need("keras")
    demo.layer_classes()  # bnfast.keras is imported before anything is changed
    with monkeypatch.context() as patched:
        patched.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(UserError, match=r"the demo needs Keras's TensorFlow backend\. Keras runs on jax"):
            demo.layer_classes()
    monkeypatch.setitem(sys.modules, "bnfast.keras", None)
    with pytest.raises(UserError) as caught:
        demo.layer_classes()
    assert str(caught.value).startswith("TensorFlow or Keras could not be imported (import of bnfast.keras halted")
    assert str(caught.value).endswith('): pip install "bnfast[demo]"')


@pytest.mark.parametrize("heights", [[0.0], [1.0, 0.0], [0.5] * 5, [0.3, 0.1, 0.1, 0.9, 0.12]])
def test_labels_of_a_picture_are_spread_out(heights):
    pytest.importorskip("matplotlib")
    placed = np.array(demo_figure._spread_out(heights, 0.1))
    assert (np.diff(np.sort(placed)) >= 0.0999).all()
    assert (np.diff(placed[np.argsort(heights, kind="stable")]) > 0).all(), "in the same order"
    assert placed.mean() == pytest.approx(np.mean(heights))
    assert len(heights) > 2 or (placed == heights).all()


def test_demo_where_the_download_fails(need, capfd, monkeypatch, tmp_path):
    keras = need("keras")

    def no_network():
        raise Exception("URL fetch failure on https://example.org:\nname not resolved")

    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", no_network)
    arguments = ["demo", "--data", "fashion_mnist", "--out", str(tmp_path)]
    fails_with_one_line(capfd, arguments, "fashion_mnist could not be downloaded", "--data digits needs no network")


@pytest.mark.needs("sklearn", "tensorflow", "keras", "matplotlib", "rich")
def test_digits_are_images_and_labels():
    data = datasets.load("digits")
    assert data.x_train.shape == (1437, 8, 8, 1)
    assert data.x_test.shape == (360, 8, 8, 1)
    assert data.x_train.dtype == np.float32
    assert data.x_train.min() == 0
    assert data.x_train.max() == 1
    assert set(data.y_train) == set(data.y_test) == set(range(10))


@pytest.mark.parametrize(
    ("name", "shape", "image_shape"), [("mnist", (28, 28), (28, 28, 1)), ("cifar10", (32, 32, 3), (32, 32, 3))]
)
def test_downloaded_data_has_the_same_format(need, monkeypatch, name, shape, image_shape):
    keras = need("keras")

    def load_data():
        print("chatter")
        labels = np.zeros((7,) if name == "mnist" else (7, 1), np.uint8)
        return (np.full((7, *shape), 255, np.uint8), labels), (np.zeros((3, *shape), np.uint8), labels[:3])

    monkeypatch.setattr(getattr(keras.datasets, name), "load_data", load_data)
    data = datasets.load(name)
    assert data.image_shape == image_shape
    assert data.x_train.dtype == np.float32
    assert data.x_train.max() == 1
    assert data.y_train.shape == (7,)
    assert data.x_test.shape[0] == 3


def test_both_trainings_start_equal_and_see_the_same_batches(need):
    need("tensorflow")
    layers = demo.layer_classes()
    data = datasets.load("digits")
    steps: list[int] = []
    histories = demo_training.train(layers, data, epochs=1, batch=256, advance=steps.append)
    keras_history, our_history = histories.values()
    num_steps = len(data.x_train) // 256
    assert steps == [1] * num_steps
    assert len(our_history.loss) == num_steps
    assert len(our_history.test_accuracy) == 1
    np.testing.assert_allclose(keras_history.loss, our_history.loss, rtol=1e-3)
    np.testing.assert_allclose(keras_history.moving_variance[0], our_history.moving_variance[0], rtol=1e-4)
    assert len(our_history.moving_mean) == num_steps
    assert our_history.moving_mean[0].shape == (32,)


def test_quiet_stderr_shows_its_output_only_if_the_block_raises(capfd):
    with quiet.quiet_stderr():
        os.write(2, b"noise")
    assert capfd.readouterr().err == ""
    with contextlib.suppress(UserError), quiet.quiet_stderr():
        os.write(2, b"reason")
        raise UserError("it broke")
    assert capfd.readouterr().err == "reason"
    os.write(2, b"restored")
    assert capfd.readouterr().err == "restored"
