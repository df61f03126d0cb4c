"""Every verdict, planted in an MLP, a CNN and a residual network of the digits: diagnose names it and the layer."""

from __future__ import annotations

import pytest
from bnfast.keras import diagnose
from model_state import state
from planted_faults import FAULTS, KINDS


@pytest.mark.sample(len(FAULTS))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_named(fault, kind):
    planted = FAULTS[fault](kind)
    before = state(planted.model)
    found = diagnose(planted.model, planted.data, planted.targets, **planted.kwargs)
    assert state(planted.model) == before
    assert found.verdicts, found
    first = found.verdicts[0]
    assert first.code == planted.verdict, found
    if planted.layer is not None:
        assert first.layers[0] == planted.layer, found
    assert first.cure
    assert first.reasons
    assert not found.healthy
    assert [verdict.code for verdict in found.verdicts[1:]] == [], "one fault, one verdict"
