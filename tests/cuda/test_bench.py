"""bench/cuda as far as it goes without a GPU: its calls on the driver of the tests, its table, its shell script."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import Driver, Namespace

pytest.importorskip("torch")
import torch

FOLDER = Path(__file__).parents[2] / "bench" / "cuda"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks aren't part of a source distribution")


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_cuda_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


class Event:
    """torch.cuda.Event: each call takes the time that the test says."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 0.25
        self.at = Event.clock

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


@pytest.fixture
def device(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    xp = Namespace("torch", monkeypatch, driver)
    card = types.SimpleNamespace(name="none", multi_processor_count=3, L2_cache_size=100)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    return xp


def test_the_small_calls_run(device: Namespace, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = module("checks")
    monkeypatch.setattr(
        checks, "make", lambda shape, dtype=torch.float32: torch.randn(shape).to(dtype).as_subclass(device.classes[0])
    )
    before = driver.launches
    assert checks.in_every_form(checks.small)
    assert driver.launches > before + 400
    assert not checks.in_every_form(lambda: os.environ["BNFAST_CUDA_FORM"] != "resident")
    assert "BNFAST_CUDA_FORM" not in os.environ


@pytest.mark.parametrize("kind", ["train", "grad", "infer", "train+relu", "grad+relu"])
@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_one_row_is_measured(device: Namespace, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module("measure")
    own = {name: getattr(torch, name) for name in ("randn", "rand")}
    for name, function in own.items():
        monkeypatch.setattr(
            torch,
            name,
            lambda *shape, device=None, function=function, **kwargs: function(*shape, **kwargs).as_subclass(on),
        )
    on = device.classes[0]
    row = measure.measure(measure.Work(2, 3, 4, "float32", layout), kind, rounds=3)
    names = ("bnfast", "sweeps", "copy", "cudnn", "aten")
    assert {name: row[name]["us"] for name in names} == dict.fromkeys(names, 250.0)
    wanted = "sweep" if kind == "infer" else "resident" if layout == "channels_last" else "channel"
    assert f"bnfast_{wanted}_" in row["kernels"][0]
    assert row["bytes"] == 2 * 3 * 16 * 4
    json.dumps(row)


def test_ours_and_torchs_results_agree(device: Namespace) -> None:
    """What is compared computes the same."""
    measure = module("measure")
    rng = np.random.default_rng(0)
    for kind in ("train", "infer", "train+relu"):
        a: dict[str, Any] = {
            name: device.to(rng.normal(size=(4, 3, 5, 5)).astype("float32")) for name in ("x", "dy", "residual")
        }
        a |= {name: device.to(rng.uniform(0.5, 2, 3).astype("float32")) for name in ("gamma", "beta")}
        other = dict(a)
        for each in (a, other):
            each["mean"], each["variance"] = (device.to(np.full(3, value, "float32")) for value in (0.5, 2.0))
        y, wanted = measure.ours(kind)(a), measure.torchs(kind, False)(other)
        y = y if kind == "infer" else y.y
        np.testing.assert_allclose(device.host(y), device.host(wanted), rtol=1e-5, atol=1e-5)


def results(**times: float) -> dict[str, Any]:
    """What measure.py writes, with the same times in every row."""
    rows = []
    for layout in ("channels_last", "channels_first"):
        for N, C, height in ((64, 64, 56), (64, 256, 56), (8, 64, 7)):
            size = N * C * height**2 * 2
            for kind in ("train", "grad", "infer", "train+relu", "grad+relu"):
                row = {"N": N, "C": C, "height": height, "dtype": "bfloat16", "layout": layout, "bytes": size}
                rows.append({**row, "kind": kind, **{name: {"us": us} for name, us in times.items()}})
    host = dict.fromkeys(("train", "grad", "infer"), times["bnfast"])
    return {"card": "none", "sms": 3, "torch": "0", "cuda": "0", "host_us": host, "rows": rows}


def test_goals_are_met_or_not(tmp_path: Path) -> None:
    goals = module("goals")
    fast = goals.lines(results(bnfast=8.0, copy=10.0, cudnn=20.0, aten=16.0))
    assert len(fast) == 14
    assert [line.goal for line in fast if line.worst > 1] == []
    slow = goals.lines(results(bnfast=40.0, copy=10.0, cudnn=20.0, aten=16.0))
    assert [line.goal for line in slow if line.worst <= 1] == []
    peers = goals.lines(results(bnfast=16.0, copy=100.0, cudnn=20.0, aten=16.0))
    assert [line.worst <= 1 for line in peers if "1.3x" in line.goal] == [False, False]
    assert [line.worst <= 1 for line in peers if "0.95x" in line.goal] == [True, True]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(bnfast=16.0, copy=100.0, cudnn=20.0, aten=16.0)))
    done = subprocess.run([sys.executable, FOLDER / "goals.py", file], capture_output=True, text=True, check=True)
    assert "NOT MET" in done.stdout
    assert "\nmet " in done.stdout


def test_the_script_is_one_and_names_what_it_does_not_know() -> None:
    script = FOLDER / "run.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "--fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown argument: --fly" in done.stderr
    text = script.read_text()
    for name in ("golden", "checks.py", "measure.py", "goals.py", "memcheck", "racecheck", "initcheck"):
        assert name in text
