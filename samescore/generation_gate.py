"""The gate of variants that generate text: what is measured of them, and whether that will do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from samescore.calibrate.certificate import environment
from samescore.calibrate.generation_certificate import GenerationCertificate as GenerationCertificate
from samescore.calibrate.generation_certificate import GenerationParity as GenerationParity
from samescore.calibrate.generation_certify import judge_generation, measure_against_torch
from samescore.calibrate.generation_golden import (
    GenerationGolden,
    GoldenSequence,
    prompts_of,
    texts_of,
)
from samescore.calibrate.golden import GoldenSet, read_golden
from samescore.calibrate.progress import Reporter
from samescore.calibrate.stages import read_model
from samescore.export.generation import chat_template
from samescore.export.generator import Generator
from samescore.export.recipes import VariantSpec
from samescore.packaged import PACKAGE
from samescore.runtime.chat import ChatEncoder, ChatTemplate, PromptEncoder
from samescore.runtime.errors import GateError, UsageError
from samescore.runtime.generation.engine import Engine
from samescore.runtime.manifest import Generation, Precision
from samescore.runtime.providers import available_targets
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

# How much an export measures: greedy answers of so many tokens, and one text for so many answers.
PROMPTS, TOKENS, PROMPTS_PER_TEXT = 200, 64, 5
PROMPT_TEXTS, REAL_TEXTS = "texts/conversations/golden.jsonl.gz", "texts/articles/golden.jsonl.gz"


@dataclass(frozen=True)
class Asked:
    """What to measure on. prompts: a JSONL file, or None for what ships. limit: so many of them; 0 measures nothing."""

    prompts: str | os.PathLike[str] | None = None
    limit: int | None = None


def measure_variants(
    checkpoint: Generator,
    generation: Generation,
    tokenizer: bytes,
    specs: Sequence[VariantSpec],
    staging: Path,
    report: Reporter,
    asked: Asked,
) -> tuple[GenerationCertificate, GenerationGolden | None]:
    """Every built variant's evidence, and the golden set that it was measured on (None: nothing was measured).

    checkpoint: what PyTorch is asked. staging: the folder that holds each variant's graph under its name. UsageError when
    there are no prompts or texts of the right length, MissingDependencyError without PyTorch.
    """
    threads = available_threads()
    limit = PROMPTS if asked.limit is None else asked.limit
    if limit == 0:
        nothing = {spec.name: GenerationParity("NOT MEASURED") for spec in specs}
        return GenerationCertificate(environment(threads), nothing), None
    engines = {spec.name: _engine(staging / spec.name, spec, generation, threads) for spec in specs}
    precisions = {spec.name: spec.precision for spec in specs}
    return measure_engines(
        checkpoint, generation, tokenizer, engines, precisions, report, Asked(asked.prompts, limit), threads
    )


def measure_engines(
    checkpoint: Generator,
    generation: Generation,
    tokenizer: bytes,
    engines: Mapping[str, Engine],
    precisions: Mapping[str, Precision],
    report: Reporter,
    asked: Asked,
    threads: int,
) -> tuple[GenerationCertificate, GenerationGolden]:
    """As `measure_variants`, of engines by variant; each has a precision."""
    limit = PROMPTS if asked.limit is None else asked.limit
    sequences = _sequences(checkpoint, generation, tokenizer, asked, limit)
    golden, measured = measure_against_torch(
        checkpoint, sequences, engines, eos=generation.eos, tokens=_tokens(generation), report=report
    )
    found = {name: judge_generation(measured, name, precisions[name], golden, whole=True) for name in engines}
    return GenerationCertificate(environment(threads), found, golden.reference), golden


def _sequences(
    checkpoint: Generator, generation: Generation, tokenizer: bytes, asked: Asked, limit: int
) -> list[GoldenSequence]:
    """Prompts and texts; UsageError when there are none."""
    encoder = PromptEncoder(tokenizer)
    chat = chat_encoder(encoder, chat_template(checkpoint), generation)
    tokens = _tokens(generation)
    conversations = read_golden(Path(asked.prompts) if asked.prompts else PACKAGE / PROMPT_TEXTS)
    prompts = list(prompts_of(conversations, encoder, chat, limit, generation.context - tokens))
    articles = read_golden(PACKAGE / REAL_TEXTS)
    # What prompts are made of serves as real text where the articles are too short for the context.
    both = GoldenSet(None, tuple(chain(articles.texts, conversations.texts)))
    texts = list(texts_of(both, encoder, max(1, limit // PROMPTS_PER_TEXT), tokens))
    if not prompts or not texts:
        raise UsageError(
            f"a context of {generation.context} tokens holds {len(prompts)} golden prompts and {len(texts)} texts: raise "
            "--max-tokens, name other prompts with --golden, or measure nothing with --golden-limit 0"
        )
    return [*prompts, *texts]


def _tokens(generation: Generation) -> int:
    """How long answers are: the prompt needs most of a short context."""
    return max(1, min(TOKENS, generation.context // 4))


def chat_encoder(encoder: PromptEncoder, template: str | None, generation: Generation) -> ChatEncoder | None:
    """Messages to ids, where there is a template."""
    return None if template is None else ChatEncoder(encoder, ChatTemplate(template, generation.template_tokens))


def _engine(folder: Path, spec: VariantSpec, generation: Generation, threads: int) -> Engine:
    """The engine that will write, on the variant's own provider where this box has it; it keeps no states."""
    target = spec.target if spec.target in available_targets() else spec.certified_on
    session = Session(read_model(folder), target, intra_op_threads=threads)
    return Engine(session, context=generation.context, vocabulary=generation.vocabulary, cache_bytes=0)


def require_passed(certificate: GenerationCertificate, *, allow_drift: bool) -> None:
    """GateError when a measured variant failed, unless that is allowed."""
    failed: Mapping[str, GenerationParity] = {
        name: parity for name, parity in certificate.variants.items() if parity.outcome == "FAIL"
    }
    if failed and not allow_drift:
        said = "; ".join(f"{name}: {', '.join(parity.failures)}" for name, parity in failed.items())
        raise GateError(
            f"{said}. Nothing was written. Export a more exact variant (cpu-fp32), or --allow-drift to keep this one with a "
            "certificate that says it failed"
        )
