"""What report, fold and the summary of `bnfast run` print: tables and lists of names."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

MOST_NAMES = 3  # layers named per reason


def listed(names: Iterable[str]) -> str:
    """The first names, each once, and how many more there are."""
    once = list(dict.fromkeys(names))
    more = len(once) - MOST_NAMES
    return ", ".join(once[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns as wide as their cells."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (heads, *rows)]


def html_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for notebooks."""
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells) for cells in rows]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    return f"<div><p>{html.escape(title)}</p><table><tr>{head}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table></div>"


def check_verbose(verbose: object) -> int:
    """0, 1 or 2; False and True are 0 and 1."""
    if isinstance(verbose, int) and 0 <= verbose <= 2:
        return int(verbose)
    raise ValueError(f"verbose must be 0, 1 or 2. Received: {verbose!r}")
