"""Which buckets a bundle is compiled for, and from which lengths of texts they are chosen."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from samescore.runtime.batches import Bucket, BucketPlan, measure_plan, plan_buckets
from samescore.runtime.bundle import Bundle
from samescore.runtime.cache import file_digests, plan_path, read_plan
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import BundleError, InputError, UsageError
from samescore.runtime.manifest import Variant
from samescore.runtime.tokenizer import TextEncoder

log = logging.getLogger(__name__)

GOLDEN_NAME = "golden.jsonl.gz"
GOLDEN_BYTES = 100_000_000


@dataclass(frozen=True)
class Memory:
    """What buckets take on the device, in bytes: each session holds the weights, and ONNX Runtime may hold them again."""

    weights: int
    buckets: int

    @property
    def most(self) -> int:
        """weights x buckets x 2, without activations."""
        return 2 * self.weights * self.buckets


def memory_of(bundle: Bundle, variant: Variant, buckets: Iterable[Bucket]) -> Memory:
    """The memory plan of a variant, by the sizes of its files."""
    files = bundle.manifest.files
    return Memory(sum(files[name].size for name in (variant.model, *variant.data)), len(set(buckets)))


def buckets_of(bundle: Bundle, variant: Variant, target: str, longest: int) -> tuple[Bucket, ...]:
    """The buckets that this file was warmed up with here, else those planned from the bundle's golden texts."""
    if kept := read_plan(plan_path(target, file_digests(bundle.manifest, variant))):
        if kept[-1].sequence < longest:
            log.warning(
                "%s was warmed up for texts of at most %d tokens, longer ones are refused: samescore warmup %s --max-tokens %d",
                variant.name,
                kept[-1].sequence,
                bundle.path,
                longest,
            )
        return kept
    planned = plan_buckets(golden_lengths(bundle), longest=longest).buckets
    log.warning(
        "%s has not been warmed up here: %d buckets, planned from its golden texts, are compiled now, which may take minutes "
        "(%s). Before the first request: samescore warmup %s",
        variant.name,
        len(planned),
        ", ".join(map(str, planned)),
        bundle.path,
    )
    return planned


def golden_lengths(bundle: Bundle) -> list[int]:
    """Tokens of each golden text of a bundle, whole or known by digest; BundleError where they cannot be read."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(bundle.read(GOLDEN_NAME))) as packed:
            raw = packed.read(GOLDEN_BYTES + 1)
        if len(raw) > GOLDEN_BYTES:
            raise BundleError(f"{GOLDEN_NAME} unfolds to more than {GOLDEN_BYTES // 10**6} MB")
        texts = [document for document in map(json.loads, raw.splitlines()) if "golden" not in document]
        return [text["tokens"] if "tokens" in text else len(text["input_ids"]) for text in texts]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{bundle.path}: {GOLDEN_NAME} does not tell the lengths of its texts: {error}") from error


def file_lengths(path: Path, encoder: TextEncoder) -> list[int]:
    """Tokens of each line of a JSONL file: an object with the contract's fields, or a number of tokens.

    InputError names the first line that is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    lengths = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                lengths.append(_length(json.loads(line), encoder))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not lengths:
        raise InputError(f"{path} holds no lines; a line is a text's object, or its number of tokens")
    return lengths


def _length(document: object, encoder: TextEncoder) -> int:
    if isinstance(document, dict):
        return len(encoder.encode(text_of_record(document, encoder.contract)).input_ids)
    if isinstance(document, int) and not isinstance(document, bool) and document > 0:
        return document
    raise InputError(f"neither an object nor a number of tokens: {str(document)[:60]!r}")


def measure_named(buckets: tuple[Bucket, ...], lengths: list[int]) -> tuple[BucketPlan, int]:
    """What named buckets cost for the lengths that they hold, and how many texts they do not hold."""
    held = [length for length in lengths if length <= buckets[-1].sequence]
    if not held:
        raise UsageError(
            f"the longest bucket, {buckets[-1]}, holds none of the {len(lengths)} texts; the shortest has {min(lengths)} tokens"
        )
    return measure_plan(buckets, held), len(lengths) - len(held)
