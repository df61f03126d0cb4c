"""Colours and Matplotlib settings shared by the pictures of `bnfast demo` and `bnfast bench`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

INK = "#1f2933"
MUTED = "#66727f"
OURS = "#0b5c6b"
SETTINGS: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c8ced4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#e9edf0",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """Inside the block Matplotlib has its defaults and SETTINGS; nothing of a `matplotlibrc`, which Matplotlib reads
    from the working directory too."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield
