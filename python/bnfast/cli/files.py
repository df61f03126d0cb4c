"""The files that a command writes: all of them whole, or none.

Their contents are made in memory and written to temporary files beside them, which are renamed when the last one is
complete. A full disk or an interrupt so leaves neither a part of a file nor an empty one, and earlier files stay.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bnfast.cli.errors import UserError


def prepare(option: str, paths: list[Path]) -> None:
    """Create the folder of `paths`. Raises UserError if they can't be written: now, not after minutes of work."""
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise UserError(f"argument {option}: can't write to {path}: it is not a file")
            if path.exists():
                path.open("r+b").close()
            temporary = _temporary(path)
            temporary.open("xb").close()
            temporary.unlink()
        except OSError as error:
            raise UserError(f"argument {option}: can't write to {path}: {error.strerror}") from error


def save(contents: Mapping[Path, bytes]) -> None:
    """Write all files. Raises UserError if one can't be written; then none is."""
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            target = path.resolve()  # renaming onto a symbolic link would replace the link
            written[target] = _temporary(target)
            with written[target].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only here
        for path, temporary in written.items():
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    finally:
        for temporary in written.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def picture(draw: Callable[..., None], *arguments: Any, **keywords: Any) -> bytes:
    """The PNG that draw(file, ...) writes."""
    buffer = io.BytesIO()
    draw(buffer, *arguments, **keywords)
    return buffer.getvalue()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
