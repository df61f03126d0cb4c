"""What `import bnfast` costs beyond NumPy."""

import subprocess
import sys

import pytest

MOST_MILLISECONDS = 15
CODE = """
import time, numpy
begin = time.process_time()
import bnfast
print(time.process_time() - begin)
"""


@pytest.mark.serial
def test_the_import_is_quick() -> None:
    """The best of ten processes, in processor time, as others use this machine, too. The first compiles the modules."""
    times = [
        float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, text=True).stdout)
        for _ in range(10)
    ]
    assert 1000 * min(times) <= MOST_MILLISECONDS, times
