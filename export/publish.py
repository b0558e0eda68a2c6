"""Writing a bundle so that a crash leaves the old one or none."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import MANIFEST_NAME, FileEntry

_STAGING = ".staging-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that is removed on any error; call `publish` inside to put it in place.

    What a killed export left behind is removed first: a staging folder is locked while its maker lives.
    """
    target = Path(os.path.abspath(target))
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}{_STAGING}", dir=target.parent))
    lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def check_target(target: Path) -> None:
    """UsageError when `target` exists and is not a bundle: nothing else is ever replaced."""
    if not target.exists() and not target.is_symlink():
        return
    empty = target.is_dir() and not any(target.iterdir())
    if target.is_symlink() or not (empty or (target / MANIFEST_NAME).is_file()):
        raise UsageError(f"{target} exists and is not a bundle; it will not be replaced. Choose another -o")


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file below `folder`, by relative path."""
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries[path.relative_to(folder).as_posix()] = FileEntry(path.stat().st_size, digest)
    return entries


def publish(staging: Path, target: Path) -> None:
    """Make `staging` durable and put it at `target` in one step; an old bundle there is removed afterwards."""
    target = Path(os.path.abspath(target))
    staging.chmod(0o755)
    for path in sorted(staging.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(staging)
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        retired = Path(tempfile.mkdtemp(prefix=f".{target.name}{_STAGING}", dir=target.parent))
        target.rename(retired)
        staging.rename(target)
        shutil.rmtree(retired, ignore_errors=True)
    _fsync(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); False where the kernel or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sweep(target: Path) -> None:
    for stale in target.parent.glob(f".{target.name}{_STAGING}*"):
        try:
            lock = os.open(stale, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            pass  # another export is at work
        finally:
            os.close(lock)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
