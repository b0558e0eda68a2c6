"""`samescore export`: build, certify, publish.

source → checkpoint ─┬→ golden texts → token ids → reference logits ─────────────┐
                     ├→ calibration texts → activation statistics ─┐                 │
                     └→ graph + recipe ────────────────────────┴→ variant → measured → gate → bundle
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore._progress import silent, step
from samescore.adapted import AdapterOptions
from samescore.building import Calibrated, asked_formats
from samescore.calibrate.canary import canary_json
from samescore.calibrate.certificate import CERTIFICATE_NAME, Certificate, VariantParity, environment
from samescore.calibrate.certify import SessionMaker, certify
from samescore.calibrate.diagnose import Diagnosis
from samescore.calibrate.golden import (
    GoldenSet,
    encode_golden,
    text_digests,
    without_texts,
)
from samescore.calibrate.next_token import mass_warning
from samescore.calibrate.progress import Reporter, resumed_step
from samescore.calibrate.reference import add_reference
from samescore.calibrate.resume import Store
from samescore.calibrate.scores import BFLOAT16, SCORES_NAME, Scores, write_scores
from samescore.calibrate.shipped import GOLDEN_NAME, write_shipped
from samescore.calibrate.stages import read_model
from samescore.calibrate.token_faults import TokenizationEquality
from samescore.card import model_card
from samescore.certifiable import check_certifiable
from samescore.export.build import architecture_of, check_buildable, check_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.profiles import Profile, contract_for, labels_for
from samescore.export.publish import check_target, file_entries, publish, staging_folder
from samescore.export.recipes import Task, VariantSpec, variant_spec
from samescore.packaged import Limit, calibration_set, golden_set
from samescore.runtime.canary import CANARY_NAME
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import CheckpointError, GateError, UsageError
from samescore.runtime.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    Source,
)
from samescore.runtime.prefill import Ids
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import TextEncoder
from samescore.same_tokens import refuse_difference, tokenization_equality
from samescore.scored import label_tokens_of, values_of
from samescore.sources import open_source


@dataclass(frozen=True)
class ExportResult:
    """Where the bundle lies, what it holds, and its evidence.

    times: of each variant whose formats were searched, what its products take over those of the plain recipe, by the table of
    `samescore.calibrate.frontier`.
    """

    path: Path
    manifest: Manifest
    certificate: Certificate
    times: Mapping[str, float]

    @property
    def warning(self) -> str | None:
        """What is strange though the variants match the reference: token ids that transformers would not make, label tokens
        that the model does not answer with.
        """
        said = [mass_warning(self.certificate.reference.label_mass_mean, self.manifest.labels)]
        tokens = self.certificate.tokenization
        if tokens is not None and tokens.different:
            said.append(
                f"{tokens.different} of {tokens.texts} strings have other token ids than transformers' tokenizer makes: "
                f"{tokens.first_difference}"
            )
        return "; ".join(filter(None, said)) or None


def export_bundle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    profile: str | None = None,
    variants: Sequence[str] = (),
    revision: str | None = None,
    adapter_subfolder: str | None = None,
    base: str | os.PathLike[str] | None = None,
    label_tokens: Sequence[str] = (),
    golden: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    max_tokens: int | None = None,
    golden_limit: Limit = None,
    budget: str | None = None,
    recipe: str | os.PathLike[str] | None = None,
    allow_drift: bool = False,
    tokenization_texts: int | None = None,
    fresh: bool = False,
    progress: bool = False,
) -> ExportResult:
    """Turn a checkpoint into a bundle whose every variant passed its gate.

    source: a profile's name, a checkpoint folder, or a hub id; the checkpoint may be a LoRA adapter. output: the bundle
    folder (an older bundle there is replaced). profile: whose text contract to apply. variants: names, the first one is
    its target's default (`cpu-int8` if none; `cpu-fp32` for architectures without a hand-built graph). revision: branch,
    tag or commit of a hub source. adapter_subfolder: where the adapter lies below the source. base: a folder or hub id,
    in place of the base that the adapter names. label_tokens: of a language model, the texts (one token each) whose
    probabilities as the next token are the score (default: the profile's). golden, calibration: JSONL files of texts;
    golden texts may hold reference logits, otherwise PyTorch computes them. max_tokens: where the bundle cuts longer texts
    (default: the profile's limit). golden_limit: use only that many golden texts, from the first, or `all` (default: all
    of `golden`; of the texts that ship, the profile's usual number, as large models take long on a CPU). budget: how
    much a quantized variant may drift on the calibration texts, `gate` (the default), `p99=…,mean=…,max=…`, or `none`: parts
    of the network get finer number formats where it needs them to stay inside. recipe: a bundle whose variants' formats to
    take instead of searching. tokenization_texts: on how many strings token ids are compared with the Hugging Face
    tokenizer's when PyTorch computes the reference (default: 100000; 0: none). allow_drift: write the bundle even if a gate
    fails or token ids differ, its certificate says so; the default budget is then `none`. fresh: do not take up logits
    that an earlier run with the same checkpoint, texts and versions has kept (see `calibrate/resume.py`).

    Raises GateError (nothing is written), CheckpointError, UsageError, InputError or MissingDependencyError.
    """
    report, store = step if progress else silent, Store(reads=not fresh)
    target = Path(output)
    check_target(target)
    adapter = AdapterOptions(adapter_subfolder, base)
    opened, checkpoint, facts = open_source(
        source, profile=profile, revision=revision, adapter=adapter, label_tokens=label_tokens, progress=progress
    )
    specs = chosen_specs(checkpoint, variants)
    specs, budgets = asked_formats(specs, checkpoint, budget=budget, recipe=recipe, allow_drift=allow_drift)
    contract = contract_for(checkpoint, facts, max_tokens)
    labels = labels_for(checkpoint, facts)
    tokenizer = compact_json(checkpoint.tokenizer_bytes())
    encoder = TextEncoder(tokenizer, contract)
    texts = _golden_texts(golden, facts, opened, encoder, golden_limit, report)
    needs_statistics = any(spec.recipe.smoothing for spec in specs) and architecture_of(checkpoint)
    calibration_texts = (
        _calibration_texts(calibration, facts, encoder, texts) if needs_statistics else GoldenSet(None, ())
    )
    if needs_statistics and not calibration_texts.texts:
        raise UsageError(
            "every calibration text is a golden text too, and none is left to find a recipe on: name others with --calibration"
        )
    # What is only needed while building lies beside the bundle, never in it.
    with staging_folder(target) as staging, staging_folder(target) as workspace:
        tokenization: TokenizationEquality | None = None
        if texts.reference is None:
            sources = [text_of_record(text.record, contract) for text in (*texts.texts, *calibration_texts.texts)]
            tokenization = tokenization_equality(checkpoint, encoder, sources, tokenization_texts, report)
            if not allow_drift:
                refuse_difference(tokenization, checkpoint)
            texts = add_reference(texts, checkpoint, report, yardstick=True, store=store)
        calibrated = Calibrated(
            checkpoint,
            calibration_texts.input_ids(),
            contract.max_tokens,
            encoder.prefix_ids,
            workspace,
            report,
            grams=any(spec.recipe.rounding == "gptq" for spec in specs),
        )
        specs, found = calibrated.within(specs, budgets)
        built = calibrated.build(specs, staging)
        certificate, scores = _measure(
            checkpoint,
            specs,
            staging,
            workspace,
            texts,
            labels=labels,
            prefix=encoder.prefix_ids,
            report=report,
            store=store,
        )
        certificate = certificate.searched({name: choice.sensitivity for name, choice in found.items()})
        certificate = replace(certificate, tokenization=tokenization)
        _gate(certificate, allow_drift)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            samescore_version=metadata.version("samescore"),
            profile=facts.name if facts else None,
            architecture=checkpoint.architecture,
            source=opened,
            contract=contract,
            labels=labels,
            values=values_of(checkpoint),
            label_tokens=label_tokens_of(checkpoint),
            activation=checkpoint.activation,
            variants=tuple(built),
        )
        manifest = _write(
            staging, manifest, checkpoint, tokenizer, texts, certificate, facts, scores, encoder.prefix_ids
        )
        with report("writing"):
            publish(staging, target)
    return ExportResult(target, manifest, certificate, {name: choice.time for name, choice in found.items()})


def _measure(
    checkpoint: Checkpoint,
    specs: Sequence[VariantSpec],
    staging: Path,
    workspace: Path,
    texts: GoldenSet,
    *,
    labels: Sequence[str],
    prefix: npt.NDArray[np.int64],
    report: Reporter,
    store: Store,
) -> tuple[Certificate, Scores]:
    """Every built variant against the golden set's reference, and the logits behind the numbers.

    Any box can measure what the CPU provider has kernels for; the others are measured where `certified_on` says.
    """
    threads = available_threads()
    parity: dict[str, VariantParity] = {}
    diagnosis = Diagnosis(texts, labels, checkpoint.activation, checkpoint, workspace)
    scores: Scores = {} if texts.bfloat16 is None else {BFLOAT16: texts.bfloat16}
    for spec in specs:
        open_session = SessionMaker(read_model(staging / spec.name), spec.certified_on)
        title = f"measuring {spec.name} on {len(texts.texts)} golden texts"
        with (
            store.variant_rows(open_session.model, open_session.target, prefix) as rows,
            resumed_step(report, title, texts.input_ids(), rows) as tick,
        ):
            certified = certify(
                open_session,
                texts,
                labels=labels,
                activation=checkpoint.activation,
                precision=spec.precision,
                threads=threads,
                prefix=prefix,
                rows=rows,
                progress=tick,
            )
        parity[spec.name], scores[spec.name] = diagnosis.told(certified, open_session, spec.precision)
    assert texts.reference is not None
    return Certificate(texts.reference, environment(threads), parity), scores


def compact_json(raw: bytes) -> bytes:
    """The same JSON document without white space: a multilingual tokenizer.json halves."""
    try:
        document = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"tokenizer.json is not JSON: {error}") from error
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def chosen_specs(checkpoint: Checkpoint, names: Sequence[str]) -> list[VariantSpec]:
    """The variants of these names (none: the checkpoint's default); UsageError for one that it does not offer, or twice."""
    check_buildable(checkpoint)
    architecture = architecture_of(checkpoint)
    default = architecture.variants_of(checkpoint)[0] if architecture else "cpu-fp32"
    task: Task = "generate" if isinstance(checkpoint, Generator) else "classify"
    specs = [variant_spec(name, task) for name in names or (default,)]
    for spec in specs:
        check_variant(checkpoint, spec)
    check_certifiable(specs)
    if len({spec.name for spec in specs}) != len(specs):
        raise UsageError(f"a variant is named twice: {', '.join(names)}")
    return specs


def _golden_texts(
    path: str | os.PathLike[str] | None,
    facts: Profile | None,
    source: Source,
    encoder: TextEncoder,
    limit: Limit,
    report: Reporter,
) -> GoldenSet:
    """The golden set, tokenized. Stored logits count only for the checkpoint they were made from."""
    golden, total = golden_set(path, facts, limit)
    if golden.reference is not None and golden.reference.checkpoint_sha256 != source.sha256:
        if path is not None:
            raise UsageError(
                f"the reference logits in {os.fspath(path)} were made from another checkpoint "
                f"(digest {golden.reference.checkpoint_sha256[:12]}…, this one is {source.sha256[:12]}…). "
                "Remove its first line to let PyTorch compute them again"
            )
        golden = golden.without_reference()
    with report(f"tokenizing {len(golden.texts)} of {total} golden texts"):
        return encode_golden(golden, encoder)


def _calibration_texts(
    path: str | os.PathLike[str] | None, facts: Profile | None, encoder: TextEncoder, golden: GoldenSet
) -> GoldenSet:
    """The calibration texts, tokenized, none of them a golden text: UsageError when the user's own file holds one."""
    texts, judging = calibration_set(path, facts), text_digests(golden, encoder.contract)
    shared = text_digests(texts, encoder.contract) & judging
    if shared and path is None:
        texts = without_texts(texts, shared, encoder.contract)
    elif shared:
        raise UsageError(
            f"{len(shared)} calibration texts are golden texts too: a recipe must not be fitted on the texts that judge "
            "it. Name other ones with --calibration"
        )
    return encode_golden(texts, encoder)


def _gate(certificate: Certificate, allow_drift: bool) -> None:
    failed = {name: parity for name, parity in certificate.variants.items() if not parity.verdict.passed}
    if failed and not allow_drift:
        said = "; ".join(
            f"{name}: {', '.join(parity.verdict.failures)} (diagnosis: {parity.diagnosis})"
            for name, parity in failed.items()
        )
        raise GateError(
            f"{said}. Nothing was written. Search with a tighter --budget (as in p99=5e-3) or with more --calibration texts like "
            "the golden ones, export a more exact variant (cpu-fp32), or --allow-drift to keep this one with a certificate that "
            "says it failed"
        )


def _write(
    staging: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    tokenizer: bytes,
    texts: GoldenSet,
    certificate: Certificate,
    facts: Profile | None,
    scores: Scores,
    prefix: Ids,
) -> Manifest:
    """All files but the variants', then the manifest that lists them."""
    (staging / "tokenizer.json").write_bytes(tokenizer)
    (staging / GOLDEN_NAME).write_bytes(write_shipped(texts, manifest.contract))
    (staging / CERTIFICATE_NAME).write_bytes(certificate.to_json())
    canary = canary_json(
        texts,
        manifest.variants,
        scores,
        activation=manifest.activation,
        prefix=prefix,
        certified_on={variant.name: variant_spec(variant.name).certified_on for variant in manifest.variants},
    )
    (staging / CANARY_NAME).write_bytes(canary)
    (staging / SCORES_NAME).write_bytes(write_scores(scores))
    return write_manifest(staging, manifest, checkpoint, lambda files: model_card(manifest, certificate, files, facts))


def write_manifest(
    staging: Path, manifest: Manifest, checkpoint: Checkpoint, card: Callable[[Mapping[str, FileEntry]], str]
) -> Manifest:
    """The source's card and the bundle's, then the manifest that lists every file. card: made of the other files' sizes."""
    source_card = checkpoint.folder / "README.md"
    if source_card.is_file():
        (staging / "SOURCE_CARD.md").write_bytes(source_card.read_bytes())
    (staging / "README.md").write_text(card(file_entries(staging)), encoding="utf-8")
    manifest = replace(manifest, files=file_entries(staging))
    (staging / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest
