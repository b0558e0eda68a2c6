"""`samescore export --task generate`: a language model into a bundle that generates text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from samescore._progress import silent, step
from samescore.adapted import AdapterOptions
from samescore.building import Calibrated, asked_formats
from samescore.calibrate.certificate import CERTIFICATE_NAME
from samescore.calibrate.generation_golden import GOLDEN_GENERATION_NAME, write_generation_golden
from samescore.calibrate.golden import GoldenSet, encode_golden
from samescore.calibrate.progress import Reporter
from samescore.export.generation import DEFAULT_CONTEXT, TEMPLATE_NAME, chat_template, generation_of
from samescore.export.generator import Generator
from samescore.export.profiles import Profile, contract_for
from samescore.export.publish import check_target, publish, staging_folder
from samescore.export.recipes import VariantSpec
from samescore.exporting import chosen_specs, compact_json, write_manifest
from samescore.generation_gate import Asked, GenerationCertificate, measure_variants, require_passed
from samescore.generator_card import generator_card
from samescore.packaged import calibration_set
from samescore.runtime.contract import ROLE_TOKEN, TextContract
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import SCHEMA_VERSION, Manifest
from samescore.runtime.tokenizer import TextEncoder
from samescore.sources import open_source

# Longer calibration texts are cut here: statistics of channels need many texts, not long ones.
CALIBRATION_TOKENS = 256
# Of each text so many beginnings are read: a search sees one next token of each, and those of few tokens say little.
CUTS, SHORTEST_CUT = 3, 8


@dataclass(frozen=True)
class GeneratorExport:
    """Where the bundle lies, what it holds, and its evidence.

    times: of each variant whose formats were searched, the time of its products over those of the plain recipe, by table.
    """

    path: Path
    manifest: Manifest
    certificate: GenerationCertificate
    times: Mapping[str, float]


def export_generator(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    profile: str | None = None,
    variants: Sequence[str] = (),
    revision: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    golden: str | os.PathLike[str] | None = None,
    golden_limit: int | None = None,
    budget: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    allow_drift: bool = False,
    progress: bool = False,
) -> GeneratorExport:
    """Turn a language model's checkpoint into a bundle that generates text.

    source: a profile's name, a checkpoint folder, or a hub id; of a multimodal model its text model is taken. output: the
    bundle folder (an older bundle there is replaced). profile: whose facts to apply. variants: names (default: `cpu-int8`).
    revision: branch, tag or commit of a hub source. calibration: a JSONL file of texts for activation ranges (default: what
    ships). max_tokens: the most tokens of prompt and answer together (default: the profile's context, or what the checkpoint
    allows, at most 32768). golden: a JSONL file of conversations whose prompts PyTorch and the variants answer (default: what
    ships). golden_limit: how many of them (default: 200; 0 measures nothing, and the certificate says so). budget: how far a
    quantized variant may drift on the calibration texts, `gate` (default), `kld=5e-4` or `none`; parts of the network get finer
    number formats where they must. recipe: a bundle whose variants' formats to take instead. allow_drift: write the bundle
    even if a variant fails its gate; the default budget is then `none`.

    Raises GateError (nothing is written), CheckpointError, UsageError, InputError or MissingDependencyError.
    """
    report = step if progress else silent
    target = Path(output)
    check_target(target)
    if golden_limit is not None and golden_limit < 0:
        raise UsageError(f"--golden-limit must be 0 (measure nothing) or more, got {golden_limit}")
    opened, checkpoint, facts = open_source(
        source, profile=profile, revision=revision, adapter=AdapterOptions(), task="generate", progress=progress
    )
    assert isinstance(checkpoint, Generator)  # what `open_source` opens for this task
    specs = chosen_specs(checkpoint, variants)
    specs, budgets = asked_formats(specs, checkpoint, budget=budget, recipe=recipe, allow_drift=allow_drift)
    contract = _context(checkpoint, facts, max_tokens)
    generation = generation_of(checkpoint, contract.max_tokens)
    tokenizer = compact_json(checkpoint.tokenizer_bytes())
    with staging_folder(target) as staging, staging_folder(target) as workspace:
        calibrated = _calibrated(checkpoint, specs, contract, tokenizer, calibration, facts, workspace, report)
        specs, found = calibrated.within(specs, budgets)
        built = calibrated.build(specs, staging)
        certificate, measured_on = measure_variants(
            checkpoint, generation, tokenizer, specs, staging, report, Asked(golden, golden_limit)
        )
        require_passed(certificate, allow_drift=allow_drift)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            samescore_version=metadata.version("samescore"),
            profile=facts.name if facts else None,
            architecture=checkpoint.architecture,
            source=opened,
            contract=contract,
            labels=(),
            values=None,
            label_tokens=None,
            activation=checkpoint.activation,
            variants=tuple(replace(variant, max_tokens=contract.max_tokens) for variant in built),
            generation=generation,
        )
        (staging / "tokenizer.json").write_bytes(tokenizer)
        if (template := chat_template(checkpoint)) is not None:
            (staging / TEMPLATE_NAME).write_bytes(template.encode())
        (staging / CERTIFICATE_NAME).write_bytes(certificate.to_json())
        if measured_on is not None:
            (staging / GOLDEN_GENERATION_NAME).write_bytes(write_generation_golden(measured_on))
        manifest = write_manifest(
            staging, manifest, checkpoint, lambda files: generator_card(manifest, certificate, files, facts)
        )
        with report("writing"):
            publish(staging, target)
    return GeneratorExport(target, manifest, certificate, {name: choice.time for name, choice in found.items()})


def _context(checkpoint: Generator, facts: Profile | None, max_tokens: int | None) -> TextContract:
    """Plain text up to the context; no caller can raise it later, as the graphs know positions up to there."""
    contract = contract_for(checkpoint, facts, max_tokens)
    if facts is None and max_tokens is None:
        contract = replace(contract, max_tokens=min(contract.max_tokens, DEFAULT_CONTEXT))
    return replace(contract, model_limit=None)


def _calibrated(
    checkpoint: Generator,
    specs: Sequence[VariantSpec],
    contract: TextContract,
    tokenizer: bytes,
    calibration: str | os.PathLike[str] | None,
    facts: Profile | None,
    workspace: Path,
    report: Reporter,
) -> Calibrated:
    """The checkpoint with what calibration texts do in it, where a variant asks for that."""
    texts = GoldenSet(None, ())
    encoder = TextEncoder(tokenizer, replace(contract, max_tokens=min(contract.max_tokens, CALIBRATION_TOKENS)))
    if any(spec.recipe.smoothing for spec in specs):
        texts = encode_golden(_plain(calibration_set(calibration, facts)), encoder)
        if not texts.texts:
            raise UsageError("there are no calibration texts; name others with --calibration")
    return Calibrated(
        checkpoint,
        [ids[:stop] for ids in texts.input_ids() for stop in _cuts(len(ids))],
        contract.max_tokens,
        encoder.prefix_ids,
        workspace,
        report,
        grams=any(spec.recipe.rounding == "gptq" for spec in specs),
    )


def _cuts(tokens: int) -> list[int]:
    """Where the beginnings of a text end, its own end last."""
    places = {tokens * part // CUTS for part in range(1, CUTS + 1)}
    return sorted(place for place in places if place >= min(SHORTEST_CUT, tokens))


def _plain(texts: GoldenSet) -> GoldenSet:
    """Conversations as paragraphs: the role tokens that judges read are no tokens of a language model."""
    plain = []
    for text in texts.texts:
        written = text.record.get("text")
        if isinstance(written, str):
            text = replace(text, record={**text.record, "text": ROLE_TOKEN.sub("\n\n", written).strip()})
        plain.append(text)
    return replace(texts, texts=tuple(plain))
