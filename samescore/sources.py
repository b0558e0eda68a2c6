"""Where a checkpoint comes from: a profile, a folder or the hub; perhaps an adapter on a base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from samescore.adapted import AdapterOptions
from samescore.export.adapter import AdaptedCheckpoint
from samescore.export.checkpoint import Checkpoint
from samescore.export.hub import fetch, is_hub_id
from samescore.export.profiles import Profile, find_profile, profile_named
from samescore.packaged import PACKAGE
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import BaseSource, Source
from samescore.scored import open_classifier


def open_source(
    source: str | os.PathLike[str],
    *,
    profile: str | None,
    revision: str | None,
    adapter: AdapterOptions | None = None,
    label_tokens: Sequence[str] = (),
    progress: bool,
) -> tuple[Source, Checkpoint, Profile | None]:
    """Find the checkpoint that `source` means, fetch it if it is on the hub, and the profile whose facts apply.

    adapter: for an adapter, where it lies below the source and on which base. label_tokens: of a language model; the
    profile's if none are named.
    """
    adapter = adapter or AdapterOptions()
    name = os.fspath(source)
    facts = profile_named(profile) if profile else None
    named = find_profile(name)
    if named is not None:
        named = profile_named(name)
        facts = facts or named
        name = named.source
        adapter = replace(adapter, subfolder=adapter.subfolder or named.adapter)
    tokens = tuple(label_tokens) or (facts.label_tokens if facts else ())
    if named is not None:
        if named.kind == "embedded":
            _no_revision(revision, "a model that ships with samescore")
            checkpoint, _ = open_classifier(PACKAGE / "models" / name, adapter, tokens)
            return Source("embedded", name, None, checkpoint.sha256(), None, ()), checkpoint, facts
    elif Path(name).is_dir():
        _no_revision(revision, "a folder")
        folder = Path(name) / (adapter.subfolder or "")
        checkpoint, below = open_classifier(folder, adapter, tokens, progress=progress)
        return (
            _source("folder", Path(name).resolve().name, None, adapter.subfolder, checkpoint, below),
            checkpoint,
            facts,
        )
    if not is_hub_id(name):
        raise UsageError(
            f"{name!r} is neither a profile (samescore profiles lists them), nor a folder, nor a hub id (owner/name)"
        )
    snapshot = fetch(name, revision, subfolder=adapter.subfolder, progress=progress)
    checkpoint, below = open_classifier(snapshot.folder, adapter, tokens, progress=progress)
    return _source("hub", name, snapshot.revision, adapter.subfolder, checkpoint, below), checkpoint, facts


def _source(
    kind: Literal["hub", "folder"],
    name: str,
    revision: str | None,
    subfolder: str | None,
    checkpoint: Checkpoint,
    base: BaseSource | None,
) -> Source:
    place = "/".join([name, *(subfolder or "").strip("/").split("/")]).rstrip("/")
    notes = checkpoint.notes if isinstance(checkpoint, AdaptedCheckpoint) else ()
    return Source(kind, place, revision, checkpoint.sha256(), base, notes)


def _no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision} names a hub commit, but the source is {what}")
