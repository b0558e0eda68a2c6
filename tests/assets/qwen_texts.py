"""Real texts for the digit scorers: passages of speeches in the prompt of a news classifier, and articles for parity.

Speeches are shared out as for the Llama classifiers: whole, so that no parity or held-out text comes from one that was
trained on.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from pathlib import Path

import llama_texts
from tokenizers import Tokenizer

# The prompt of the published political-leaning classifier, to the letter. The article is stripped and put in.
PROMPT = """You are an expert media bias analyst. Read the following news article and classify its political leaning on a 0-4 scale.

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
