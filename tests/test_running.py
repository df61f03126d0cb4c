"""The pytest plugin (helpers/running.py, sampling.py, turns.py): the samples, and that every test runs exactly once,
serial ones alone, with any number of processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sampling
import turns

HELPERS = Path(__file__).parent / "helpers"
PRODUCT = [{"a": a, "b": b, "c": c} for a, b, c in itertools.product(range(10), "xyz", (None, 1.0))]


@pytest.mark.parametrize("seed", ["0", "3e292ab1", "17"])
def test_a_sample_of_a_product_holds_every_value(seed):
    chosen = sampling.choose(PRODUCT, 20, seed)
    assert len(chosen) == 20
    assert chosen == sampling.choose(PRODUCT, 20, seed)
    for name in "abc":
        assert {PRODUCT[i][name] for i in chosen} == {case[name] for case in PRODUCT}
    assert len(sampling.choose(PRODUCT, 1, seed)) >= 10, "each of the ten values of a"


def test_a_sample_has_the_requested_size_and_depends_on_the_seed():
    cases = [{"a": i} for i in range(30)]
    samples = [sampling.choose(cases, 3, str(seed)) for seed in range(20)]
    assert {len(chosen) for chosen in samples} == {3}
    assert len(set().union(*samples)) > 20
    assert sampling.choose(cases, 99, "0") == set(range(30))


def test_shared_turns_overlap(tmp_path):
    both = threading.Barrier(2, timeout=60)  # breaks unless both threads are inside at once
    passed = []

    def test(name):
        with turns.turn(tmp_path, alone=False):
            both.wait()
            passed.append(name)

    threads = [threading.Thread(target=test, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sorted(passed) == [0, 1]


def test_an_exclusive_turn_is_alone(tmp_path):
    inside, seen = set(), []

    def test(name, alone):
        with turns.turn(tmp_path, alone=alone):
            inside.add(name)
            time.sleep(0.01)
            seen.append((alone, frozenset(inside)))
            inside.discard(name)

    threads = [threading.Thread(target=test, args=(i, i % 3 == 2)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(seen) == 9
    assert all(len(names) == 1 for alone, names in seen if alone)


FILE = """
import time
from pathlib import Path
import pytest

def note(name):
    begin = time.monotonic()
    time.sleep(0.03)
    Path(f"{name}.{time.monotonic_ns()}.ran").write_text(f"{begin} {time.monotonic()}")

@pytest.mark.sample(4)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(4))
def test_product(a, b, request):
    note(f"FILE-product-{a}-{b}")

@pytest.mark.serial
@pytest.mark.parametrize("a", range(3))
def test_serial(a):
    note(f"FILE-serial-{a}")
"""


@pytest.mark.parametrize("words", [("-n", "3", "--dist", "load"), ("-n", "0")], ids=["three workers", "one process"])
def test_every_test_runs_once_and_serial_ones_alone(words, tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["running"]\n')
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {HELPERS}\nmarkers =\n  sample(n): s\n  serial: s\n")
    for name in ("one", "two", "three"):
        (tmp_path / f"test_{name}.py").write_text(FILE.replace("FILE", name))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"BNFAST_SEED": "5", "BNFAST_WHOLE": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def ran(*more):
        for path in tmp_path.glob("*.ran"):
            path.unlink()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "no:cacheprovider", *words, *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        spans = {path.name: tuple(map(float, path.read_text().split())) for path in tmp_path.glob("*.ran")}
        for name, (begin, end) in spans.items():
            if "serial" in name:
                assert all(a >= end or b <= begin for other, (a, b) in spans.items() if other != name)
        return sorted(name.split(".")[0] for name in spans), done.stdout

    files = ("one", "two", "three")
    serial = [f"{name}-serial-{a}" for name in files for a in range(3)]
    product = [f"{name}-product-{a}-{b}" for name in files for a in range(3) for b in range(4)]
    names, said = ran("--whole")
    assert names == sorted(serial + product)
    assert "left out" not in said
    names, said = ran()
    assert set(serial) <= set(names) < set(serial + product)
    assert len(names) == len(set(names))
    out = len(serial + product) - len(names)
    assert f"{out} cases left out by BNFAST_SEED=5" in said
    names, _ = ran("--few", "1")
    for file in files:
        mine = [name.split("-") for name in names if name.startswith(file)]
        assert sum("serial" in name for name in mine) == 1
        products = [name[2:] for name in mine if "product" in name]
        assert len(products) < 12
        assert ({a for a, _ in products}, {b for _, b in products}) == (set("012"), set("0123")), "every value of each"
