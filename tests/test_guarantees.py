"""The measurements behind docs/guarantees.md find what they look for; CI runs a tenth of them in a stage of its own."""

import json
from typing import Any

import bnfast
import numpy as np
import pytest
from guarantees import __main__ as guarantees
from guarantees import calls, same_bits, views


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
