"""What may be kept between runs of a box: compiled programs, and the buckets that a bundle was warmed up with.

    $SAMESCORE_CACHE, else $XDG_CACHE_HOME/samescore, else ~/.cache/samescore
    └── migraphx/
        ├── <key of a program>/…mxr      what MIGraphX compiled one file to, for one bucket
        └── plans/<key of a file>.json   {"schema_version": 1, "buckets": ["1x512", …]}

ONNX Runtime names a compiled program by the names and shapes of its graph, not by its weights or operators, and would load
that of another model with the same names. So each program has a folder of its own, keyed by everything that decides it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from samescore.runtime.batches import Bucket, parse_buckets
from samescore.runtime.errors import ProviderError, UsageError
from samescore.runtime.manifest import Manifest, Variant
from samescore.runtime.opening import SHARED_CACHE
from samescore.runtime.providers import ORT_DISTRIBUTIONS

log = logging.getLogger(__name__)

PLAN_SCHEMA = 1
# Raised when samescore hands graphs to MIGraphX in another way than before.
PROGRAM_SCHEMA = 1
# Options that do not change what is compiled.
_PLACES = ("device_id", "migraphx_mem_limit", "migraphx_arena_extend_strategy")
_SETTINGS = re.compile(r"(ORT_)?MIGRAPHX_")
_LIBRARY = "libmigraphx_c.so*"


def cache_folder() -> Path:
    """$SAMESCORE_CACHE, else $XDG_CACHE_HOME/samescore, else ~/.cache/samescore; it need not exist.

    RuntimeError when there is no home folder.
    """
    if own := os.environ.get("SAMESCORE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "samescore"
    return Path("~/.cache/samescore").expanduser()


def file_digests(manifest: Manifest, variant: Variant) -> dict[str, str]:
    """SHA-256 of a variant's graph and weights, from the manifest."""
    return {name: manifest.files[name].sha256 for name in (variant.model, *variant.data)}


def versions() -> dict[str, str]:
    """What compiles: ONNX Runtime's packages, ROCm and MIGraphX as far as they can be known, and MIGraphX's settings."""
    found = {key: value for key, value in os.environ.items() if _SETTINGS.match(key) and key != SHARED_CACHE}
    for name in (*ORT_DISTRIBUTIONS, "migraphx"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    rocm = Path(os.environ.get("ROCM_PATH") or "/opt/rocm")
    with contextlib.suppress(OSError):
        found["rocm"] = (rocm / ".info" / "version").read_text(encoding="utf-8").strip()
    folders = [rocm / "lib", *map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")))]
    libraries = {path.resolve().name for folder in folders for path in folder.glob(_LIBRARY)}
    if libraries:
        found["libmigraphx"] = " ".join(sorted(libraries))
    return found


def program_key(
    files: Mapping[str, str], bucket: Bucket, options: Mapping[str, str], made_by: Mapping[str, str]
) -> str:
    """SHA-256 (hex) of what decides a compiled program: file digests, bucket, provider options and `versions()`."""
    kept = {name: value for name, value in options.items() if name not in _PLACES}
    return _digest(
        {
            "schema_version": PROGRAM_SCHEMA,
            "files": dict(files),
            "bucket": str(bucket),
            "options": kept,
            "versions": dict(made_by),
        }
    )


def program_folder(files: Mapping[str, str], bucket: Bucket, options: Mapping[str, str]) -> Path:
    """The folder of one compiled program, made if it is not there; ProviderError when it cannot be one's own.

    What lies in it is loaded and run without another check, so nobody else may write there.
    """
    try:
        programs = cache_folder() / "migraphx"
        folder = programs / program_key(files, bucket, options, versions())
        programs.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise ProviderError(
            f"there is no folder for the programs that MIGraphX compiles: {error}. Set SAMESCORE_CACHE to one that you can write"
        ) from error
    for made in (programs, folder):
        status = made.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise ProviderError(
                f"{made} holds compiled programs and can be written by others: remove it, or set SAMESCORE_CACHE to a folder of "
                "your own"
            )
    return folder


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time: a second one waits, and then finds what the first compiled."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def plan_path(target: str, files: Mapping[str, str]) -> Path:
    """Where the buckets of a file are kept. Versions are no part of it: a choice outlives an update, programs do not.

    ProviderError where there is no home folder.
    """
    try:
        return cache_folder() / target / "plans" / f"{_digest({'files': dict(files)})}.json"
    except RuntimeError as error:
        raise ProviderError(
            f"there is no home folder ({error}): set SAMESCORE_CACHE to one that you can write"
        ) from error


def write_plan(path: Path, buckets: Sequence[Bucket]) -> None:
    """Keep a choice of buckets; the file appears whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    document = {"schema_version": PLAN_SCHEMA, "buckets": [str(bucket) for bucket in buckets]}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(json.dumps(document) + "\n")
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_plan(path: Path) -> tuple[Bucket, ...] | None:
    """The buckets that were kept, or None; a file that cannot be understood counts as none, with a warning."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"] == PLAN_SCHEMA:
            return parse_buckets(",".join(document["buckets"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        log.debug("unreadable plan", exc_info=True)
    log.warning("%s holds no plan of buckets that this samescore reads; it is passed over", path)
    return None


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
