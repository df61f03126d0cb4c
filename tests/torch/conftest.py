"""Without PyTorch this folder is not collected; BNFAST_REQUIRE=torch makes that an error."""

import importlib.util

import pytest
from needs import REQUIRED

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]
if collect_ignore_glob and "torch" in REQUIRED:
    raise pytest.UsageError("torch is in BNFAST_REQUIRE, but it isn't installed")
