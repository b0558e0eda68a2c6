"""Logits on disk, text by text as they are made, so that measuring continues after it was killed.

    $SAMESCORE_CACHE, else $XDG_CACHE_HOME/samescore, else ~/.cache/samescore
    └── logits/<SHA-256 of the key>.jsonl
        {"key": {...}}                                         what computed them, and everything that decides the numbers
        {"ids": "9f86d0…", "logits": ["0x1.8p+0", ...]}        of a text's ids; of label tokens also "mass"

A file only grows, by whole lines under a lock, so several processes may use it. A torn last line is dropped when the file
is next opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import ModelBytes
from samescore.runtime.cache import cache_folder
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.prefill import Ids
from samescore.runtime.providers import import_onnxruntime

log = logging.getLogger(__name__)

KEPT_DAYS = 30
FSYNC_SECONDS = 1.0

Key = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One text's logits float32 [labels]; of label tokens also their label mass (see `next_token`), else None."""

    logits: npt.NDArray[np.float32]
    label_mass: float | None = None


class Rows:
    """What one computation made of texts, by their ids; `with Rows() as rows`. May be used by several threads.

    path: where they are kept; None: in memory only. reads: whether what an earlier run kept counts.
    """

    def __init__(self, path: Path | None = None, key: Key | None = None, *, reads: bool = True):
        self._rows: dict[str, Row] = {}
        self._stored: dict[str, Row] = {}
        self._lock = threading.Lock()
        self._file: int | None = None
        self._synced = time.monotonic()
        if path is not None:
            with _going_on_without():
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                self._stored = self._load({} if key is None else key)
        if reads:
            self._rows.update(self._stored)

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    os.fsync(self._file)
                os.close(self._file)
                self._file = None

    def get(self, ids: Ids) -> Row | None:
        """What is known of a text's ids int64 [sequence]."""
        return self._rows.get(_digest(ids))

    def keep(self, ids: Ids, row: Row) -> None:
        """Remember a row, on disk too unless it lies there already."""
        name = _digest(ids)
        document: dict[str, Any] = {"ids": name, "logits": [float(value).hex() for value in row.logits]}
        if row.label_mass is not None:
            document["mass"] = float(row.label_mass).hex()
        with self._lock:
            self._rows[name] = row
            if self._file is None or _same(self._stored.get(name), row):
                return
            file, self._file = self._file, None
            with _going_on_without():
                self._append(file, document)
                self._file = file
            if self._file is None:
                os.close(file)

    def _append(self, file: int, document: Key) -> None:
        with _locked(file):
            _write_line(file, document)
        if time.monotonic() - self._synced >= FSYNC_SECONDS:
            os.fsync(file)
            self._synced = time.monotonic()

    def _load(self, key: Key) -> dict[str, Row]:
        """The rows of the file, repaired: without a torn last line, begun anew if it is not of this key."""
        assert self._file is not None
        with _locked(self._file):
            raw = _read_all(self._file)
            whole = raw[: raw.rfind(b"\n") + 1]
            first, _, rest = whole.partition(b"\n")
            header = {"key": dict(key)}
            if _parsed(first) != header:
                os.ftruncate(self._file, 0)
                _write_line(self._file, header)
                return {}
            if len(whole) < len(raw):
                os.ftruncate(self._file, len(whole))
            os.utime(self._file)
        found = {}
        for line in rest.split(b"\n"):
            if (row := _row(_parsed(line))) is not None:
                found[row[0]] = row[1]
        return found


@dataclass(frozen=True)
class Store:
    """The folder of kept logits. reads: whether what earlier runs kept counts; what is measured is kept in any case."""

    reads: bool = True

    def rows(self, key: Key) -> Rows:
        """What is kept under this key, on this CPU with this samescore; files that nobody used for KEPT_DAYS are removed."""
        whole = {**key, "cpu": cpu_model(), "flags": list(int8_flags()), "samescore": metadata.version("samescore")}
        with _going_on_without():
            folder = cache_folder() / "logits"
            folder.mkdir(parents=True, exist_ok=True)
            _remove_old(folder)
            name = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
            return Rows(folder / f"{name}.jsonl", whole, reads=self.reads)
        return Rows()

    def variant_rows(self, model: ModelBytes, target: str, prefix: Ids) -> Rows:
        """What is kept of a variant, by the bytes of its graph and weights; in memory only for what is not the CPU.

        prefix: the ids that are read once (`TextEncoder.prefix_ids`).
        """
        if target != "cpu":
            return Rows()
        weights = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(model.data.items())}
        return self.rows(
            {
                "what": "variant",
                "graph": hashlib.sha256(model.graph).hexdigest(),
                "weights": weights,
                "target": target,
                "onnxruntime": str(import_onnxruntime().__version__),
                "prefix": _digest(prefix),
            }
        )


def _remove_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 86400
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if path.stat().st_mtime < oldest:
                path.unlink()


@contextlib.contextmanager
def _going_on_without() -> Iterator[None]:
    """Go on without the store where it cannot be used, and say so once."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        _say(str(error))


@functools.cache
def _say(reason: str) -> None:
    log.warning(
        "logits cannot be kept on disk (%s), so a run that is interrupted will begin anew. Set SAMESCORE_CACHE to a folder "
        "that can be written",
        reason,
    )


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _write_line(file: int, document: Key) -> None:
    """Append a whole line, or nothing."""
    raw = json.dumps(document).encode() + b"\n"
    size = os.fstat(file).st_size
    if os.write(file, raw) != len(raw):
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_all(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(os.dup(file), "rb") as stream:
        return stream.read()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _row(document: Any) -> tuple[str, Row] | None:
    """A line's row; None for anything else."""
    try:
        logits = np.array([float.fromhex(value) for value in document["logits"]], np.float32)
        mass = None if "mass" not in document else float.fromhex(document["mass"])
        name = document["ids"]
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    return (name, Row(logits, mass)) if isinstance(name, str) and len(logits) else None


def _same(one: Row | None, other: Row) -> bool:
    return one is not None and one.logits.tobytes() == other.logits.tobytes() and one.label_mass == other.label_mass


def _digest(ids: Ids) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, np.dtype("<i8")).tobytes()).hexdigest()
