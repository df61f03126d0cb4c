"""`bnfast diagnose` and `bnfast recalibrate`: from files to files, and one line for whatever is wrong with them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from bnfast.cli import main, saved_model
from bnfast.cli.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose batch norms have seen too few updates, and its data."""
    from needs import need_module

    keras = need_module("keras")
    need_module("tensorflow")
    path = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (300, 5)).astype("float32")
    y = (x[:, 0] > 3).astype("int32")
    layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(name="bn"), keras.layers.ReLU()]
    model = keras.Sequential([keras.Input((5,)), *layers, keras.layers.Dense(2)], name="net")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(x, y, epochs=3, verbose=0)
    model.save(path / "few.keras")
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]).save(path / "none.keras")
    np.savez(path / "data.npz", x=x, y=y)
    np.save(path / "x.npy", x)
    np.save(path / "y.npy", y)
    np.savez(path / "two.npz", a=x, b=x)
    np.savez(path / "nothing.npz")
    np.save(path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(path / "nan.npy", np.full((4, 5), np.nan))
    (path / "broken.keras").write_bytes(b"PK broken")
    (path / "text.npy").write_text("1, 2, 3")
    return path


def run(capsys, folder, command, *arguments):
    status = main([command, *(str(folder / a) if "." in a and not a.startswith("-") else a for a in arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_from_diagnosis_to_cure(capsys, folder):
    status, out, _ = run(capsys, folder, "diagnose", "few.keras", "--data", "data.npz", "--plot", "p.png", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["verdicts"][0]["code"] == "too-few-updates"
    assert "accuracy" in found["scores"]["moving"]
    assert (folder / "p.png").read_bytes()[:4] == b"\x89PNG"
    before = (folder / "few.keras").read_bytes()
    status, out, _ = run(capsys, folder, "recalibrate", "few.keras", "--data", "x.npy", "--out", "new.keras")
    assert status == 0
    assert "net: 1 batch norms recalibrated from 300 samples" in out
    assert (folder / "few.keras").read_bytes() == before
    status, out, _ = run(
        capsys, folder, "diagnose", "new.keras", "--data", "x.npy", "--targets", "y.npy", "--data2", "x.npy"
    )
    assert status == 0
    assert out.startswith("net: healthy")
    assert "accuracy" in out
    status, named, _ = run(
        capsys, folder, "diagnose", "new.keras", "--data", "data.npz", "--targets", "y", "--data2", "x.npy"
    )
    assert (status, named) == (0, out), "the targets are those of y.npy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("diagnose", "few.keras"), "--data"),
        (("diagnose", "absent.keras", "--data", "x.npy"), "argument model: there is no file"),
        (("diagnose", "x.npy", "--data", "x.npy"), "argument model: must be a file that ends with .keras or .h5"),
        (("diagnose", "broken.keras", "--data", "x.npy"), "can't be loaded"),
        (("diagnose", "none.keras", "--data", "x.npy"), "has no batch norm"),
        (("diagnose", "few.keras", "--data", "absent.npz"), "argument --data: there is no file"),
        (("diagnose", "few.keras", "--data", "text.npy"), "argument --data:"),
        (("diagnose", "few.keras", "--data", "objects.npy"), "argument --data:"),
        (("diagnose", "few.keras", "--data", "few.keras"), "argument --data:"),
        (("diagnose", "few.keras", "--data", "nothing.npz"), "argument --data:"),
        (("diagnose", "few.keras", "--data", "nan.npy"), "NaN or Inf"),
        (("diagnose", "few.keras", "--data", "two.npz"), "lacks the input"),
        (("diagnose", "few.keras", "--data", "y.npy"), ""),
        (("diagnose", "few.keras", "--data", "data.npz", "--targets", "z"), "argument --targets: must be an array in"),
        (("diagnose", "few.keras", "--data", "x.npy", "--targets", "two.npz"), "must hold one array"),
        (("diagnose", "few.keras", "--data", "x.npy", "--plot", "p.txt"), "argument --plot: must end with"),
        (("diagnose", "few.keras", "--data", "x.npy", "--batch-size", "0"), "--batch-size"),
        (("recalibrate", "few.keras", "--data", "x.npy"), "--out"),
        (("recalibrate", "few.keras", "--data", "x.npy", "--out", "n.txt"), "argument --out: must end with"),
        (("recalibrate", "few.keras", "--data", "x.npy", "--out", "n.keras", "--layers", "nope"), "layers must name"),
        (("recalibrate", "few.keras", "--data", "nan.npy", "--out", "n.keras"), "NaN or Inf"),
        (("recalibrate", "few.keras", "--data", "x.npy", "--out", "n.keras", "--estimator", "median"), "--estimator"),
    ],
)
def test_one_line_says_what_is_wrong(capsys, folder, arguments, words):
    status, out, err = run(capsys, folder, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("bnfast: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (folder / "n.keras").exists()


def test_a_model_that_keras_cannot_save(capsys, folder, monkeypatch):
    import keras

    def refuse(self, path):
        raise NotImplementedError("no\nway")

    monkeypatch.setattr(keras.Model, "save", refuse)
    status, out, err = run(capsys, folder, "recalibrate", "few.keras", "--data", "x.npy", "--out", "n.keras")
    assert (status, out, err) == (2, "", "bnfast: the model can't be saved: no way\n")
    assert not (folder / "n.keras").exists()


def test_a_keras_that_cannot_be_imported(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bnfast.keras", None)
    status, out, err = run(capsys, folder, "diagnose", "few.keras", "--data", "x.npy")
    assert (status, out) == (2, "")
    assert err == "bnfast: import of bnfast.keras halted; None in sys.modules\n"


def test_errors_of_tensorflow_are_the_user_s(folder):
    import tensorflow as tf

    def fail(kind):
        raise kind(None, None, "17\nGiB")

    assert saved_model.guarded(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^out of memory: use a smaller --batch-size$"):
        saved_model.guarded(lambda: fail(tf.errors.ResourceExhaustedError))
    with pytest.raises(UserError, match=r"^17 GiB$"):
        saved_model.guarded(lambda: fail(tf.errors.InvalidArgumentError))
    with pytest.raises(KeyError):
        saved_model.guarded(lambda: {}["a"])


def test_a_file_is_written_whole_or_not_at_all(capsys, folder, monkeypatch):
    from pathlib import Path

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    (folder / "kept.keras").write_bytes(b"before")
    status, _, err = run(capsys, folder, "recalibrate", "few.keras", "--data", "x.npy", "--out", "kept.keras")
    assert status == 2
    assert "No space left" in err
    assert (folder / "kept.keras").read_bytes() == b"before"
    assert not list(folder.glob(".kept*"))
