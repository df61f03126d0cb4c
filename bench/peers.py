"""Runs `bnfast bench` from a checkout, without installing it: python bench/peers.py --quick --shape 8,32

It uses the package in python/ if the built core (_core*.so) is in python/bnfast/, else an installed bnfast.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "python"
if any((PACKAGE / "bnfast").glob("_core.*.so")):
    sys.path.insert(0, str(PACKAGE))

from bnfast.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
