"""An output file that an interrupted run leaves half written beside it, and the same command goes on with.

answers.jsonl.partial:  {"settings": …}  line  line  …      ── complete ──►  answers.jsonl
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from samescore.runtime.errors import UsageError

SUFFIX = ".partial"


def json_line(record: Mapping[str, Any]) -> str:
    """An object as a line of JSONL, readable where UTF-8 can hold it: a lone surrogate of the input makes it ASCII."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record) + "\n"
    return line


class PartialFile:
    """Lines that are there (`kept`, how many) and more that are written. Each `write` is on the disk when it returns."""

    def __init__(self, stream: IO[bytes], kept: int):
        self._stream, self.kept = stream, kept

    def kept_records(self) -> Iterator[dict[str, Any]]:
        """The objects that an earlier run wrote."""
        self._stream.seek(0)
        self._stream.readline()  # the settings
        for line in islice(self._stream, self.kept):
            yield json.loads(line)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append some objects, a line each."""
        self._stream.write("".join(map(json_line, records)).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def resumable(
    path: str | os.PathLike[str], settings: Mapping[str, Any], *, group: int, fresh: bool
) -> Iterator[PartialFile]:
    """Write `path` in one or several runs. It appears when the block ends without an exception; else what was written stays.

    settings: what the lines depend on (JSON). group: lines that are kept or done again together. fresh: begin anew. UsageError
    when another run writes the file, or one with other settings began it.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name a file in it: -o {target / 'answers.jsonl'}")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder; make it first, or choose another -o")
    partial = target.with_name(target.name + SUFFIX)
    with partial.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another run is writing {partial}: wait for it, or choose another -o") from error
        header = (json.dumps({"settings": settings}, ensure_ascii=False, sort_keys=True) + "\n").encode()
        kept = _prepare(stream, header, partial, group=group, fresh=fresh)
        if kept:
            print(f"samescore: going on after {kept} lines of {partial}", file=sys.stderr)
        try:
            yield PartialFile(stream, kept)
        except BaseException:
            if _count(stream, len(header)) == 0:
                partial.unlink(missing_ok=True)  # nothing to go on with
            raise
        _publish(stream, len(header), target)
        partial.unlink()


def _prepare(stream: IO[bytes], header: bytes, partial: Path, *, group: int, fresh: bool) -> int:
    """Cut the file to the whole groups behind its header, or begin it; how many lines are kept."""
    stream.seek(0)
    first = stream.readline()
    if fresh or not first.endswith(b"\n"):
        stream.truncate(0)
        stream.write(header)
        stream.flush()
        return 0
    if first != header:
        raise UsageError(
            f"{partial} was begun with other settings ({_difference(first, header)}): run the same command to go on, "
            "begin anew with --fresh, or choose another -o"
        )
    ends: list[int] = []
    for line in stream:
        if line.endswith(b"\n"):
            ends.append((ends[-1] if ends else len(header)) + len(line))
    kept = len(ends) // group * group
    stream.truncate(ends[kept - 1] if kept else len(header))
    return kept


def _difference(first: bytes, header: bytes) -> str:
    """The names of the settings that differ."""
    now = json.loads(header)["settings"]
    try:
        before = json.loads(first)["settings"]
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    except (ValueError, KeyError, TypeError):
        return "it is no file of this command"
    return ", ".join(names)


def _count(stream: IO[bytes], start: int) -> int:
    stream.seek(start)
    return sum(1 for _ in stream)


def _publish(stream: IO[bytes], start: int, target: Path) -> None:
    """The lines without the header, in a file that appears whole."""
    staged = target.with_name(f".{target.name}.new")
    stream.seek(start)
    try:
        with staged.open("wb") as file:
            while part := stream.read(1 << 20):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
