"""For the tests of the command the machine is idle, whatever else runs: `bench` refuses to measure on a busy one."""

import pytest


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr("bnfast.benchmark.machine.others_busy", lambda: 0.0)
