"""Verdicts from figures made by hand: each rule's reasons, its limits, and what the reports say of it."""

from __future__ import annotations

import html
import json
import math
import sys

import numpy as np
import pytest
from bnfast.diagnosis.figures import LayerFigures, ModelFigures
from bnfast.diagnosis.report import Diagnosis
from bnfast.diagnosis.verdicts import RULES, judge

RNG = np.random.default_rng(0)
MEAN, VARIANCE = RNG.normal(1, 2, 16), RNG.uniform(0.1, 3, 16)
START = np.zeros(16), np.ones(16)


def mixed(share):
    return {
        "moving_mean": share * START[0] + (1 - share) * MEAN,
        "moving_variance": share * START[1] + (1 - share) * VARIANCE,
    }


def layer(**changes):
    known = {
        "name": "bn", "epsilon": 1e-3, "momentum": 0.99, "moving_mean": MEAN.copy(), "moving_variance": VARIANCE.copy(),
        "mean": MEAN, "variance": VARIANCE, "within": VARIANCE, "between": VARIANCE / 64, "count": 1e4, "batches": 10,
        "per_batch": 1e3, "samples": 64.0, "sites": [(MEAN, VARIANCE)], "start": START, "axis": (3,),
        "shape": (None, 8, 8, 16), "expected_axis": 3, "gamma": np.full(16, 0.9),
    }  # fmt: skip
    return LayerFigures(**{**known, **changes})


def model(*layers, **changes):
    known = {"samples": 640, "compared": 160, "batches": 10, "distance": 1.0, "batch_distance": 0.1, "iterations": 100}
    return ModelFigures("net", list(layers) or [layer()], **{**known, **changes})


def codes(figures):
    return [verdict.code for verdict in judge(figures)]


def test_no_gap_is_healthy():
    assert codes(model()) == []
    diagnosis = Diagnosis.of(model())
    assert diagnosis.healthy
    assert diagnosis.first_gap is None
    assert "net: healthy" in str(diagnosis)


def test_a_gap_without_effect_on_the_outputs_is_healthy():
    assert codes(model(layer(**mixed(0.5)), distance=0.05)) == []


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_the_number_of_updates_is_reckoned(share):
    (verdict,) = judge(model(layer(**mixed(share)), distance=1.0))
    assert verdict.code == "too-few-updates"
    done, more = math.log(share) / math.log(0.99), math.ceil(math.log(0.01 / share) / math.log(0.99))
    assert f"{share:.0%}" in verdict.reasons[0]
    assert f"about {done:.0f} updates at momentum 0.99" in verdict.reasons[1]
    assert f"{more} more updates" in verdict.reasons[1]


def test_without_a_momentum_updates_are_not_reckoned():
    (verdict,) = judge(model(layer(**mixed(0.3), momentum=None)))
    assert verdict.reasons == ("30% of what the moving statistics of bn started as is still in them.",)
    assert verdict.cure == "Recalibrate. Or train longer, or with a smaller momentum (0.9 needs 44 updates)."


def test_a_long_training_is_not_too_short():
    assert codes(model(layer(**mixed(0.5)), iterations=10_000)) == ["stale"]


def test_weights_that_grew_are_not_too_few_updates():
    grown = layer(moving_mean=0.6 * MEAN, moving_variance=0.05 * START[1] + 0.95 * VARIANCE * 0.3)
    assert codes(model(grown, iterations=None)) == ["stale"]


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({**mixed(1)}, "never-updated", "UPDATE_OPS"),
        ({**mixed(1), "frozen": True}, "never-updated", "frozen"),
        (
            {**mixed(1), "never_training": True},
            "never-updated",
            "training=False",
        ),
        ({"infinite_state": ("moving_variance",)}, "not-finite", "moving_variance"),
        ({"infinite_batches": 3, "dtype": "float16"}, "overflow", "65,504"),
        ({"axis": (1,)}, "wrong-axis", "axis 1"),
        ({"axis": (1, 3), "expected_axis": 1, "moving_mean": MEAN + 3}, "stale", "no other cause"),
        ({**mixed(1), "start": None}, "stale", "no other cause"),
        ({"axis": (0,), "expected_axis": None}, "wrong-axis", "samples' own"),
        ({"always_batch": "training=True"}, "always-training", "training=True"),
        ({"momentum": 0.1}, "momentum", "PyTorch"),
        ({"top_row": 7, "top_share": np.full(16, 0.9)}, "outlier", "sample 7"),
        ({"sites": [(MEAN, VARIANCE), (MEAN + 5, VARIANCE)]}, "shared", "2 times"),
        ({"between": VARIANCE / 2}, "mixed-batches", "10 batches"),
        ({"moving_mean": MEAN + 3, "frozen": True}, "frozen-other-data", "frozen"),
        ({"mean": MEAN, "variance": np.zeros(16), "moving_variance": np.zeros(16)}, "constant-channels", "16 of 16"),
        ({"other": (MEAN + 3, VARIANCE)}, "shifted-data", "data2"),
        ({"moving_mean": MEAN + 3, "step": 0.05}, "drift", "momentum 0.99"),
        ({"moving_mean": MEAN + 3}, "stale", "no other cause"),
    ],
)
def test_each_cause(changes, code, words):
    diagnosis = Diagnosis.of(model(layer(**changes)))
    first = diagnosis.verdicts[0]
    assert first.code == code
    assert any(words in reason for reason in first.reasons), first.reasons
    assert first.cure
    text, page = str(diagnosis), diagnosis._repr_html_()
    assert f"[{code}]" in text
    assert first.cure.split() == text.split("Cure: ")[1].split()[: len(first.cure.split())]
    assert max(map(len, text.splitlines())) <= 120
    assert html.escape(first.title) in page
    assert page.count("<td>") == 8
    found = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert found["verdicts"][0]["code"] == code
    assert found["healthy"] is False


def test_few_samples_raise_the_limit():
    off = layer(moving_mean=MEAN + 0.3 * np.sqrt(VARIANCE))
    assert codes(model(off, samples=640)) == ["stale"]
    assert codes(model(off, samples=30)) == []
    far = layer(moving_mean=MEAN + 9)
    assert codes(model(far, samples=30)) == ["stale"]
    diagnosis = Diagnosis.of(model(far, samples=3))
    assert diagnosis.verdicts == ()
    assert "3 samples are too few for a verdict" in str(diagnosis)
    assert "healthy" not in str(diagnosis)
    assert "30 samples are few" in str(Diagnosis.of(model(off, samples=30)))


def test_weights_cannot_drift_longer_than_they_were_trained():
    assert codes(model(layer(moving_mean=MEAN + 3, step=0.05), iterations=3)) == ["stale"]


def test_never_trained_needs_all_layers_fresh():
    fresh = {**mixed(1), "trained": False}
    assert codes(model(layer(**fresh), iterations=0)) == ["never-trained"]
    assert codes(model(layer(**fresh), iterations=5)) == ["never-updated"]


def test_small_batches():
    noisy = layer(samples=2.0, per_batch=2.0)
    assert codes(model(noisy, batch_distance=0.8)) == ["small-batches"]
    assert codes(model(noisy, batch_distance=0.2)) == []
    assert codes(model(layer(), batch_distance=0.8)) == []


@pytest.mark.filterwarnings("error")
def test_little_data_of_constant_channels_says_nothing():
    """Batches of few samples may be many rows: those of a layer over steps, say."""
    flat = layer(variance=np.zeros(16), moving_variance=np.zeros(16), between=np.zeros(16))
    assert codes(model(flat, samples=5)) == []


@pytest.mark.filterwarnings("error")
def test_a_layer_without_channels_has_no_gap():
    none = np.zeros(0)
    empty = layer(moving_mean=none, moving_variance=none, mean=none, variance=none, start=(none, none))
    assert empty.gap == 0


def test_other_weights_that_are_not_finite():
    diagnosis = Diagnosis.of(model(infinite_weights=("dense/kernel", "dense/bias")))
    assert [verdict.code for verdict in diagnosis.verdicts] == ["not-finite"]
    assert diagnosis.verdicts[0].layers == ()
    assert diagnosis.verdicts[0].reasons[0] == "weights with NaN or Inf: dense/kernel, dense/bias"
    both = judge(model(layer(infinite_state=("gamma",)), infinite_weights=("bn/gamma",)))[0]
    assert both.reasons[0] == "bn: gamma is not finite"
    assert len(both.reasons) == 2


def test_gammas_near_0_are_noted():
    weak = layer(gamma=np.array([1e-4, -1e-5, 0.0, *[0.9] * 13]))
    assert Diagnosis.of(model(weak)).to_dict()["layers"][0]["notes"] == ["3 gammas near 0"]


def test_epsilon():
    tiny, zero = VARIANCE * 1e-4, MEAN * 0
    small = layer(variance=tiny, moving_variance=tiny, between=tiny / 64, mean=zero, moving_mean=zero)
    scores = {"moving": {"loss": 1.0}}
    assert codes(model(small, scores=scores, epsilon_trial={1e-5: 0.5})) == ["epsilon"]
    assert codes(model(small, scores=scores, epsilon_trial={1e-5: 0.99})) == []
    assert codes(model(layer(), scores=scores, epsilon_trial={1e-5: 0.5})) == []  # no variance is small


def test_a_layer_that_uses_batches_on_purpose_has_no_gap():
    assert codes(model(layer(moving_mean=MEAN + 5, always_batch="use_batch_statistics"))) == []


def test_layers_without_values_do_not_disturb():
    absent = layer(name="absent", mean=None, variance=None, within=None, between=None, count=0.0, batches=0, sites=[])
    diagnosis = Diagnosis.of(model(layer(), absent, unreached=("branch",)))
    assert diagnosis.healthy
    assert "branch: the model doesn't call it" in str(diagnosis)
    seen, unseen = diagnosis.to_dict()["layers"]
    assert seen.keys() - unseen.keys() == {"mean", "variance", "constant_channels", "mean_off", "variance_log2"}
    assert unseen["notes"] == ["no values"]


def test_every_rule_has_been_seen():
    assert {rule.__name__.replace("_", "-") for rule in RULES} >= {"drift", "stale", "shared"}
    assert len(RULES) == 18


def test_the_picture(need, tmp_path):
    need("matplotlib")
    many = [layer(name=f"bn{i}", moving_mean=MEAN + 0.1 * i) for i in range(20)]
    Diagnosis.of(model(*many, layer(name="bad", infinite_state=("gamma",)))).plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "x.svg", "wb") as file:
        Diagnosis.of(model()).plot(file, format="svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()


def test_the_picture_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'^plot needs matplotlib: pip install "bnfast\[demo\]"$'):
        Diagnosis.of(model()).plot(tmp_path / "x.png")
    assert not any(tmp_path.iterdir())
