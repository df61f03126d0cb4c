"""What a 64-bit little-endian ELF library says of itself: the names that it exports and needs, its dynamic section and
its segments. Read with struct, because an environment without a compiler has no nm.

Source: the ELF specification, and elf.h for the numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_DYNAMIC, _DYNSYM = 6, 11  # section types
_NEEDED, _RPATH, _FLAGS, _RUNPATH, _FLAGS_1 = 1, 15, 30, 29, 0x6FFFFFFB  # tags of the dynamic section
_BIND_NOW, _NOW = 8, 1  # of _FLAGS, of _FLAGS_1
_GNU_STACK, _GNU_RELRO = 0x6474E551, 0x6474E552  # segment types


class Library:
    def __init__(self, path: Path) -> None:
        self._data = data = path.read_bytes()
        assert data[:6] == b"\x7fELF\x02\x01", path
        segments, sections = struct.unpack_from("<QQ", data, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", data, 54)
        self._segments = [struct.unpack_from("<II", data, segments + i * segment_size) for i in range(segment_count)]
        # name, type, flags, address, offset, size, link, info, alignment, size of an entry
        self._sections = [
            struct.unpack_from("<IIQQQQIIQQ", data, sections + i * section_size) for i in range(section_count)
        ]
        self._dynamic = list(self._tags())

    def _text(self, table: int, at: int) -> str:
        start = self._sections[table][4] + at
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _tags(self) -> Iterator[tuple[int, int, int]]:
        """Tag, value and string table of each entry of the dynamic section."""
        for _, kind, _, _, offset, size, link, *_ in self._sections:
            if kind == _DYNAMIC:
                for at in range(offset, offset + size, 16):
                    yield (*struct.unpack_from("<QQ", self._data, at), link)

    def _symbols(self) -> Iterator[tuple[str, bool]]:
        """The name of each dynamic symbol, and whether the library defines it."""
        for _, kind, _, _, offset, size, link, *_ in self._sections:
            if kind == _DYNSYM:
                for at in range(offset + 24, offset + size, 24):
                    name, _, _, section = struct.unpack_from("<IBBH", self._data, at)
                    yield self._text(link, name), section != 0

    def _values(self, wanted: int) -> list[int]:
        return [value for tag, value, _ in self._dynamic if tag == wanted]

    @property
    def exports(self) -> set[str]:
        return {name for name, defined in self._symbols() if defined}

    @property
    def imports(self) -> set[str]:
        return {name for name, defined in self._symbols() if not defined}

    @property
    def needed(self) -> set[str]:
        """The file names of the libraries that the loader brings with it."""
        return {self._text(table, value) for tag, value, table in self._dynamic if tag == _NEEDED}

    @property
    def run_paths(self) -> set[str]:
        return {self._text(table, value) for tag, value, table in self._dynamic if tag in (_RPATH, _RUNPATH)}

    @property
    def binds_now(self) -> bool:
        return any(value & _BIND_NOW for value in self._values(_FLAGS)) or any(
            value & _NOW for value in self._values(_FLAGS_1)
        )

    @property
    def has_relro(self) -> bool:
        """Whether what the loader has resolved is made read-only. With `binds_now` that is all of it: full RELRO."""
        return any(kind == _GNU_RELRO for kind, _ in self._segments)

    @property
    def has_executable_stack(self) -> bool:
        return any(kind == _GNU_STACK and flags & 1 for kind, flags in self._segments)
