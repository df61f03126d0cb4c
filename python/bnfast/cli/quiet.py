"""TensorFlow without its start-up noise.

Its C++ side writes to file descriptor 2 before any logging level applies, so the descriptor itself is set aside for a
moment. Nothing is lost: where the work inside fails, what was written there is shown.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator


def prepare_tensorflow() -> None:
    """Choose quiet logging and Keras's TensorFlow backend. No effect on a process that has imported them already."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "tensorflow"  # the one backend bnfast.keras works with


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Set file descriptor 2 aside; write what came meanwhile if the block raises."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except BaseException:
            _restore(saved)
            noise.seek(0)
            with os.fdopen(os.dup(2), "wb") as stderr:
                shutil.copyfileobj(noise, stderr)
            raise
        _restore(saved)


def _restore(saved: int) -> None:
    os.dup2(saved, 2)
    os.close(saved)
