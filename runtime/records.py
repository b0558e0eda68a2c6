"""Files of texts: JSONL or plain lines in, JSONL out, one object per input line, in order; bad lines are reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

from samescore.runtime.classifier import Classifier
from samescore.runtime.errors import InputError
from samescore.runtime.prediction import Prediction

# Lines scored at a time: enough to sort by length, few enough to keep memory flat.
CHUNK = 1024
OUTPUT_FIELDS = frozenset(
    {"label", "probability", "probabilities", "logits", "entropy", "expected_value", "truncated", "error"}
)


@dataclass(frozen=True)
class Line:
    """One input line: its number from 1, and either its fields or why it could not be read."""

    number: int
    fields: dict[str, Any]
    error: str | None


def read_lines(stream: IO[bytes], *, jsonl: bool) -> Iterator[Line]:
    """Every non-blank line of a binary stream; a line of plain text becomes `{"text": line}`."""
    for number, raw in enumerate(stream, start=1):
        if not raw.strip():
            continue
        yield _read_line(number, raw, jsonl=jsonl)


def _read_line(number: int, raw: bytes, *, jsonl: bool) -> Line:
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Line(number, {}, f"not UTF-8 at byte {error.start}: {error.reason}")
    if not jsonl:
        return Line(number, {"text": text}, None)
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        return Line(number, {}, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, {}, f"not a JSON object but {type(fields).__name__}")
    return Line(number, fields, None)


def score_lines(
    classifier: Classifier,
    lines: Iterable[Line],
    *,
    allow_role_tokens: bool = False,
    progress: Callable[[], None] | None = None,
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line with its output object: its own fields plus the prediction's, or `error` and `line`.

    A field of the input that has the name of an output field is kept as `input_<name>`.
    """
    iterator = iter(lines)
    while chunk := list(islice(iterator, CHUNK)):
        readable = [line.fields for line in chunk if line.error is None]
        scored = iter(classifier.score_records(readable, allow_role_tokens=allow_role_tokens, progress=progress))
        for line in chunk:
            outcome = next(scored) if line.error is None else InputError(line.error)
            yield line, output_record(line, outcome)


def output_record(line: Line, outcome: Prediction | InputError) -> dict[str, Any]:
    """The output object for one line."""
    record = {(f"input_{key}" if key in OUTPUT_FIELDS else key): value for key, value in line.fields.items()}
    if isinstance(outcome, Prediction):
        return record | outcome.to_record()
    return record | {"error": str(outcome), "line": line.number}


def dump_records(records: Sequence[dict[str, Any]]) -> str:
    """Objects as JSONL text."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
