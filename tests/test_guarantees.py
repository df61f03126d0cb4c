"""The measurements behind docs/guarantees.md find what they look for; CI runs a tenth of them in a stage of its own."""

import json
from typing import Any

import bnfast
import numpy as np
import pytest
from bnfast.benchmark.peers.ours import Ours
from guarantees import __main__ as guarantees
from guarantees import calls, hostile, peers, same_bits, views


@pytest.mark.serial
@pytest.mark.parametrize("name", list(guarantees.ROWS))
def test_a_promise_is_kept(name: str) -> None:
    if name == "half_types":
        pytest.importorskip("ml_dtypes")
    row = guarantees.ROWS[name]
    figures = row.measure(0.002)
    assert row.kept(figures), guarantees.said(row, figures)


def test_the_page_says_the_figures() -> None:
    data = json.loads(guarantees.DATA.read_text())
    assert guarantees.PAGE.read_text() == guarantees.page(data)
    assert all(row.kept(data["rows"][name]) for name, row in guarantees.ROWS.items())


def test_the_page_of_accuracy_says_the_figures() -> None:
    assert peers.PAGE.read_text() == peers.page(json.loads(peers.DATA.read_text()))


@pytest.mark.parametrize("op", peers.OPS)
def test_an_error_of_a_peer_is_found(op: str) -> None:
    case = peers.Case(peers.NamedShape("small", "2x3x4x4", 2, 3, (4, 4)), "channels_first", op, "float32")
    arrays = peers.inputs(case, 1.0)
    calls = Ours(1).prepare(case, arrays)
    result = calls.read(calls.fresh())
    right = peers.error(case, arrays, result)
    name = "y" if op == "train" else "dx"
    result[name] = result[name] + np.float32(1e-2)
    assert right < 2
    assert peers.error(case, arrays, result) > 100
    result[name] = np.full_like(result[name], np.nan)
    assert peers.error(case, arrays, result) == float("inf")


def test_an_error_of_another_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*_: Any, **__: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(bnfast, "batch_norm_train", careless)
    assert hostile.measure(3)["failures"]


def test_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = bnfast.batch_norm_train, []

    def wrong(*args: Any, **words: Any) -> Any:
        result = own(*args, **words)
        seen.append(result)
        if len(seen) % 7 == 0:
            result.y.flat[0] = np.nextafter(result.y.flat[0], np.array(9, result.y.dtype))
        return result

    monkeypatch.setattr(bnfast, "batch_norm_train", wrong)
    assert same_bits.measure(20)["different"]
    assert views.measure(20)["failures"]


def test_a_changed_argument_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = bnfast.moments

    def careless(x: Any, **words: Any) -> Any:
        result = own(x, **words)
        x += 1
        return result

    monkeypatch.setattr(bnfast, "moments", careless)
    assert calls.measure(50, 0)["failures"]
