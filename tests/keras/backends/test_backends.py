"""Each backend of Keras in a process of its own, in which pytest runs the files of this folder (not named test_*)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need_module

HERE = Path(__file__).parent
FILES = [path.name for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_")]
# Of Keras 3.15.1 the suite has 33 + 7 + 12 tests. A file that is not collected must not pass for one that is green.
AT_LEAST = {"suite.py": 40, "layers.py": 25, "models.py": 8, "fusion.py": 20}
PACKAGES = {"tensorflow": "tensorflow", "torch": "torch", "jax": "jax"}  # backend: what it needs


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("backend", PACKAGES)
def test_on_a_backend(backend: str, file: str) -> None:
    need_module("keras")
    need_module(PACKAGES[backend])
    command = [sys.executable, "-m", "pytest", "-q", "-n0", str(HERE / file)]
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(command, env=environment, cwd=HERE.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= AT_LEAST[file], done.stdout


def test_every_file_has_a_least_number() -> None:
    assert set(FILES) == set(AT_LEAST)
