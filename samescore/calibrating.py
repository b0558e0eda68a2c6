"""`samescore calibrate`: fit a correction of each variant's logits, judge it on other texts, and store what helps.

texts → token ids ─┬→ reference logits or labels ─┐
                   └→ variant → raw logits ───────┴→ fit (2/3) → held out (1/3) → golden set → bundle, in one rename
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from samescore._progress import silent, step
from samescore.adapted import AdapterOptions
from samescore.calibrate.certificate import CERTIFICATE_NAME, Certificate, VariantParity, parse_certificate
from samescore.calibrate.certify import SessionMaker, parity_of, score_all
from samescore.calibrate.golden import GoldenSet, encode_golden, read_golden, text_digest
from samescore.calibrate.recalibrate import Evidence, Fit, check_method, fit, held_out_rows
from samescore.calibrate.reference import Reporter
from samescore.calibrate.scores import SCORES_NAME, read_scores
from samescore.calibrate.shipped import GOLDEN_NAME, ShippedSet, read_shipped
from samescore.card import model_card
from samescore.export.profiles import find_profile
from samescore.export.publish import file_entries, publish, staging_folder
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, InputError, UsageError
from samescore.runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, Variant, parse_manifest
from samescore.runtime.prefill import Reader
from samescore.runtime.providers import available_targets
from samescore.runtime.recalibration import FittedTo, Method, Recalibration
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import TextEncoder
from samescore.scored import open_classifier
from samescore.verified_texts import reference_texts
from samescore.verifying import fresh_reference

CARD_NAME = "README.md"


@dataclass(frozen=True)
class VariantCalibration:
    """What became of one variant.

    fit: with its numbers on held-out texts; None where a correction was removed. golden: on the golden set, with the fitted
    correction (`golden.before`: without). stored: whether the bundle changed. refused: whether the correction does harm;
    reason: why it was not stored, else empty.
    """

    fit: Fit | None
    golden: VariantParity
    stored: bool
    refused: bool
    reason: str


@dataclass(frozen=True)
class CalibrationResult:
    """Where the bundle lies, what it now holds, and what became of each variant that was asked for."""

    path: Path
    manifest: Manifest
    certificate: Certificate
    variants: Mapping[str, VariantCalibration]

    @property
    def refused(self) -> bool:
        """Whether a fitted correction does harm: makes held-out texts worse or leaves the gate's tolerance."""
        return any(outcome.refused for outcome in self.variants.values())


def calibrate_bundle(
    path: str | os.PathLike[str],
    *,
    texts: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    to: FittedTo = "reference",
    method: Method = "temperature",
    variants: Sequence[str] = (),
    remove: bool = False,
    progress: bool = False,
) -> CalibrationResult:
    """Fit a correction of each variant's logits and store those that make held-out texts better.

    texts: JSONL; two thirds are fitted on, one third judges (at least 30); none may be a golden text. They hold reference
    logits (a golden set of this checkpoint), or `reference` is the checkpoint folder that PyTorch runs; to fit to `labels`
    they need a label each and no reference. base: as in `verify`. method: `temperature`, `vector`, `platt` or `isotonic`.
    variants: names (default: all). remove: take stored corrections off, which needs no texts. The bundle is replaced in one
    step, and not at all if nothing is stored; a correction that does not help is a result, not an error.

    Raises BundleError, UsageError, InputError, GateError (no correction exists) or MissingDependencyError.
    """
    report = step if progress else silent
    if remove == (texts is not None):
        raise UsageError("name texts to fit on (--texts FILE), or --remove to take a correction off, not both")
    if base is not None and reference is None:
        raise UsageError(f"--base {os.fspath(base)} is what an adapter lies on: name the adapter with --reference")
    if to not in get_args(FittedTo):
        raise UsageError(f"a correction is fitted to one of {', '.join(get_args(FittedTo))}, not to {to!r}")
    target = Path(path).resolve()
    with Bundle(target) as bundle:
        bundle.require_classifier("calibrate")
        manifest = bundle.manifest
        names = [manifest.variant(name).name for name in dict.fromkeys(variants)] or [v.name for v in manifest.variants]
        certificate = parse_certificate(bundle.read(CERTIFICATE_NAME))
        golden = _Golden(bundle, certificate)
        if texts is None:
            outcomes = _removed(manifest, names, golden)
        else:
            check_method(method, len(manifest.labels), manifest.activation)
            material = _Material(bundle, golden.texts, texts, reference, base, to, report, progress)
            outcomes = {
                name: _fitted(bundle, manifest.variant(name), material, method, golden, report) for name in names
            }
        stored = {name: outcome for name, outcome in outcomes.items() if outcome.stored}
        if stored:
            corrections = {name: outcome.fit.recalibration if outcome.fit else None for name, outcome in stored.items()}
            changed = tuple(
                replace(v, recalibration=corrections[v.name]) if v.name in stored else v for v in manifest.variants
            )
            parity = {name: stored[name].golden if name in stored else p for name, p in certificate.variants.items()}
            certificate = replace(certificate, variants=parity)
            manifest = _rewrite(target, replace(manifest, variants=changed), certificate, report)
    return CalibrationResult(Path(path), manifest, certificate, outcomes)


class _Golden:
    """The bundle's golden set with every variant's raw logits on it: what a correction does there needs no model run."""

    def __init__(self, bundle: Bundle, certificate: Certificate):
        self.manifest = bundle.manifest
        self.certificate = certificate
        self.texts = read_shipped(bundle.read(GOLDEN_NAME))
        self.scores = read_scores(bundle.read(SCORES_NAME))
        shape = (len(self.texts), len(self.manifest.labels))
        for variant in self.manifest.variants:
            found = self.scores[variant.name].shape if variant.name in self.scores else "none"
            if variant.name not in certificate.variants or found != shape:
                raise BundleError(
                    f"{bundle.path}: {CERTIFICATE_NAME}, {SCORES_NAME} and {GOLDEN_NAME} do not belong together "
                    f"({variant.name} has scores {found}, expected {shape}): export the bundle again"
                )

    def parity(self, name: str, recalibration: Recalibration | None) -> VariantParity:
        """The variant's certificate with that correction."""
        old = self.certificate.variants[name]
        parity = parity_of(
            self.scores[name],
            self.texts,
            labels=self.manifest.labels,
            activation=self.manifest.activation,
            tolerance=old.tolerance,
            invariance=old.invariance,
            recalibration=recalibration,
        )
        # What was wrong with the graph still is, unless the correction has healed it.
        diagnosis = None if parity.verdict.passed else old.diagnosis
        return replace(parity, diagnosis=diagnosis, sensitivity=old.sensitivity)


class _Material:
    """The texts to fit on and to judge by: token ids, what they are fitted to, and which are held out."""

    def __init__(
        self,
        bundle: Bundle,
        golden: ShippedSet,
        path: str | os.PathLike[str],
        reference: str | os.PathLike[str] | None,
        base: str | os.PathLike[str] | None,
        to: FittedTo,
        report: Reporter,
        progress: bool,
    ):
        manifest = bundle.manifest
        self.to = to
        self.encoder = TextEncoder(bundle.read("tokenizer.json"), manifest.contract)
        plain = to == "labels" and reference is None and read_golden(Path(path)).reference is None
        texts = read_golden(Path(path)) if plain else reference_texts(bundle, path, has_reference=reference is not None)
        texts, digests = _different(encode_golden(texts, self.encoder), golden, self.encoder, os.fspath(path))
        self.classes = _classes(texts, manifest.labels, required=to == "labels")
        self.held_out = held_out_rows(digests)
        self.digest = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
        if reference is not None:
            tokens = [token.text for token in manifest.label_tokens or ()]
            checkpoint, _ = open_classifier(Path(reference), AdapterOptions(base=base), tokens, progress=progress)
            texts, note = fresh_reference(texts, checkpoint, manifest, report)
            if note:
                raise UsageError(f"{note}: a correction would lead away from the bundle's own reference")
        self.texts = texts

    def evidence(self, bundle: Bundle, variant: Variant, report: Reporter) -> Evidence:
        """The variant's raw logits beside the reference's and the labels."""
        target = variant.target if variant.target in available_targets() else "cpu"
        sequences = self.texts.input_ids()
        with report(
            f"scoring {len(sequences)} texts with {variant.name}", len(sequences), sum(map(len, sequences))
        ) as tick:
            reader = Reader(SessionMaker(bundle.model(variant), target)(1), self.encoder.prefix_ids)
            logits = score_all(reader, sequences, workers=available_threads(), progress=tick)
        reference = None if self.texts.reference is None else self.texts.logits().astype(np.float64)
        return Evidence(logits.astype(np.float64), reference, self.classes)


def _different(texts: GoldenSet, golden: ShippedSet, encoder: TextEncoder, name: str) -> tuple[GoldenSet, list[str]]:
    """Each text once, with its digest; UsageError when one is a golden text."""
    by_digest = {text_digest(text, encoder.contract): text for text in texts.texts}
    if shared := by_digest.keys() & set(golden.digests(encoder.contract)):
        raise UsageError(
            f"{len(shared)} of {len(by_digest)} texts in {name} are golden texts of the bundle: a correction must not be "
            "fitted on the texts that judge it. Take them out"
        )
    return replace(texts, texts=tuple(by_digest.values())), list(by_digest)


def _classes(texts: GoldenSet, labels: Sequence[str], *, required: bool) -> npt.NDArray[np.int64] | None:
    """The index of each text's label; None where some have none that the bundle knows, or an error if they are required."""
    found = texts.labels()
    unknown = [label for label in found if label not in labels]
    if not unknown:
        return np.array([labels.index(label) for label in found if label is not None], dtype=np.int64)
    if required:
        named = sorted({label for label in unknown if label is not None})
        raise InputError(
            f"{len(unknown)} of {len(found)} texts have no label that the bundle knows"
            f"{f' (but {named[0]!r})' if named else ''}: `label` must be one of {', '.join(labels)}"
        )
    return None


def _fitted(
    bundle: Bundle, variant: Variant, material: _Material, method: Method, golden: _Golden, report: Reporter
) -> VariantCalibration:
    """Fit one variant; a correction must help held-out texts and keep a passing certificate passing."""
    manifest = bundle.manifest
    found = fit(
        material.evidence(bundle, variant, report),
        material.held_out,
        method=method,
        to=material.to,
        activation=manifest.activation,
        labels=manifest.labels,
        digest=material.digest,
    )
    parity = golden.parity(variant.name, found.recalibration)
    if found.outcome != "gain":
        return VariantCalibration(found, parity, False, found.outcome == "worse", found.reason)
    if golden.parity(variant.name, None).verdict.passed and not parity.verdict.passed:
        reason = f"it takes the golden set outside the tolerance: {', '.join(parity.verdict.failures)}"
        return VariantCalibration(found, parity, False, True, reason)
    return VariantCalibration(found, parity, True, False, "")


def _removed(manifest: Manifest, names: Sequence[str], golden: _Golden) -> dict[str, VariantCalibration]:
    corrected = [name for name in names if manifest.variant(name).recalibration is not None]
    if not corrected:
        raise UsageError(f"there is nothing to remove: {', '.join(names)} has no recalibration")
    return {name: VariantCalibration(None, golden.parity(name, None), True, False, "") for name in corrected}


def _rewrite(target: Path, manifest: Manifest, certificate: Certificate, report: Reporter) -> Manifest:
    """The bundle with another manifest, certificate and card, in place of the old one in one step."""
    kept = manifest.files.keys() - {CERTIFICATE_NAME, CARD_NAME}
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if foreign := sorted(there - manifest.files.keys() - {MANIFEST_NAME}):
        raise BundleError(
            f"{target} also holds {', '.join(foreign[:5])}, which would be lost: move what is not the bundle's"
        )
    with report("writing"), staging_folder(target) as staging:
        for name in kept:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target / name, staging / name)
        files = file_entries(staging)
        if damaged := sorted(name for name in kept if files[name] != manifest.files[name]):
            raise BundleError(f"{target / damaged[0]} is damaged: its size or SHA-256 is not the manifest's")
        files[CERTIFICATE_NAME] = _write(staging / CERTIFICATE_NAME, certificate.to_json())
        facts = find_profile(manifest.profile) if manifest.profile else None
        card = model_card(manifest, certificate, files, facts)
        files[CARD_NAME] = _write(staging / CARD_NAME, card.encode())
        manifest = replace(manifest, files=dict(sorted(files.items())))
        raw = manifest.to_json()
        parse_manifest(raw)  # what no reader would accept is not written
        (staging / MANIFEST_NAME).write_bytes(raw)
        publish(staging, target)
    return manifest


def _write(path: Path, raw: bytes) -> FileEntry:
    path.write_bytes(raw)
    return FileEntry(len(raw), hashlib.sha256(raw).hexdigest())
