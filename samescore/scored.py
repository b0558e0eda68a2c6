"""The model that a folder means: a classifier with a trained head, or a language model, at label tokens or whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from samescore.adapted import AdapterOptions, open_folder
from samescore.export.adapter import CONFIG_NAME, is_adapter
from samescore.export.build import architectures
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import BaseSource, LabelToken

_NUMBER = re.compile(r"\s*[+-]?[0-9]+(?:\.[0-9]+)?\s*")


def open_classifier(
    folder: Path, options: AdapterOptions | None = None, label_tokens: Sequence[str] = (), *, progress: bool = False
) -> tuple[Checkpoint, BaseSource | None]:
    """As `open_folder`; with label tokens, the folder's language model scored at them.

    UsageError when the folder holds an adapter or a classifier, or a model that label tokens cannot score, and when a label
    is not one token.
    """
    if not label_tokens:
        return open_folder(folder, options, progress=progress)
    asked = f"--label-tokens {','.join(label_tokens)}"
    _refuse_adapter(folder, asked)
    checkpoint, base = open_folder(folder, options, progress=progress)
    known = _language_models()
    if checkpoint.architecture in known:
        return TokenScorer(checkpoint, label_tokens), base
    if "ForSequenceClassification" in checkpoint.architecture:
        raise UsageError(
            f"{asked} makes a classifier of a language model, but {folder} is one already: {checkpoint.architecture} with the "
            f"labels {', '.join(checkpoint.labels)}. Leave --label-tokens away, or the profile that names them"
        )
    raise UsageError(
        f"{asked} reads {', '.join(known)}, but {folder} is a {checkpoint.architecture}: name a checkpoint of one of these"
    )


def open_generator(
    folder: Path, options: AdapterOptions | None = None, *, progress: bool = False
) -> tuple[Checkpoint, BaseSource | None]:
    """As `open_folder`, the folder's language model with its whole head.

    UsageError when the folder holds an adapter, or a model that no graph generates text with.
    """
    _refuse_adapter(folder, "--task generate")
    checkpoint, base = open_folder(folder, options, progress=progress)
    if checkpoint.architecture not in _language_models():
        raise UsageError(
            f"--task generate reads {', '.join(_language_models())}, but {folder} is a {checkpoint.architecture}: name a "
            "checkpoint of one of these, or leave --task away for a classifier"
        )
    return Generator(checkpoint), base


def _language_models() -> list[str]:
    return [name for architecture in architectures() for name in architecture.language_models]


def _refuse_adapter(folder: Path, asked: str) -> None:
    if is_adapter(folder):
        raise UsageError(
            f"{asked} reads a whole language model, but {folder} is an adapter ({CONFIG_NAME}). Merge it first: "
            "PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(NEW_FOLDER), with the base's "
            "tokenizer beside it; then export NEW_FOLDER"
        )


def label_tokens_of(checkpoint: Checkpoint) -> tuple[LabelToken, ...] | None:
    """What the manifest records of label tokens, in the order of the labels; None for a trained head."""
    if not isinstance(checkpoint, TokenScorer):
        return None
    return tuple(LabelToken(*token) for token in zip(checkpoint.label_ids, checkpoint.labels, strict=True))


def values_of(checkpoint: Checkpoint) -> tuple[float, ...] | None:
    """The numbers that label tokens are, when all are numbers: then the labels are ordinal. None otherwise."""
    if not isinstance(checkpoint, TokenScorer) or not all(map(_NUMBER.fullmatch, checkpoint.labels)):
        return None
    return tuple(map(float, checkpoint.labels))
