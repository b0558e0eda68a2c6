"""Where the golden texts come from, dealt to golden and calibration before anything is cut or composed.

Every source is dealt whole: a presidential message, a question with all its answers, a sentence of the project's own. What a
test model is trained on (`tests/assets/`) is left out: whole messages, and every answer that occurs in a training text.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "assets"))

import build_texts  # noqa: E402
import llama_texts  # noqa: E402
import texts as assets_texts  # noqa: E402
import yaml  # noqa: E402

Record = dict[str, Any]
ROLE = re.compile(r"<\|(?:system|user|assistant|\.\.\.)\|>")
# Jokes, gossip, politics and bodies of a crowd-made corpus: not looked through in every language, so not shipped.
LEFT_OUT = {"humor", "gossip", "psychology", "politics", "emotion", "emotions"}
HAN = re.compile(r"[\u4e00-\u9fff]")
CALIBRATION_EVERY = 6


@dataclass(frozen=True)
class Pair:
    """A question, its answer, and whose they are."""

    language: str
    topic: str
    question: str
    answer: str


@dataclass
class Speeches:
    """Words of presidential messages, read from front to back, so that no two passages share a word."""

    words: list[list[str]]
    place: int = 0

    def passage(self, words: int) -> str:
        """The next so many words of one message, from the start of a sentence."""
        for _ in range(2 * len(self.words)):
            speech = self.words[self.place % len(self.words)]
            self.place += 1
            if len(speech) >= words:
                taken = speech[:words]
                # What is left of the cut sentence is passed over.
                ends = (i + 1 for i, word in enumerate(speech[words - 1 :], words - 1) if word[-1] in ".?!")
                del speech[: next(ends, len(speech))]
                return " ".join(taken)
        raise SystemExit(f"no presidential message has {words} unused words left")


def normal(turn: str) -> str:
    """A turn as it is compared: letters' case and white space aside."""
    return " ".join(turn.split()).casefold()


def turns(text: str) -> set[str]:
    """The turns of a conversation, normalised."""
    return {normal(turn) for turn in ROLE.split(text) if turn.strip()}


def calibrates(text: str) -> bool:
    """Whether a source belongs to the calibration set; nothing but its text decides."""
    return int.from_bytes(hashlib.sha256(normal(text).encode()).digest()[:8], "big") % CALIBRATION_EVERY == 0


def split(name: str) -> list[Record]:
    """One of the embedded model's splits."""
    lines = (HERE / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


@cache
def trained_turns(assets: Path) -> set[str]:
    """Every turn of every conversation that the embedded model or a test model is trained on."""
    trained = [record["text"] for record in split("train")]
    for languages in (None, {"en"}):
        trained += [record["text"] for record in assets_texts.training_texts(assets, languages)[0]]
    return {turn for text in trained for turn in turns(text)}


def speeches(assets: Path) -> dict[str, Speeches]:
    """The messages that no test model is trained on, by set."""
    spoken = [list(speech.words) for speech in llama_texts.speeches(assets)["parity"]]
    return {
        "calibration": Speeches(spoken[::CALIBRATION_EVERY]),
        "golden": Speeches([words for index, words in enumerate(spoken) if index % CALIBRATION_EVERY]),
    }


@cache
def pairs(assets: Path) -> dict[str, list[Pair]]:
    """Clean question and answer pairs of chatterbot-corpus by set; no answer twice, none that was trained on."""
    seen = set(trained_turns(assets))
    used = {
        # The test models' own parity texts are no calibration texts either.
        "golden": {
            turn
            for record in (*split("golden"), *split("heldout"), *assets_texts.parity_texts(assets))
            for turn in turns(record["text"])
        },
        "calibration": {turn for record in split("calibration") for turn in turns(record["text"])},
    }
    found: dict[str, list[Pair]] = {"golden": [], "calibration": []}
    for folder in sorted((assets / "chatterbot_corpus").rglob("data/*")):
        language = assets_texts.LANGUAGES.get(folder.name)
        for path in sorted(folder.glob("*.yml")) if language else []:
            if path.stem in LEFT_OUT:
                continue
            for talk in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", []):
                question, answer = [*(str(turn).strip() for turn in talk if turn), "", ""][:2]
                pair = Pair(str(language), path.stem, question, answer)
                said = f"{pair.question} {pair.answer}"
                if not (pair.question and pair.answer) or ROLE.search(said) or build_texts.UNWANTED.search(said):
                    continue
                if normal(pair.answer) in seen:
                    continue
                seen.add(normal(pair.answer))
                owners = [name for name, said in used.items() if {normal(pair.question), normal(pair.answer)} & said]
                if len(owners) < 2:
                    dealt = "calibration" if calibrates(pair.question) else "golden"
                    found[owners[0] if owners else dealt].append(pair)
    for name, chosen in found.items():
        random.Random(f"pairs {name}").shuffle(chosen)
    return found


def spread(chosen: list[Pair], count: int) -> list[Pair]:
    """So many pairs, in turn from every language as long as it has some."""
    by_language: dict[str, list[Pair]] = {}
    for pair in chosen:
        by_language.setdefault(pair.language, []).append(pair)
    found: list[Pair] = []
    while len(found) < count and any(by_language.values()):
        found += [waiting.pop(0) for waiting in by_language.values() if waiting]
    return found[:count]


def more_refusals(of_each: int) -> list[Record]:
    """Refusals composed from the sentences that belong to calibration, in every language of the embedded model."""
    pools = build_texts.authored_pools()
    return [
        build_texts.row(text, build_texts.REFUSAL, language, "samescore")
        for language in build_texts.LANGUAGES
        for text in build_texts.distinct(
            random.Random(f"more:{language}"), language, pools[language, "calibration"], build_texts.REFUSAL, of_each
        )
    ]


def own_conversations(name: str, assets: Path) -> list[Record]:
    """Labelled conversations of the embedded model's splits that nothing is trained on.

    The test models' training draws on all of chatterbot-corpus, so answers from there are looked up.
    """
    found = split("calibration") + more_refusals(5) if name == "calibration" else split("golden") + split("heldout")
    trained = trained_turns(assets)
    return [
        record
        for record in found
        if record["source"] != "chatterbot-corpus" or normal(ROLE.split(record["text"])[-1]) not in trained
    ]


def own_pairs(name: str, assets: Path) -> tuple[list[Record], list[Record]]:
    """Prompts with responses: those written in two framings, and the conversations of one turn."""
    lines = (HERE / "framing.jsonl").read_text(encoding="utf-8").splitlines()
    framing = [json.loads(line) for line in lines]
    # Both framings of a question stay together: lines 21 to 23 are about one subject each.
    chosen = framing[20:23] if name == "calibration" else framing[:20] + framing[23:]
    framed = [
        record | {"language": "zh" if HAN.search(record["response"]) else "en", "source": "samescore"}
        for record in chosen
    ]
    others = []
    for record in own_conversations(name, assets):
        told = re.fullmatch(r"<\|user\|>(.*?)<\|assistant\|>(.*)", record["text"], re.DOTALL)
        if told and "<|" not in told[1] + told[2] and told[2].strip():
            pair = {"prompt": told[1], "response": told[2]}
            others.append(pair | {"language": record["language"], "source": record["source"]})
    return framed, others
