"""What a shared library asks the dynamic loader for: the NEEDED and RUNPATH entries of a 64-bit little-endian ELF file.

Read here because a slim container has neither `readelf` nor a working `ldd` (which would run the library's own loader).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from samescore.runtime.errors import BundleError

_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRTAB, _RPATH, _RUNPATH = 1, 5, 15, 29


@dataclass(frozen=True)
class SharedLibrary:
    """needed: names of the libraries it is linked against, in order. search: its own folders for them, `$ORIGIN` resolved."""

    needed: tuple[str, ...]
    search: tuple[str, ...]


def read_shared_library(path: Path) -> SharedLibrary:
    """The dynamic section of `path` (ELF-64 little-endian, System V ABI chapter 5). BundleError where it is no such file."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                raise BundleError(f"{path} is no 64-bit little-endian ELF file")
            (offset,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(offset)
            table = file.read(size * count)
            segments = [struct.unpack_from("<IIQQQQ", table, i * size) for i in range(count)]
            dynamic = next((s for s in segments if s[0] == _DYNAMIC), None)
            if dynamic is None:
                return SharedLibrary((), ())
            file.seek(dynamic[2])
            raw = file.read(dynamic[5])
            entries = [struct.unpack_from("<qQ", raw, i) for i in range(0, len(raw) - 15, 16)]
            address = next(value for tag, value in entries if tag == _STRTAB)
            # The table's address in memory, turned into a place in the file by the segment that holds it.
            segment = next(s for s in segments if s[0] == _LOAD and s[3] <= address < s[3] + s[5])
            strings = segment[2] + address - segment[3]

            def text(at: int) -> str:
                file.seek(strings + at)
                return file.read(4096).split(b"\0", 1)[0].decode(errors="replace")

            needed = tuple(text(value) for tag, value in entries if tag == _NEEDED)
            folders = ":".join(text(value) for tag, value in entries if tag in (_RPATH, _RUNPATH))
    except (struct.error, StopIteration) as error:
        raise BundleError(f"{path} is a damaged ELF file") from error
    origin = str(path.resolve().parent)
    found = (part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for part in folders.split(":"))
    return SharedLibrary(needed, tuple(part for part in found if part))
