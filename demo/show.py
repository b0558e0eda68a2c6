"""Print classified conversations as a table: `python demo/show.py CLASSIFIED.jsonl`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

WIDTH = 72


def last_words(record: dict[str, Any]) -> str:
    """What the assistant said last, on one line."""
    text = record["text"] if "text" in record else record["messages"][-1]["content"]
    flat = " ".join(text.rpartition("<|assistant|>")[2].split())
    return flat if len(flat) <= WIDTH else flat[: WIDTH - 1] + "…"


def main(path: str) -> None:
    """One row per conversation."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    print(f"{'':<8}{'label':<13}{'p':>6}  the assistant's last words")
    for record in records:
        wrong = (
            ""
            if record["label"] == record.get("expected", record["label"])
            else "  (expected " + record["expected"] + ")"
        )
        print(f"{record['id']:<8}{record['label']:<13}{record['probability']:>6.3f}  {last_words(record)}{wrong}")


if __name__ == "__main__":
    main(*sys.argv[1:])
