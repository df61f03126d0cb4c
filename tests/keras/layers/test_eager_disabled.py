"""The layer in a TF 1 program: eager execution is disabled for a whole process, so the test is a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorflow")

SCRIPT = Path(__file__).parents[2] / "scripts" / "eager_disabled.py"


@pytest.mark.usefixtures("each_bridge")
def test_without_eager_execution() -> None:
    """As Keras's layer: outputs, gradients, weights; updates are assign ops for the program to run."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "5 cases and a placeholder for training"
