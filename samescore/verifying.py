"""`samescore verify`: re-check a bundle on this box, against its own golden set or against PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from samescore._progress import silent, step
from samescore.adapted import AdapterOptions
from samescore.calibrate.certificate import Certificate, VariantParity, environment
from samescore.calibrate.certify import SessionMaker, certify
from samescore.calibrate.diagnose import Diagnosis
from samescore.calibrate.golden import GoldenSet
from samescore.calibrate.progress import Reporter, resumed_step
from samescore.calibrate.reference import add_reference
from samescore.calibrate.resume import Store
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.bundle import Bundle
from samescore.runtime.contract import text_of_record
from samescore.runtime.doctor import computes
from samescore.runtime.errors import ProviderError, UsageError
from samescore.runtime.manifest import LabelToken, Manifest, Variant
from samescore.runtime.providers import available_targets, choose
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import TextEncoder
from samescore.same_tokens import VERIFY_TEXTS, tokenization_equality
from samescore.scored import label_tokens_of, open_classifier
from samescore.verified_texts import texts_to_verify
from samescore.verifying_generation import GeneratorVerifyResult, verify_generator


@dataclass(frozen=True)
class VerifyResult:
    """What was checked, and the numbers on this box. `note` says where they are not what the bundle was gated on."""

    bytes_checked: int
    certificate: Certificate
    note: str | None

    @property
    def passed(self) -> bool:
        """Whether every checked variant is inside its tolerance, and token ids are those of the reference's tokenizer."""
        tokenization = self.certificate.tokenization
        same_tokens = tokenization is None or tokenization.different == 0
        return same_tokens and all(parity.verdict.passed for parity in self.certificate.variants.values())


def verify(
    path: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    texts: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    provider: str = "auto",
    resume: bool = False,
    progress: bool = False,
) -> VerifyResult | GeneratorVerifyResult:
    """Hash every file, tokenize the golden texts again, and hold each variant against the reference logits.

    Without `reference` the logits stored in the bundle are used and no PyTorch is needed. reference: the checkpoint
    folder, run through PyTorch again. base: a folder or hub id, what the reference lies on if it is an adapter (default:
    the one that it names). texts: other texts than those inside the bundle (JSONL): golden texts of the bundle, which it
    recognizes by digest; others need `reference`, or logits of their own. variant: only this one (default: every variant
    that this box can run). resume: take logits that an earlier run has kept (see `calibrate/resume.py`) in place of
    measuring again, for a run that was interrupted. Raises BundleError for a damaged bundle; a variant outside its tolerance
    is a result, not an error.
    """
    report, store = step if progress else silent, Store(reads=resume)
    if base is not None and reference is None:
        raise UsageError(f"--base {os.fspath(base)} is what an adapter lies on: name the adapter with --reference")
    with Bundle(path) as bundle:
        manifest = bundle.manifest
        if manifest.generation is not None:
            runnable = _runnable(manifest, variant, provider)
            return verify_generator(bundle, runnable, reference=reference, texts=texts, report=report)
        with report(f"hashing {len(manifest.files)} files"):
            checked = bundle.verify_files()
        encoder = TextEncoder(bundle.read("tokenizer.json"), manifest.contract)
        golden, note = texts_to_verify(bundle, texts, encoder, has_reference=reference is not None)
        checkpoint, tokenization = None, None
        if reference is not None:
            texts_of_labels = [token.text for token in manifest.label_tokens or ()]
            checkpoint, _ = open_classifier(
                Path(reference), AdapterOptions(base=base), texts_of_labels, progress=progress
            )
            sources = [text_of_record(text.record, manifest.contract) for text in golden.texts]
            tokenization = tokenization_equality(checkpoint, encoder, sources, VERIFY_TEXTS, report)
            golden, other = fresh_reference(golden, checkpoint, manifest, report, store)
            note = "; ".join(said for said in (other, note) if said) or None
        threads = available_threads()
        parity: dict[str, VariantParity] = {}
        diagnosis = Diagnosis(golden, manifest.labels, manifest.activation, checkpoint)
        for chosen, target in _runnable(manifest, variant, provider):
            open_session = SessionMaker(bundle.model(chosen), target)
            title = f"measuring {chosen.name} on {len(golden.texts)} texts"
            with (
                store.variant_rows(open_session.model, target, encoder.prefix_ids) as rows,
                resumed_step(report, title, golden.input_ids(), rows) as tick,
            ):
                certified = certify(
                    open_session,
                    golden,
                    labels=manifest.labels,
                    activation=manifest.activation,
                    precision=chosen.precision,
                    threads=threads,
                    prefix=encoder.prefix_ids,
                    recalibration=chosen.recalibration,
                    rows=rows,
                    progress=tick,
                )
            parity[chosen.name] = diagnosis.told(certified, open_session, chosen.precision).parity
    assert golden.reference is not None
    return VerifyResult(checked, Certificate(golden.reference, environment(threads), parity, tokenization), note)


def fresh_reference(
    golden: GoldenSet, checkpoint: Checkpoint, manifest: Manifest, report: Reporter, store: Store | None = None
) -> tuple[GoldenSet, str | None]:
    """Fresh PyTorch logits, and a note when the checkpoint is not the one the bundle was made from."""
    folder = checkpoint.folder
    if len(checkpoint.labels) != len(manifest.labels):
        raise UsageError(
            f"{folder} has labels {', '.join(checkpoint.labels)}; the bundle has {', '.join(manifest.labels)}"
        )
    if label_tokens_of(checkpoint) != manifest.label_tokens:
        raise UsageError(
            f"{folder} has another tokenizer than the bundle: its label tokens are {_tokens(label_tokens_of(checkpoint))}, "
            f"the bundle's {_tokens(manifest.label_tokens)}"
        )
    golden = add_reference(golden, checkpoint, report, store=store)
    assert golden.reference is not None
    if golden.reference.checkpoint_sha256 == manifest.source.sha256:
        return golden, None
    return golden, f"{folder} is not the checkpoint that the bundle was made from (another digest)"


def _tokens(tokens: Sequence[LabelToken] | None) -> str:
    return ", ".join(f"{token.text!r} = {token.id}" for token in tokens or ()) or "none"


def _runnable(manifest: Manifest, variant: str | None, provider: str) -> list[tuple[Variant, str]]:
    """The asked variant, or every one: on its own target where this build has it, plain ONNX on the CPU otherwise."""
    if variant is not None or provider != "auto":
        return [choose(manifest, provider=provider, variant=variant)]
    offered = [target for target in available_targets() if target == "cpu" or computes(target)]
    runnable: list[tuple[Variant, str]] = [
        (v, v.target if v.target in offered else "cpu") for v in manifest.variants if v.target in (*offered, "migraphx")
    ]
    if not runnable:
        # An empty certificate would read as passed.
        have = ", ".join(f"{v.name} (for {v.target})" for v in manifest.variants)
        raise ProviderError(
            f"no variant of this bundle can run here: it holds {have}; this ONNX Runtime computes on {', '.join(offered)}"
        )
    return runnable
