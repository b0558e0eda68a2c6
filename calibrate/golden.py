"""Golden sets: texts with their token ids and the reference's logits, one JSON object per line, lossless.

    {"golden": 1, "reference": {...}}                                  first line: whose numbers these are
    {"text": "…", "label": "…", "input_ids": [...], "logits": ["0x1.8p+0", ...]}
    {"messages": [...], ...}

Logits are float32 written as `float.hex()`. A file without the first line, or without ids and logits, is a list of texts.
Either may be gzip-compressed. A line may also say its `label`, its `language`, and the `slice` of the set that it belongs to.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from samescore.calibrate.token_faults import name_difference
from samescore.runtime.contract import TextContract, text_of_record
from samescore.runtime.errors import BundleError, InputError
from samescore.runtime.manifest import parse_as
from samescore.runtime.tokenizer import TextEncoder

FORMAT = 1
# A compressed file may unfold to no more bytes than this.
MAX_BYTES = 200_000_000
GZIP_MAGIC = b"\x1f\x8b"
TEXT_FIELDS = ("text", "messages", "prompt", "response")

T = TypeVar("T")


@dataclass(frozen=True)
class ReferenceInfo:
    """Whose logits they are: the checkpoint's digest, and the versions and dtype that computed them.

    bf16_mean_abs_dp, bf16_p99_abs_dp: the drift of the reference's own bfloat16 run over these texts (the yardstick of
    the noise ratio), None if not measured. label_mass_mean, label_mass_min: what the full vocabulary's softmax gives to
    the label tokens over these texts, None for a classifier with a trained head.
    """

    checkpoint_sha256: str
    dtype: str
    torch: str
    transformers: str
    bf16_mean_abs_dp: float | None
    bf16_p99_abs_dp: float | None
    label_mass_mean: float | None
    label_mass_min: float | None


@dataclass(frozen=True)
class GoldenText:
    """One text as handed in, with its ids int64 [sequence] and reference logits float32 [labels] once known.

    label: what it is known to be. slice, language: what kind of text it is, as `adversarial` and `en`. Each None if not said.
    """

    record: Mapping[str, Any]
    label: str | None
    input_ids: npt.NDArray[np.int64] | None = None
    logits: npt.NDArray[np.float32] | None = None
    slice: str | None = None
    language: str | None = None


@dataclass(frozen=True)
class GoldenSet:
    """Texts in order; `reference` is None until their logits are known.

    bfloat16: logits float32 [texts, labels] of the reference's own bfloat16 run, where it was made here.
    """

    reference: ReferenceInfo | None
    texts: tuple[GoldenText, ...]
    bfloat16: npt.NDArray[np.float32] | None = None

    def input_ids(self) -> list[npt.NDArray[np.int64]]:
        """The ids of every text; they must have been encoded."""
        return [text.input_ids for text in self.texts if text.input_ids is not None]

    def logits(self) -> npt.NDArray[np.float32]:
        """Reference logits [texts, labels]."""
        return np.stack([text.logits for text in self.texts if text.logits is not None])

    def labels(self) -> list[str | None]:
        """The known label of each text, or None."""
        return [text.label for text in self.texts]

    def first(self, count: int | None) -> GoldenSet:
        """The first texts (None: all). Fewer do not keep what was measured over all: bfloat16's drift, the label mass."""
        if count is None or count >= len(self.texts):
            return self
        return GoldenSet(self.reference and over_fewer(self.reference), self.texts[:count])

    def without_reference(self) -> GoldenSet:
        """The texts alone: no ids, no logits."""
        return GoldenSet(None, tuple(replace(text, input_ids=None, logits=None) for text in self.texts))


def over_fewer(reference: ReferenceInfo) -> ReferenceInfo:
    """Whose logits they are, without what was measured over all texts."""
    return replace(reference, bf16_mean_abs_dp=None, bf16_p99_abs_dp=None, label_mass_mean=None, label_mass_min=None)


def read_golden(source: Path | bytes, name: str | None = None) -> GoldenSet:
    """Read a golden set or a plain list of texts (JSONL, or JSONL in gzip); InputError names the first bad line."""
    where = name or str(source)
    reference, texts = read_lines(source, where, parse_text)
    complete = all(text.logits is not None and text.input_ids is not None for text in texts)
    if reference is not None and not complete:
        raise InputError(f"{where} names a reference, but some lines hold no `input_ids` and `logits`")
    golden = GoldenSet(reference, tuple(texts))
    return golden if reference else golden.without_reference()


def read_lines(
    source: Path | bytes, where: str, parse: Callable[[Mapping[str, Any]], T]
) -> tuple[ReferenceInfo | None, list[T]]:
    """The reference of the first line, if there is one, and each other line as `parse` reads it."""
    try:
        raw = source if isinstance(source, bytes) else source.read_bytes()
        lines = unpacked(raw, where).decode().split("\n")  # not splitlines: a JSON string may hold U+2028
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error}") from error
    reference: ReferenceInfo | None = None
    texts: list[T] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise InputError("not a JSON object")
            if "golden" in document:
                reference = _reference(document)
            else:
                texts.append(parse(document))
        except (json.JSONDecodeError, InputError, BundleError, ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{where}, line {number}: {error}") from error
    if not texts:
        raise InputError(f'{where} holds no texts; a line is {{"text": "…"}} or {{"messages": […]}}')
    return reference, texts


def unpacked(raw: bytes, where: str) -> bytes:
    """The bytes as they are, or what gzip made them from; InputError when that is broken or beyond MAX_BYTES."""
    if not raw.startswith(GZIP_MAGIC):
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as packed:
            plain = packed.read(MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{where} is cut off or not a whole gzip file ({error}): write or download it again"
        ) from error
    if len(plain) > MAX_BYTES:
        raise InputError(
            f"{where} unfolds to more than {MAX_BYTES // 10**6} MB, the most that is read from gzip: split it, or hand it in "
            "uncompressed"
        )
    return plain


def write_golden(golden: GoldenSet) -> bytes:
    """The golden set as JSONL."""
    lines = [json.dumps({"golden": FORMAT, "reference": asdict(golden.reference) if golden.reference else None})]
    for text in golden.texts:
        document = dict(text.record)
        if text.label is not None:
            document["label"] = text.label
        if text.slice is not None:
            document["slice"] = text.slice
        if text.language is not None:
            document["language"] = text.language
        if text.input_ids is not None:
            document["input_ids"] = [int(i) for i in text.input_ids]
        if text.logits is not None:
            document["logits"] = [float(x).hex() for x in text.logits]
        lines.append(json.dumps(document, ensure_ascii=False))
    return ("\n".join(lines) + "\n").encode()


def encode_golden(golden: GoldenSet, encoder: TextEncoder) -> GoldenSet:
    """Tokenize every text; with stored ids, BundleError if any text now yields other ids."""
    texts, stored, now = [], [], []
    first = 0
    for number, text in enumerate(golden.texts):
        try:
            ids = encoder.encode(text_of_record(text.record, encoder.contract)).input_ids
        except InputError as error:
            raise InputError(f"golden text {number}: {error}") from error
        if text.input_ids is not None and not np.array_equal(ids, text.input_ids):
            stored.append(text.input_ids)
            now.append(ids)
            first = number if len(now) == 1 else first
        texts.append(replace(text, input_ids=ids))
    if now:
        raise BundleError(
            f"{len(now)} of {len(texts)} golden texts tokenize to other ids than the stored ones "
            f"(first: text {first}): the tokenizer, the contract or the golden set belongs to something else. "
            f"diagnosis: {name_difference(stored, now, encoder.spell)}"
        )
    return replace(golden, texts=tuple(texts))


def text_digests(golden: GoldenSet, contract: TextContract) -> set[str]:
    """SHA-256 of each text as the contract renders it, to keep calibration and golden texts apart."""
    return {text_digest(text, contract) for text in golden.texts}


def text_digest(text: GoldenText, contract: TextContract) -> str:
    """SHA-256 of the text as the contract renders it, in 64 hexadecimal digits."""
    return hashlib.sha256(text_of_record(text.record, contract).encode()).hexdigest()


def without_texts(golden: GoldenSet, digests: set[str], contract: TextContract) -> GoldenSet:
    """The set without the texts of these digests."""
    kept = (text for text in golden.texts if text_digest(text, contract) not in digests)
    return replace(golden, texts=tuple(kept))


def with_logits(golden: GoldenSet, logits: npt.NDArray[np.float32], reference: ReferenceInfo) -> GoldenSet:
    """The set with reference logits [texts, labels] filled in."""
    texts = tuple(replace(text, logits=row) for text, row in zip(golden.texts, logits, strict=True))
    return GoldenSet(reference, texts)


def _reference(document: Mapping[str, Any]) -> ReferenceInfo | None:
    if document["golden"] != FORMAT:
        raise InputError(f"golden format {document['golden']!r}; this samescore reads {FORMAT}")
    value = document.get("reference")
    return None if value is None else parse_as(ReferenceInfo, value, "reference")


def is_digest_only(document: Mapping[str, Any]) -> bool:
    """Whether the line names a text by its digest and does not hold it: see `shipped.py`."""
    return "digest" in document and not any(field in document for field in TEXT_FIELDS)


def parse_text(document: Mapping[str, Any]) -> GoldenText:
    """One text of a golden set or list of texts."""
    if is_digest_only(document):
        raise InputError(
            "this text is known by its digest only, as a bundle keeps what would make it too large: name the file of texts "
            "that the bundle was made with"
        )
    record = {key: document[key] for key in TEXT_FIELDS if document.get(key) is not None}
    if set(record) not in ({"text"}, {"messages"}, {"prompt", "response"}):
        raise InputError(
            f"needs exactly one of `text`, `messages`, or `prompt` and `response`; has: {', '.join(document)}"
        )
    ids, logits = document.get("input_ids"), document.get("logits")
    return GoldenText(
        record=record,
        label=_label(document.get("label")),
        input_ids=None if ids is None else _int_array(ids),
        logits=None if logits is None else parse_logits(logits),
        slice=parse_said(document, "slice"),
        language=parse_said(document, "language"),
    )


def parse_logits(values: Iterable[Any]) -> npt.NDArray[np.float32]:
    """Logits float32 [labels] from numbers or `float.hex()`."""
    return np.array([_float(x) for x in values], dtype=np.float32)


def parse_said(document: Mapping[str, Any], field: str) -> str | None:
    """An optional string; InputError when it is something else."""
    value = document.get(field)
    if value is not None and not isinstance(value, str):
        raise InputError(f"`{field}` must be a string, got {json.dumps(value, ensure_ascii=False)[:80]}")
    return value


def _int_array(values: Iterable[Any]) -> npt.NDArray[np.int64]:
    ids: Sequence[Any] = list(values)
    if not ids or not all(type(i) is int for i in ids):
        raise InputError("`input_ids` is not a list of integers")
    return np.array(ids, dtype=np.int64)


def _label(value: Any) -> str | None:
    """A label's name; a digit may be written as a number."""
    if value is None or isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise InputError(f"`label` is {value!r}: neither a text nor a whole number")


def _float(value: Any) -> float:
    return float.fromhex(value) if isinstance(value, str) else float(value)
