"""A bundle on disk, opened so that what is checked is what is read.

Every file is opened once, without following links, below the bundle's own folder descriptor; its size and SHA-256 are
compared with the manifest through that same descriptor, and the very bytes that were hashed are handed on. A file
swapped after the check is therefore never read.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import shutil
import stat
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from samescore.runtime.errors import BundleError, UsageError
from samescore.runtime.manifest import MANIFEST_LIMIT, MANIFEST_NAME, Manifest, Variant, parse_manifest

_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class ModelBytes:
    """A variant's files, verified: the graph's bytes, and each external data file by the name the graph uses."""

    graph: bytes
    data: dict[str, mmap.mmap]

    @functools.cached_property
    def on_disk(self) -> Path:
        """A private folder with a copy of the external data, for readers that take only files; gone with this object.

        The bundle's own files will not do: they could be swapped after they were verified. OSError when it does not fit.
        """
        folder = Path(tempfile.mkdtemp(prefix="samescore-weights-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, buffer in self.data.items():
            (folder / name).write_bytes(buffer)
        return folder


class Bundle:
    """An opened bundle folder; `with Bundle(path) as bundle`. BundleError says what is wrong with it."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BundleError(
                f"there is no bundle at {self.path}. Make one: samescore export SOURCE -o {self.path}"
            ) from None
        except NotADirectoryError:
            raise BundleError(f"{self.path} is a file; a bundle is a folder that holds {MANIFEST_NAME}") from None
        except OSError as error:
            raise BundleError(f"{self.path} cannot be opened: {error.strerror}") from error
        try:
            raw = self._read_manifest()
            self.manifest: Manifest = parse_manifest(raw)
        except BaseException:
            self.close()
            raise
        self.digest = hashlib.sha256(raw).hexdigest()

    def require_classifier(self, work: str) -> None:
        """UsageError for a model that generates text; work: what is done with classifiers alone."""
        if self.manifest.generation is not None:
            raise UsageError(
                f"{self.path} holds a model that generates text, and samescore {work} is for classifiers: samescore verify "
                f"{self.path} measures its certificate again, samescore audit lets classifiers judge what it writes"
            )

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the folder descriptor; buffers that were handed out stay valid."""
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def read(self, name: str) -> bytes:
        """The verified bytes of one file, copied into memory."""
        with self.map(name) as mapped:
            return mapped[:]

    def map(self, name: str) -> mmap.mmap:
        """The verified bytes of one file, memory-mapped read-only from the descriptor that was hashed."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                f"{self.path}: {MANIFEST_NAME} lists no file {name!r}; it lists: {', '.join(self.manifest.files)}"
            )
        descriptor = self._open(name)
        try:
            size = os.fstat(descriptor).st_size
            if size != entry.size:
                raise BundleError(
                    f"{self.path / name} holds {size} bytes, the manifest says {entry.size}: copy the bundle again"
                )
            if size == 0:
                raise BundleError(f"{self.path / name} is empty")
            mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(descriptor)
        if hashlib.sha256(mapped).hexdigest() != entry.sha256:
            mapped.close()
            raise BundleError(
                f"{self.path / name} is damaged: its SHA-256 is not the manifest's. Copy the bundle again"
            )
        return mapped

    def model(self, variant: Variant) -> ModelBytes:
        """The verified graph and weights of a variant."""
        data = {name.rpartition("/")[2]: self.map(name) for name in variant.data}
        return ModelBytes(graph=self.read(variant.model), data=data)

    def verify_files(self) -> int:
        """Hash every file that the manifest lists; the number of bytes read. BundleError at the first bad one."""
        for name in self.manifest.files:
            self.map(name).close()
        return sum(entry.size for entry in self.manifest.files.values())

    def _read_manifest(self) -> bytes:
        try:
            descriptor = self._open(MANIFEST_NAME)
        except BundleError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise BundleError(f"{self.path} is no bundle: it holds no {MANIFEST_NAME}") from None
            raise
        with os.fdopen(descriptor, "rb") as file:
            return file.read(MANIFEST_LIMIT + 1)

    def _open(self, name: str) -> int:
        """A descriptor of a regular, singly-linked file below the folder, no component of it a symbolic link."""
        *folders, last = name.split("/")
        current = os.dup(self._folder)
        try:
            for part in folders:
                inner = os.open(part, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=current)
                os.close(current)
                current = inner
            descriptor = os.open(last, _OPEN_FLAGS | os.O_NONBLOCK, dir_fd=current)
        except FileNotFoundError as error:
            raise BundleError(f"{self.path / name} is missing: copy the bundle again") from error
        except OSError as error:
            if self._is_link(name):
                raise BundleError(f"{self.path / name} is a symbolic link; a bundle holds real files only") from error
            raise BundleError(f"{self.path / name} cannot be opened: {error.strerror}") from error
        finally:
            os.close(current)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            kind = "has hard links" if stat.S_ISREG(status.st_mode) else "is not a regular file"
            raise BundleError(f"{self.path / name} {kind}; a bundle holds real files only (copy it with cp -r)")
        return descriptor

    def _is_link(self, name: str) -> bool:
        path = self.path / name
        return any(
            part.is_symlink() for part in (path, *path.parents) if part != self.path and self.path in part.parents
        )
