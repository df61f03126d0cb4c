"""The progress bar of long commands. It is drawn on stdout, and only if stdout is a terminal.

stderr is redirected while TensorFlow starts (bnfast.benchmark.quiet), so the bar can't be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bar(*, remaining: bool = True) -> Progress:
    """A bar that vanishes when it is done, with the time remaining or else the time elapsed.

    It is redrawn once per second, so that it disturbs the measured code as little as possible.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    time_column = TimeRemainingColumn() if remaining else TimeElapsedColumn()
    columns = (BarColumn(), MofNCompleteColumn(), time_column, TextColumn("{task.description}"))
    console = Console()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=1)
