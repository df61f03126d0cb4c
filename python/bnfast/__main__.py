"""`python -m bnfast` runs the command `bnfast`."""

import os
import sys


def _leave_working_directory() -> None:
    """Search the interpreter's folder first, as the command `bnfast` does, and not the working directory.

    `python -m` puts that directory first, so that a json.py lying there would run in place of Python's. Modules that
    Python imported on the way to this file (NumPy is one) were found there already: `python -P -m bnfast` prevents it.
    """
    try:
        searched = not sys.flags.safe_path and sys.path[0] == os.getcwd()
    except (OSError, IndexError):  # the directory was deleted
        return
    if searched:
        sys.path[0] = os.path.dirname(sys.executable)


if __name__ == "__main__":
    _leave_working_directory()
    from bnfast.cli import main

    sys.exit(main())
