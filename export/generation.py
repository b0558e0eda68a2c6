"""What a checkpoint's files say about generating text: tokens that end it, the chat template, how its authors sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from samescore.export.checkpoint import read_json
from samescore.export.generator import Generator
from samescore.runtime.errors import CheckpointError
from samescore.runtime.manifest import SAMPLING, Generation

TEMPLATE_NAME = "chat_template.jinja"
CONFIG_NAME = "generation_config.json"
# Without --max-tokens or a profile, a context is no longer than this: the table of positions grows with it.
DEFAULT_CONTEXT = 32768
TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def generation_of(checkpoint: Generator, context: int) -> Generation:
    """The manifest's facts about a language model; context: the most tokens of prompt and answer together.

    Raises CheckpointError when no file names a token that ends a text, a token is outside the vocabulary, or a sampling
    default makes no sense.
    """
    settings = read_json(checkpoint.folder / CONFIG_NAME)
    vocabulary = int(checkpoint.shape(checkpoint.head)[0])
    named = {**checkpoint.model.config, **checkpoint.config, **{k: v for k, v in settings.items() if v is not None}}
    tokens = template_tokens(checkpoint.tokenizer_config)
    return Generation(
        context=context,
        eos=_within(_eos(checkpoint, settings, tokens), vocabulary, checkpoint, "eos_token_id"),
        bos=_one(named.get("bos_token_id"), vocabulary, checkpoint, "bos_token_id"),
        pad=_one(named.get("pad_token_id"), vocabulary, checkpoint, "pad_token_id"),
        vocabulary=vocabulary,
        chat_template=TEMPLATE_NAME if chat_template(checkpoint) is not None else None,
        template_tokens=tokens,
        defaults=_defaults(checkpoint, settings),
    )


def chat_template(checkpoint: Generator) -> str | None:
    """The checkpoint's template: `chat_template.jinja`, or the tokenizer config's (of several, the one named default)."""
    path = checkpoint.folder / TEMPLATE_NAME
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from error
    stored = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(stored, list):
        by_name = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = by_name.get("default")
    return stored if isinstance(stored, str) and stored else None


def template_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens that a tokenizer config names, which templates call by these names."""
    found = {}
    for name in TEMPLATE_TOKENS:
        token = tokenizer_config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _eos(checkpoint: Generator, settings: Mapping[str, Any], tokens: Mapping[str, str]) -> list[Any]:
    """The generation config's; without one the model config's, and the token that ends a turn for the tokenizer."""
    found = _listed(settings.get("eos_token_id"))
    if not found:
        found = _listed(checkpoint.config.get("eos_token_id")) or _listed(checkpoint.model.config.get("eos_token_id"))
        ending = Tokenizer.from_buffer(checkpoint.tokenizer_bytes()).token_to_id(tokens.get("eos_token", ""))
        found += _listed(ending)
    if not found:
        raise CheckpointError(
            f"{checkpoint.folder} names no token that ends a text: add eos_token_id to its {CONFIG_NAME} or config.json"
        )
    return list(dict.fromkeys(found))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _within(tokens: list[Any], vocabulary: int, checkpoint: Generator, name: str) -> tuple[int, ...]:
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise CheckpointError(f"{checkpoint.folder}: {name} is {token!r}; its vocabulary has {vocabulary} tokens")
    return tuple(tokens)


def _one(value: Any, vocabulary: int, checkpoint: Generator, name: str) -> int | None:
    return next(iter(_within(_listed(value), vocabulary, checkpoint, name)), None)


def _defaults(checkpoint: Generator, settings: Mapping[str, Any]) -> dict[str, float]:
    """The sampling settings that the generation config names and the engine knows."""
    found = {}
    for name, (wanted, holds) in SAMPLING.items():
        value = settings.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not math.isfinite(value) or not holds(value):
            raise CheckpointError(
                f"{checkpoint.folder / CONFIG_NAME}: {name} is {value!r}; it must be {wanted}. Correct it or leave it out"
            )
        found[name] = float(value)
    return found
