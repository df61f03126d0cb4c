"""`bnfast bench` from a checkout, without installing: python bench/peers.py --quick --shape 8,32

The built core (_core*.so) has to lie in python/bnfast/, or an installed bnfast is used.
"""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "python"
if any((PACKAGE / "bnfast").glob("_core.*.so")):
    sys.path.insert(0, str(PACKAGE))

from bnfast.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
