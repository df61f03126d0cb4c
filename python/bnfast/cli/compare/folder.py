"""A copy of the working directory for one run of a script: what it writes there doesn't stay, and every run starts
from the same files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bnfast.cli.errors import UserError

MOST_BYTES = 2**30
LEFT_OUT = {".git", ".hg", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", "node_modules"}


def check(source: Path) -> None:
    """Raises UserError if the folder is too large to be copied."""
    size = 0
    for path, names in _walk(source):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(path / name).st_size
        if size > MOST_BYTES:
            raise UserError(
                f"run --compare works in copies of the working directory, and {source} has more than 1 GiB. Start in a "
                "smaller one, or pass --in-place: then the script writes its files where it always does"
            )


@contextlib.contextmanager
def copy(source: Path) -> Iterator[Path]:
    """A temporary copy of `source`, without virtual environments and what tools keep."""
    with tempfile.TemporaryDirectory(prefix="bnfast-", ignore_cleanup_errors=True) as temporary:
        target = Path(temporary).resolve() / source.name
        for path, names in _walk(source):
            there = target / path.relative_to(source)
            there.mkdir(parents=True, exist_ok=True)
            for name in names:
                _copy_file(path / name, there / name, source)
        yield target


def moved(path: str, source: Path, target: Path) -> str:
    """The script's path, seen from the copy: one inside `source` by its name there, any other absolute."""
    absolute = Path(os.path.abspath(path))
    if not absolute.is_relative_to(source):
        return str(absolute)
    return str(target / absolute.relative_to(source)) if Path(path).is_absolute() else path


def _walk(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder that is copied, and its files and links."""
    for path, folders, files in os.walk(source):
        here = Path(path)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [
            name
            for name in folders
            if name not in LEFT_OUT and name not in links and not (here / name / "pyvenv.cfg").exists()
        ]
        yield here, [*files, *links]


def _copy_file(path: Path, there: Path, source: Path) -> None:
    """A file, or a link: one out of `source` then names an absolute path. Left out are
    sockets and the like."""
    if path.is_symlink():
        text = os.readlink(path)
        end = Path(os.path.abspath(path.parent / text))
        there.symlink_to(text if end.is_relative_to(source) and not os.path.isabs(text) else end)
    elif path.is_file():
        with contextlib.suppress(PermissionError):  # the script can't read it either
            shutil.copy2(path, there)
