"""Which checkpoint a folder means: a whole one, or an adapter over a base that is looked up in a folder or on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from samescore.export.adapter import CONFIG_NAME, AdaptedCheckpoint, AdapterConfig, adapters_below, is_adapter
from samescore.export.checkpoint import Checkpoint
from samescore.export.hub import fetch, is_hub_id
from samescore.runtime.errors import CheckpointError, UsageError
from samescore.runtime.manifest import BaseSource


@dataclass(frozen=True)
class AdapterOptions:
    """What a caller says of an adapter.

    subfolder: where it lies below the source. base: a folder or hub id, in place of the one that the adapter names.
    """

    subfolder: str | None = None
    base: str | os.PathLike[str] | None = None


def open_folder(
    folder: Path, options: AdapterOptions | None = None, *, progress: bool = False
) -> tuple[Checkpoint, BaseSource | None]:
    """The checkpoint in a folder (the adapter's own folder, if it is one), and for an adapter where its base is from.

    UsageError when `options` name an adapter or a base and the folder holds no adapter; CheckpointError when adapter or
    base cannot be read.
    """
    options = options or AdapterOptions()
    if is_adapter(folder):
        settings = AdapterConfig.read(folder)
        base, source = _open_base(settings, folder, options.base, progress=progress)
        return AdaptedCheckpoint(base, folder), source
    if options.subfolder:
        raise UsageError(f"{folder} holds no {CONFIG_NAME}; {_adapters_there(folder.parent)}")
    if not (folder / "config.json").is_file() and adapters_below(folder):
        raise UsageError(
            f"{folder} holds neither config.json nor {CONFIG_NAME}; {_adapters_there(folder)}: name one with --adapter-subfolder"
        )
    if options.base is not None:
        raise UsageError(
            f"--base {os.fspath(options.base)} names what an adapter lies on, but {folder} is no adapter: it holds no "
            f"{CONFIG_NAME}. Leave --base away, or name the adapter with --adapter-subfolder"
        )
    return Checkpoint(folder), None


def _open_base(
    settings: AdapterConfig, folder: Path, asked: str | os.PathLike[str] | None, *, progress: bool
) -> tuple[Checkpoint, BaseSource]:
    """The base that was asked for, or else the one that the adapter names."""
    name = os.fspath(asked) if asked is not None else settings.base
    if not name:
        raise UsageError(f"{folder / CONFIG_NAME} names no base: name it with --base FOLDER or HUB_ID")
    for candidate in (Path(name), folder / name) if asked is None else (Path(name),):
        if candidate.is_dir():
            checkpoint = _whole(candidate)
            return checkpoint, BaseSource("folder", candidate.resolve().name, None, checkpoint.sha256())
    if not is_hub_id(name):
        who = "--base" if asked is not None else f"{folder / CONFIG_NAME}"
        raise UsageError(
            f"{who} names the base {name!r}, which is neither a folder here nor a hub id (owner/name): say where it is with "
            "--base FOLDER or HUB_ID"
        )
    # A recorded revision is one of the recorded base.
    revision = settings.revision if name == settings.base else None
    try:
        snapshot = fetch(name, revision, progress=progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base {name} of the adapter {folder.name} could not be fetched: {error}. "
            "If you have it in a folder: --base FOLDER"
        ) from error
    checkpoint = _whole(snapshot.folder)
    return checkpoint, BaseSource("hub", name, snapshot.revision, checkpoint.sha256())


def _whole(folder: Path) -> Checkpoint:
    if is_adapter(folder):
        raise CheckpointError(
            f"the base {folder} is itself an adapter; --base names a whole checkpoint, with that adapter merged into it"
        )
    return Checkpoint(folder)


def _adapters_there(folder: Path) -> str:
    names = adapters_below(folder)
    return f"{folder} has adapters in {', '.join(names)}" if names else f"{folder} has no adapters in its subfolders"
