"""Profiles: the facts of the systems that samescore knows by name. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from samescore.export.checkpoint import Checkpoint
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import UsageError, did_you_mean

CONVERSATION_512 = TextContract(kind="conversation", max_tokens=512, truncation="middle", ellipsis="<|...|>")


@dataclass(frozen=True)
class Profile:
    """What a name stands for.

    source: a hub id, or the name of a model that ships with the package. contract: how its text is made; None where the
    checkpoint alone decides. texts: the folder of the package that holds its golden and calibration texts, or None.
    available: whether this version can export it. licence, card: what the source's card says, and where it is.
    """

    name: str
    kind: Literal["hub", "embedded"]
    source: str
    summary: str
    contract: TextContract | None
    texts: str | None
    available: bool
    licence: str


PROFILES: tuple[Profile, ...] = (
    Profile(
        name="refusal",
        kind="hub",
        source="agentlans/multilingual-e5-small-refusal-classifier",
        summary="refusal or not, of an assistant in a conversation; BERT 12x384, 512 tokens",
        contract=CONVERSATION_512,
        texts="models/refusal-tiny",
        available=True,
        licence="MIT",
    ),
    Profile(
        name="refusal-tiny",
        kind="embedded",
        source="refusal-tiny",
        summary="the small refusal classifier that ships with samescore; BERT 4x128, 512 tokens",
        contract=CONVERSATION_512,
        texts="models/refusal-tiny",
        available=True,
        licence="Apache-2.0",
    ),
    Profile(
        name="realigned",
        kind="hub",
        source="QuixiAI/ReAligned-Classifier",
        summary="China-biased or Western-biased response, as an RL reward; Llama-3.2-1B",
        contract=None,
        texts=None,
        available=False,
        licence="see the model card",
    ),
    Profile(
        name="news-bias",
        kind="hub",
        source="tzoulio/news-bias-finder-llama-3.2-1B",
        summary="Left, Center or Right news article; LoRA on Llama-3.2-1B",
        contract=None,
        texts=None,
        available=False,
        licence="see the model card",
    ),
    Profile(
        name="political-leaning",
        kind="hub",
        source="zhezhou1106/political-leaning-classifier-v2",
        summary="leaning 0-4 of an article, from five digit tokens; Qwen3.5-4B",
        contract=None,
        texts=None,
        available=False,
        licence="see the model card",
    ),
    Profile(
        name="civic-aligned",
        kind="hub",
        source="YuYu1015/YuYu1015-Qwen3.5-0.8B-TW-CivicAligned-v1",
        summary="chat; Qwen3.5-0.8B",
        contract=None,
        texts=None,
        available=False,
        licence="see the model card",
    ),
)


def find_profile(name: str) -> Profile | None:
    """The profile of that name, or None."""
    return next((profile for profile in PROFILES if profile.name == name), None)


def profile_named(name: str) -> Profile:
    """The profile of that name, when this version can export it; UsageError otherwise."""
    profile = find_profile(name)
    known = [p.name for p in PROFILES if p.available]
    if profile is None:
        raise UsageError(f"unknown profile {name!r}; profiles are {', '.join(known)}.{did_you_mean(name, known)}")
    if not profile.available:
        raise UsageError(
            f"profile {name!r} is planned: this version exports BERT classifiers and, through transformers, others of the "
            f"*ForSequenceClassification kind. Profiles that export today: {', '.join(known)}"
        )
    return profile


def contract_for(checkpoint: Checkpoint, profile: Profile | None) -> TextContract:
    """The profile's text contract, within what the checkpoint can read; without one, plain text cut at the end."""
    limit = checkpoint.max_tokens
    if profile is None or profile.contract is None:
        return TextContract(kind="text", max_tokens=limit, truncation="right", ellipsis="")
    return replace(profile.contract, max_tokens=min(limit, profile.contract.max_tokens))
