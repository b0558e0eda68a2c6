"""Which texts a bundle is checked with, and where their reference logits come from."""

from __future__ import annotations

import os
from pathlib import Path

from samescore.calibrate.golden import GoldenSet, encode_golden, read_golden, text_digest
from samescore.calibrate.scores import BFLOAT16, SCORES_NAME, read_scores
from samescore.calibrate.shipped import GOLDEN_NAME, ShippedSet, read_shipped, with_stored
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, UsageError
from samescore.runtime.tokenizer import TextEncoder


def texts_to_verify(
    bundle: Bundle, texts: str | os.PathLike[str] | None, encoder: TextEncoder, *, has_reference: bool
) -> tuple[GoldenSet, str | None]:
    """The texts with ids and the reference's logits (if PyTorch will compute these, without), and what to say of them."""
    shipped = read_shipped(bundle.read(GOLDEN_NAME))
    if texts is None:
        golden = shipped.inside()
        golden = golden.without_reference() if has_reference else _stored(bundle, shipped, golden, encoder)
        return encode_golden(golden, encoder), shipped.note()
    if has_reference or read_golden(Path(texts)).reference is not None:
        return encode_golden(reference_texts(bundle, texts, has_reference=has_reference), encoder), None
    return _stored(bundle, shipped, encode_golden(read_golden(Path(texts)), encoder), encoder, os.fspath(texts)), None


def _stored(
    bundle: Bundle, shipped: ShippedSet, golden: GoldenSet, encoder: TextEncoder, name: str = GOLDEN_NAME
) -> GoldenSet:
    """Golden texts of the bundle with the logits that it stores for their digests; UsageError when it does not know some."""
    row_of = {digest: row for row, digest in enumerate(shipped.digests(encoder.contract))}
    found = [row_of.get(text_digest(text, encoder.contract)) for text in golden.texts]
    rows = [row for row in found if row is not None]
    if unknown := len(found) - len(rows):
        raise UsageError(
            f"{unknown} of {len(found)} texts in {name} are no golden texts of the bundle (first: text {found.index(None)}), "
            "and it holds no reference logits: name the checkpoint too (--reference CKPT), or take them out"
        )
    lengths = shipped.lengths()
    if other := [
        n for n, (ids, row) in enumerate(zip(golden.input_ids(), rows, strict=True)) if len(ids) != lengths[row]
    ]:
        raise BundleError(
            f"{len(other)} of {len(rows)} golden texts tokenize to another number of tokens than the stored one "
            f"(first: text {other[0]}): the tokenizer, the contract or the golden set belongs to something else"
        )
    scores = read_scores(bundle.read(SCORES_NAME)) if SCORES_NAME in bundle.manifest.files else {}
    manifest = bundle.manifest
    return with_stored(
        shipped,
        golden.texts,
        rows,
        bfloat16=scores.get(BFLOAT16),
        labels=manifest.labels,
        activation=manifest.activation,
    )


def reference_texts(bundle: Bundle, texts: str | os.PathLike[str], *, has_reference: bool) -> GoldenSet:
    """The texts with the reference's logits that they hold, or bare if PyTorch will compute them."""
    golden = read_golden(Path(texts))
    if has_reference:
        return golden.without_reference()
    if golden.reference is None:
        raise UsageError(f"{texts} holds no reference logits: name the checkpoint too (--reference CKPT)")
    if golden.reference.checkpoint_sha256 != bundle.manifest.source.sha256:
        raise BundleError("the golden set's reference logits belong to another checkpoint than the bundle")
    return golden
