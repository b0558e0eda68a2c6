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
from samescore.export.recipes import Task
from samescore.packaged import PACKAGE
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import BaseSource, Source
from samescore.scored import open_classifier, open_generator

# By the task that was asked for.
_OTHER_TASK = {
    "classify": "profile {0!r} generates text: export it with --task generate (in Python: export_generator)",
    "generate": "profile {0!r} is a classifier: export it without --task generate",
}


def open_source(
    source: str | os.PathLike[str],
    *,
    profile: str | None,
    revision: str | None,
    adapter: AdapterOptions | None = None,
    label_tokens: Sequence[str] = (),
    task: Task = "classify",
    progress: bool,
) -> tuple[Source, Checkpoint, Profile | None]:
    """Find the checkpoint that `source` means, fetch it if it is on the hub, and the profile whose facts apply.

    adapter: for an adapter, where it lies below the source and on which base. label_tokens: of a language model; the
    profile's if none are named. task: whether it is opened as the classifier that it is or makes, or as a `Generator`.
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
    if facts is not None and facts.task != task:
        raise UsageError(_OTHER_TASK[task].format(facts.name))
    tokens = tuple(label_tokens) or (facts.label_tokens if facts else ())

    def opened(folder: Path) -> tuple[Checkpoint, BaseSource | None]:
        if task == "generate":
            return open_generator(folder, adapter, progress=progress)
        return open_classifier(folder, adapter, tokens, progress=progress)

    if named is not None:
        if named.kind == "embedded":
            _no_revision(revision, "a model that ships with samescore")
            checkpoint, _ = opened(PACKAGE / "models" / name)
            return Source("embedded", name, None, checkpoint.sha256(), None, ()), checkpoint, facts
    elif Path(name).is_dir():
        _no_revision(revision, "a folder")
        checkpoint, below = opened(Path(name) / (adapter.subfolder or ""))
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
    checkpoint, below = opened(snapshot.folder)
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
