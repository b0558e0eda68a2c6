"""Real texts for the digit scorers: passages of speeches in the prompt of a news classifier, and articles for parity.

Speeches are shared out as for the Llama classifiers: whole, so that no parity or held-out text comes from one that was
trained on.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect
from pathlib import Path

import llama_texts
import texts
from tokenizers import Tokenizer

# The prompt of the published political-leaning classifier, to the letter. The article is stripped and put in.
PROMPT = """You are an expert media bias analyst. Read the following news article and classify \
its political leaning on a 0-4 scale.

Article:
{article}

Scale:
class 0: extremely left (far left)
class 1: lean left
class 2: center / neutral
class 3: lean right
class 4: extremely right (far right)

SOLUTION
The correct answer is: class """
DIGITS = ("0", "1", "2", "3", "4")
# What the digits mean here: when a speech was held. The first years of the second to the fifth era.
TURNS = (1840, 1890, 1934, 1975)
WORDS = (14, 100)
# How many passages of how many tokens (drawn evenly on a logarithmic scale): in English, in each other language, and so
# long that the prompt with them comes near the limit of 8192 tokens or passes it.
ENGLISH = ((60, 2, 128), (150, 128, 512), (130, 512, 3000))
OTHER = ((12, 32, 1500),)
LONG = (4000, 5000, 6000, 7000, 7500, 8000, 8104, 8105, 8106, 9000)
OF_EACH_LANGUAGE = 15
SENTENCE_END = re.compile(r"[.?!]\s|[。？！\n]")


def tokenizer_of(assets: Path) -> Tokenizer:
    """Qwen3.5's."""
    return Tokenizer.from_file(str(assets / "qwen3_5-tokenizer" / "tokenizer.json"))


def digit_examples(assets: Path, share: str, count: int) -> list[tuple[str, int]]:
    """Passages of 14 to 100 words (20 to 130 tokens) and the digit of their era, as many of each."""
    chance = random.Random(f"digits {share}")
    speeches = llama_texts.speeches_of(assets, share)
    of_era = [[speech for speech in speeches if bisect(TURNS, speech.year) == era] for era in range(len(DIGITS))]
    found = []
    for index in range(count):
        era = index % len(DIGITS)
        words = round(math.exp(chance.uniform(*map(math.log, WORDS))))
        found.append((chance.choice(of_era[era]).passage(chance, words), era))
    return found


def write_articles(assets: Path, path: Path) -> str:
    """Texts in many languages, from one token to above the limit: speeches, answers, awkward ones, and answers joined."""
    chance, tokenizer = random.Random(31), tokenizer_of(assets)
    long = [" ".join(s.words) for s in llama_texts.speeches_of(assets, "parity") if len(s.words) > 12000]
    found = [*llama_texts.AWKWARD, *(answer for _, answer in llama_texts.pyrit_answers(assets))]
    found += [answer for _, answer in llama_texts.small_talk(assets, OF_EACH_LANGUAGE)]
    for number, text in enumerate([joined for _, joined in sorted(joined_answers(assets).items())]):
        found += passages(tokenizer, [text], OTHER, random.Random(number))
    found += passages(tokenizer, long, ENGLISH, chance)
    found += [llama_texts.cut(tokenizer, from_sentence(chance, chance.choice(long), 6 * n), n) for n in LONG]
    unique = [{"text": text} for text in dict.fromkeys(found) if text.strip()]
    chance.shuffle(unique)
    texts.write_lines(unique, path)
    return llama_texts.summary([record["text"] for record in unique], tokenizer)


def joined_answers(assets: Path) -> dict[str, str]:
    """By language, the answers that are not taken one by one: no package has long texts in these languages."""
    by_language: dict[str, list[str]] = {}
    for record in texts.conversations(assets):
        by_language.setdefault(record["language"], []).append(record["text"].split("<|assistant|>", 1)[1])
    joined = {language: "\n".join(dict.fromkeys(found[OF_EACH_LANGUAGE:])) for language, found in by_language.items()}
    return {language: text for language, text in joined.items() if language != "en" and len(text) > 3000}


def passages(
    tokenizer: Tokenizer, sources: list[str], spread: tuple[tuple[int, int, int], ...], chance: random.Random
) -> list[str]:
    """Passages of many lengths."""
    found = []
    for count, low, high in spread:
        for _ in range(count):
            tokens = round(math.exp(chance.uniform(math.log(low), math.log(high))))
            found.append(llama_texts.cut(tokenizer, from_sentence(chance, chance.choice(sources), 8 * tokens), tokens))
    return found


def from_sentence(chance: random.Random, text: str, characters: int) -> str:
    """About so many characters, from the start of a sentence or line."""
    end = SENTENCE_END.search(text, chance.randrange(max(1, len(text) - characters)))
    start = end.end() if end else 0
    return text[start : start + characters]
