"""The bits of bnfast.cuda's results: golden.json was made with the emulator, and a GPU must give the same.

BNFAST_WRITE_GOLDEN=1 writes the file anew, after a change that is meant to change bits.
"""

import json
import os
from pathlib import Path

import pytest
from fake_cuda import Namespace
from golden_cases import CASES, Case, name_of, results

FILE = Path(__file__).parent / "golden.json"


@pytest.mark.parametrize("form", ["automatic", "sweeps", "channel", "resident"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_bits_are_the_known_ones_in_every_form(
    case: Case, form: str, dlpack: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNFAST_CUDA_FORM", form)
    found = results(case, dlpack)
    if os.environ.get("BNFAST_WRITE_GOLDEN") and form == "sweeps":
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        known[name_of(case)] = found
        FILE.write_text(json.dumps(known, indent=1) + "\n")
    assert json.loads(FILE.read_text())[name_of(case)] == found


def test_every_case_is_known_once() -> None:
    assert set(json.loads(FILE.read_text())) == {name_of(case) for case in CASES}
    assert len(CASES) == 20
