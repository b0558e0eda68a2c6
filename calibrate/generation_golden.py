"""The golden set of a generator: prompts with the reference's greedy answers, texts, and its likeliest tokens at each place.

    {"golden_generation": 1, "reference": {...}, "prompts": N, "texts": M}            first line; how many were measured
    {"kind": "answer", "text"|"messages": …, "prompt_ids": [...], "ids": [...], "top": [[...]], "logits": [["0x1.8p+0"]], ...}
    {"kind": "text", …}

JSONL in gzip, lossless: logits float32 and normalizers float64 as `float.hex()`. `ids` are what follows the prompt and was
teacher-forced: a greedy answer of the reference, or the rest of a text.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from samescore.calibrate.generation_metrics import Ids, Rows
from samescore.calibrate.golden import GoldenSet, unpacked
from samescore.runtime.chat import ChatEncoder, PromptEncoder
from samescore.runtime.contract import ROLE_TOKEN
from samescore.runtime.errors import BundleError, InputError
from samescore.runtime.manifest import parse_as

FORMAT = 1
GOLDEN_GENERATION_NAME = "golden_generation.jsonl.gz"
# The file is at most this large; sequences beyond are left out, half of them at a time.
LARGEST_FILE = 5_000_000
# Tokens that the file knows the reference's logits of, at each position.
TOP = 10
# Prompts have so many tokens; of a text so many are read before its next tokens are compared.
SHORTEST_PROMPT, LONGEST_PROMPT, TEXT_PROMPT = 4, 512, 32

Kind = Literal["answer", "text"]


@dataclass(frozen=True)
class GenerationReference:
    """Whose logits they are, and how the reference's own bfloat16 drifts (mean KLD), None where not measured."""

    checkpoint_sha256: str
    dtype: str
    torch: str
    transformers: str
    bf16_answers_kld: float | None = None
    bf16_texts_kld: float | None = None


@dataclass(frozen=True)
class GoldenSequence:
    """A prompt's ids int64 [tokens] and what follows it int64 [positions], empty until the reference answered.

    record: the prompt as `text` or `messages`. rows: the reference's logits, where they are known.
    """

    kind: Kind
    record: Mapping[str, Any]
    prompt: Ids
    following: Ids
    rows: Rows | None = None


@dataclass(frozen=True)
class GenerationGolden:
    """Sequences, answers first. measured: how many answers and texts were measured when the bundle was made."""

    reference: GenerationReference | None
    sequences: tuple[GoldenSequence, ...]
    measured: tuple[int, int]

    def of(self, kind: Kind) -> list[GoldenSequence]:
        """Those of one kind."""
        return [one for one in self.sequences if one.kind == kind]


def prompts_of(
    texts: GoldenSet, encoder: PromptEncoder, chat: ChatEncoder | None, count: int, room: int
) -> Iterator[GoldenSequence]:
    """Conversations up to the last thing a user says, each once, until `count` are found; room: the longest prompt allowed."""
    seen: set[bytes] = set()
    for text in texts.texts:
        messages = messages_of(text.record)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if len(seen) == count:
            return
        if not messages:
            continue
        plain = "\n\n".join(message["content"] for message in messages)
        record: dict[str, Any] = {"text": plain} if chat is None else {"messages": messages}
        try:
            ids = encode_prompt(record, encoder, chat)
        except InputError:
            continue  # a template that has no such role, or no such order of roles
        if SHORTEST_PROMPT <= len(ids) <= min(LONGEST_PROMPT, room) and ids.tobytes() not in seen:
            seen.add(ids.tobytes())
            yield GoldenSequence("answer", record, ids, np.zeros(0, np.int64))


def texts_of(texts: GoldenSet, encoder: PromptEncoder, count: int, tokens: int) -> Iterator[GoldenSequence]:
    """The first tokens of real texts that are long enough; what follows TEXT_PROMPT tokens is at most `tokens` long."""
    found = 0
    for text in texts.texts:
        written = text.record.get("text")
        if found == count:
            return
        if not isinstance(written, str):
            continue
        ids = encoder.text(written)
        if len(ids) >= TEXT_PROMPT + tokens:
            found += 1
            yield GoldenSequence("text", {"text": written}, ids[:TEXT_PROMPT], ids[TEXT_PROMPT : TEXT_PROMPT + tokens])


def messages_of(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """A record's messages; of a text with role tokens those between them, of any other text one of the user."""
    if isinstance(record.get("messages"), list):
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
    if isinstance(record.get("prompt"), str):
        return [{"role": "user", "content": str(record["prompt"])}]
    written = str(record.get("text", ""))
    parts = re.split(f"({ROLE_TOKEN.pattern})", written)
    if len(parts) == 1:
        return [{"role": "user", "content": written.strip()}] if written.strip() else []
    found = []
    for token, content in zip(parts[1::2], parts[2::2], strict=False):
        role = token.strip("<|>")
        if role in ("system", "user", "assistant") and content.strip():
            found.append({"role": role, "content": content.strip()})
    return found


def encode_prompt(record: Mapping[str, Any], encoder: PromptEncoder, chat: ChatEncoder | None) -> Ids:
    """Ids of a golden prompt, as generation reads it."""
    if "messages" not in record:
        return encoder.text(str(record["text"]))
    if chat is None:
        raise BundleError("a golden prompt has messages, but the bundle has no chat template")
    return chat.encode(record["messages"])[0]


def write_generation_golden(golden: GenerationGolden) -> bytes:
    """The file, of so many of the first answers and texts as fit into LARGEST_FILE."""
    answers, texts = golden.of("answer"), golden.of("text")
    while True:
        raw = gzip.compress(_lines(golden, [*answers, *texts]), mtime=0)
        if len(raw) <= LARGEST_FILE or len(answers) + len(texts) <= 2:
            return raw
        answers, texts = answers[: (len(answers) + 1) // 2], texts[: (len(texts) + 1) // 2]


def _lines(golden: GenerationGolden, sequences: Sequence[GoldenSequence]) -> bytes:
    first = {
        "golden_generation": FORMAT,
        "reference": asdict(golden.reference) if golden.reference else None,
        "prompts": golden.measured[0],
        "texts": golden.measured[1],
    }
    lines = [json.dumps(first), *(json.dumps(_document(one), ensure_ascii=False) for one in sequences)]
    return ("\n".join(lines) + "\n").encode()


def _document(one: GoldenSequence) -> dict[str, Any]:
    rows = one.rows
    assert rows is not None and rows.ids is not None  # only likeliest tokens are kept
    return {
        "kind": one.kind,
        **one.record,
        "prompt_ids": one.prompt.tolist(),
        "ids": one.following.tolist(),
        "top": rows.ids.tolist(),
        "logits": [[float(x).hex() for x in row] for row in rows.logits],
        "normalizer": [float(x).hex() for x in rows.normalizer],
        "following": [float(x).hex() for x in rows.following_logit],
    }


def read_generation_golden(raw: bytes) -> GenerationGolden:
    """The bytes of the file; BundleError names the first bad line."""
    where = GOLDEN_GENERATION_NAME
    try:
        lines = [line for line in unpacked(raw, where).decode().split("\n") if line.strip()]
        first = json.loads(lines[0])
        if not isinstance(first, dict) or first.get("golden_generation") != FORMAT:
            raise BundleError(f"{where} is no golden set of generation, format {FORMAT}")
        reference = parse_as(GenerationReference, first["reference"], "reference")
        measured = (int(first["prompts"]), int(first["texts"]))
    except (InputError, UnicodeDecodeError, ValueError, KeyError, IndexError, TypeError) as error:
        raise BundleError(f"{where} cannot be read: {error}") from error
    sequences = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            sequences.append(_sequence(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BundleError(f"{where}, line {number}: {error!r}") from error
    if not sequences:
        raise BundleError(f"{where} holds no sequences")
    return GenerationGolden(reference, tuple(sequences), measured)


def _sequence(document: Mapping[str, Any]) -> GoldenSequence:
    following = np.array(document["ids"], np.int64)
    logits = [_floats(row) for row in document["logits"]]
    rows = Rows(
        np.array(document["top"], np.int64),
        np.array(logits, np.float32),
        np.array(_floats(document["normalizer"]), np.float64),
        following,
        np.array(_floats(document["following"]), np.float32),
    )
    shapes = {len(following), len(rows.normalizer), len(rows.following_logit), len(rows.logits)}
    prompt = np.array(document["prompt_ids"], np.int64)
    if shapes != {len(following)} or rows.ids is None or rows.ids.shape != rows.logits.shape or not len(prompt):
        raise ValueError("its arrays have different lengths")
    if document["kind"] not in ("answer", "text"):
        raise ValueError(f"unknown kind {document['kind']!r}")
    record = {key: document[key] for key in ("text", "messages") if key in document}
    return GoldenSequence(document["kind"], record, prompt, following, rows)


def _floats(values: Iterable[Any]) -> list[float]:
    return [float.fromhex(value) for value in values]


def with_rows(one: GoldenSequence, following: Ids, rows: Rows) -> GoldenSequence:
    """The sequence with what follows its prompt and the reference's likeliest tokens there."""
    return replace(one, following=following, rows=rows)
