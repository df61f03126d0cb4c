"""The layer in a TF 1 program. Disabling eager execution affects the whole process, so the test runs a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

SCRIPT = Path(__file__).parents[2] / "scripts" / "eager_disabled.py"


@pytest.mark.usefixtures("each_bridge")
def test_without_eager_execution() -> None:
    """Outputs, gradients and weights equal those of Keras's layer; the program runs the updates as assign ops."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "5 cases and a placeholder for training"
