"""Profiles: the facts of the systems that samescore knows by name. Data, not code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import Task
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import UsageError, did_you_mean

CONVERSATION_512 = TextContract(kind="conversation", max_tokens=512, truncation="middle", ellipsis="<|...|>")
# The card trains and scores on this string, cut at the end.
PROMPT_RESPONSE_2048 = TextContract(
    kind="prompt-response",
    max_tokens=2048,
    truncation="right",
    ellipsis="",
    template="PROMPT: {prompt}\nRESPONSE: {response}\n",
)
# The card names no limit; longer articles are cut at the end.
ARTICLE_8192 = TextContract(kind="text", max_tokens=8192, truncation="right", ellipsis="")
# The card's context; the chat template makes the text.
CHAT_32768 = TextContract(kind="text", max_tokens=32768, truncation="right", ellipsis="")
# The card's prompt, character by character; it ends in a space, so that the next token is a bare digit.
LEANING_8192 = TextContract(
    kind="instruction",
    max_tokens=8192,
    truncation="article",
    ellipsis="",
    template="""You are an expert media bias analyst. Read the following news article and classify its political leaning \
on a 0-4 scale.

Article:
{text}

Scale:
class 0: extremely left (far left)
class 1: lean left
class 2: center / neutral
class 3: lean right
class 4: extremely right (far right)

SOLUTION
The correct answer is: class """,
)


@dataclass(frozen=True)
class Profile:
    """What a name stands for.

    source: a hub id, or the name of a model that ships with the package. contract: how its text is made; None where the
    checkpoint alone decides. labels: what the card calls them, for a checkpoint that only numbers its labels.
    label_tokens: of a language model, the tokens whose probabilities are the score. adapter: where in the repository the
    adapter lies. texts: the folder of the package that holds its golden and calibration texts, or None. golden_limit,
    calibration_limit: how many of these an export uses when nothing else is asked for, None: all. available: whether this
    version can export it. licence: what the source's card says. task: whether it judges texts or writes them.
    """

    name: str
    kind: Literal["hub", "embedded"]
    source: str
    summary: str
    contract: TextContract | None
    texts: str | None
    available: bool
    licence: str
    labels: tuple[str, ...] | None = None
    label_tokens: tuple[str, ...] = ()
    adapter: str | None = None
    golden_limit: int | None = None
    calibration_limit: int | None = None
    task: Task = "classify"


# A model of a billion parameters needs about a second of a CPU for each golden text, more than once.
LARGE_GOLDEN, LARGE_CALIBRATION = 300, 100

PROFILES: tuple[Profile, ...] = (
    Profile(
        name="refusal",
        kind="hub",
        source="agentlans/multilingual-e5-small-refusal-classifier",
        summary="refusal or not, of an assistant in a conversation; BERT 12x384, 512 tokens",
        contract=CONVERSATION_512,
        texts="texts/conversations",
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
        contract=PROMPT_RESPONSE_2048,
        texts="texts/prompt-response",
        available=True,
        licence="Apache-2.0 by its card; the base is under the Llama 3.2 Community License",
        labels=("China-biased", "Western-biased"),
        golden_limit=LARGE_GOLDEN,
        calibration_limit=LARGE_CALIBRATION,
    ),
    Profile(
        name="news-bias",
        kind="hub",
        source="tzoulio/news-bias-finder-llama-3.2-1B",
        summary="Left, Center or Right news article; LoRA on Llama-3.2-1B",
        contract=ARTICLE_8192,
        texts="texts/news",
        available=True,
        licence="none stated on its card; the base is under the Llama 3.2 Community License",
        labels=("Left", "Center", "Right"),
        adapter="checkpoint-4506",
        golden_limit=LARGE_GOLDEN,
        calibration_limit=LARGE_CALIBRATION,
    ),
    Profile(
        name="political-leaning",
        kind="hub",
        source="zhezhou1106/political-leaning-classifier-v2",
        summary="leaning 0-4 of an article, from five digit tokens; Qwen3.5-4B",
        contract=LEANING_8192,
        texts="texts/articles",
        available=True,
        licence="none stated on its card; its base is Qwen3.5-4B",
        label_tokens=("0", "1", "2", "3", "4"),
        golden_limit=LARGE_GOLDEN,
        calibration_limit=LARGE_CALIBRATION,
    ),
    Profile(
        name="civic-aligned",
        kind="hub",
        source="YuYu1015/YuYu1015-Qwen3.5-0.8B-TW-CivicAligned-v1",
        summary="chat on Taiwan-related political topics, generated text; Qwen3.5-0.8B, 32,768 tokens",
        contract=CHAT_32768,
        texts="texts/conversations",
        available=True,
        licence="none stated on its card, which releases it solely for academic research and education; its base is "
        "huihui-ai/Huihui-Qwen3.5-0.8B-abliterated, of Qwen/Qwen3.5-0.8B",
        task="generate",
        calibration_limit=LARGE_CALIBRATION,
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
            f"profile {name!r} is planned: this version cannot export it. Profiles that export today: {', '.join(known)}"
        )
    return profile


def contract_for(checkpoint: Checkpoint, profile: Profile | None, max_tokens: int | None = None) -> TextContract:
    """The profile's text contract, within what the checkpoint can read; without one, plain text cut at the end.

    max_tokens: the limit to use instead; UsageError beyond what the checkpoint can read.
    """
    limit = checkpoint.max_tokens
    contract = profile.contract if profile and profile.contract else None
    if contract is None:
        contract = TextContract(kind="text", max_tokens=limit, truncation="right", ellipsis="")
    contract = replace(contract, max_tokens=min(limit, contract.max_tokens), model_limit=limit)
    return contract.with_max_tokens(max_tokens)


def labels_for(checkpoint: Checkpoint, profile: Profile | None) -> tuple[str, ...]:
    """The checkpoint's labels; the profile's where the checkpoint only numbers as many (LABEL_0, LABEL_1, …)."""
    own = checkpoint.labels
    numbered = own == tuple(f"LABEL_{index}" for index in range(len(own)))
    if profile and profile.labels and numbered and len(profile.labels) == len(own):
        return profile.labels
    return own
