"""`samescore verify` of a bundle that generates text: its golden answers again on this box, or PyTorch's anew."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from samescore.calibrate.certificate import CERTIFICATE_NAME, environment
from samescore.calibrate.generation_certificate import GenerationCertificate
from samescore.calibrate.generation_certify import judge_generation, measure_against_stored
from samescore.calibrate.generation_golden import (
    GOLDEN_GENERATION_NAME,
    GenerationGolden,
    encode_prompt,
    read_generation_golden,
)
from samescore.calibrate.progress import Reporter
from samescore.export.generator import Generator
from samescore.generation_gate import Asked, chat_encoder, measure_engines
from samescore.runtime.bundle import Bundle
from samescore.runtime.chat import PromptEncoder
from samescore.runtime.errors import BundleError, MissingDependencyError, UsageError
from samescore.runtime.generation.engine import Engine
from samescore.runtime.manifest import Generation, Variant
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads
from samescore.scored import open_generator

# In a template: it writes today's date, so that the same messages have other ids tomorrow.
DATED = "strftime_now"


@dataclass(frozen=True)
class GeneratorVerifyResult:
    """What was checked, and the numbers on this box. `note` says what they do not show."""

    bytes_checked: int
    certificate: GenerationCertificate
    note: str | None

    @property
    def passed(self) -> bool:
        """Whether every checked variant is inside its tolerance."""
        return self.certificate.passed


def verify_generator(
    bundle: Bundle,
    runnable: Sequence[tuple[Variant, str]],
    *,
    reference: str | os.PathLike[str] | None,
    texts: str | os.PathLike[str] | None,
    report: Reporter,
) -> GeneratorVerifyResult:
    """Hash every file and measure each variant on its target.

    reference: a checkpoint folder, run through PyTorch again; texts: other conversations for it (JSONL). Without it the
    bundle's golden set serves and no PyTorch is needed. UsageError where there is none, BundleError where its prompts have
    other ids now.
    """
    manifest, threads = bundle.manifest, available_threads()
    generation = manifest.generation
    assert generation is not None  # a generator's bundle
    with report(f"hashing {len(manifest.files)} files"):
        checked = bundle.verify_files()
    golden = None
    if GOLDEN_GENERATION_NAME in manifest.files:
        golden = read_generation_golden(bundle.read(GOLDEN_GENERATION_NAME))

    def engine(variant: Variant, target: str) -> Engine:
        session = Session(bundle.model(variant), target, intra_op_threads=threads)
        return Engine(session, context=generation.context, vocabulary=generation.vocabulary, cache_bytes=0)

    if reference is not None:
        opened, _ = open_generator(Path(reference))
        assert isinstance(opened, Generator)  # what `open_generator` returns
        engines = {variant.name: engine(variant, target) for variant, target in runnable}
        precisions = {variant.name: variant.precision for variant, _ in runnable}
        asked = Asked(texts, golden.measured[0] if golden and texts is None else None)
        tokenizer = bundle.read("tokenizer.json")
        fresh, _ = measure_engines(opened, generation, tokenizer, engines, precisions, report, asked, threads)
        other = fresh.reference is not None and fresh.reference.checkpoint_sha256 != manifest.source.sha256
        note = f"{reference} is not the checkpoint that the bundle was made from (another digest)" if other else None
        return GeneratorVerifyResult(checked, fresh, note)
    if texts is not None:
        raise UsageError(f"{texts} holds no answers of a reference: name the checkpoint too (--reference CKPT)")
    if golden is None:
        raise UsageError(
            "this bundle was exported without being measured, so it holds nothing to be held against: name its checkpoint "
            "(--reference CKPT)"
        )
    note = _same_prompts(bundle, generation, golden)
    certified = json.loads(bundle.read(CERTIFICATE_NAME))["variants"]
    parity = {}
    for variant, target in runnable:
        measured = measure_against_stored(golden, engine(variant, target), variant.name, report)
        found = judge_generation(measured, variant.name, variant.precision, golden, whole=False)
        # A lower bound inside the tolerance says nothing against a whole KLD that was outside.
        before = certified[variant.name]
        if before["outcome"] == "FAIL":
            said = tuple(f"when it was exported: {line}" for line in before["failures"])
            found = replace(found, outcome="FAIL", failures=(*found.failures, *said))
        parity[variant.name] = found
    return GeneratorVerifyResult(checked, GenerationCertificate(environment(threads), parity, golden.reference), note)


def _same_prompts(bundle: Bundle, generation: Generation, golden: GenerationGolden) -> str:
    """What to say of the numbers; BundleError when prompts have other ids than the stored ones."""
    note = (
        f"against the {golden.sequences[0].rows.ids.shape[1]} likeliest tokens that the bundle stores of each position: "  # type: ignore[union-attr]
        "every KLD is a lower bound"
    )
    if (kept := len(golden.sequences)) < sum(golden.measured):
        note += f"; it keeps {kept} of the {sum(golden.measured)} sequences that it was gated on"
    source = None if generation.chat_template is None else bundle.read(generation.chat_template).decode()
    if source is not None and DATED in source:
        return f"{note}; its chat template writes the date, so prompts are read by their stored ids"
    encoder = PromptEncoder(bundle.read("tokenizer.json"))
    try:
        chat = chat_encoder(encoder, source, generation)
    except MissingDependencyError:
        return f"{note}; chats were not encoded again, which needs samescore[chat]"
    for number, one in enumerate(golden.of("answer")):
        if not np.array_equal(encode_prompt(one.record, encoder, chat), one.prompt):
            raise BundleError(
                f"golden prompt {number} has other token ids than the stored ones: the tokenizer, the chat template or the "
                "golden set belongs to something else"
            )
    return note
