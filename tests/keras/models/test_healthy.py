"""Healthy models of many kinds raise no alarm."""

from __future__ import annotations

import pytest
from bnfast.keras import diagnose
from model_state import state
from planted_faults import HEALTHY, KINDS


@pytest.mark.sample(len(HEALTHY))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HEALTHY)
def test_there_is_no_alarm(name, kind):
    planted = HEALTHY[name](kind)
    before = state(planted.model)
    found = diagnose(planted.model, planted.data, planted.targets, **planted.kwargs)
    assert found.verdicts == (), found
    assert "healthy" in str(found)
    assert "Cure" not in str(found)
    assert state(planted.model) == before
