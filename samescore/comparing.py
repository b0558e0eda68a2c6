"""`samescore compare`: two variants, precisions or versions of a model held against each other, without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from samescore._progress import silent, step
from samescore.calibrate.gate import TOLERANCES, Tolerance, Verdict, judge
from samescore.calibrate.golden import GoldenSet, read_golden
from samescore.calibrate.metrics import Drift, brier_score, expected_calibration_error, measure
from samescore.calibrate.shipped import GOLDEN_NAME, read_shipped
from samescore.runtime.bundle import Bundle
from samescore.runtime.classifier import Classifier
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import InputError, UsageError, did_you_mean
from samescore.runtime.manifest import Manifest, Precision
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.providers import choose
from samescore.runtime.recalibration import calibrated

if TYPE_CHECKING:
    from samescore.calibrate.reference import Reporter

FloatArray = npt.NDArray[np.float64]

# A tolerance's numbers by their names on the command line.
TOLERANCE_NAMES = {"max": "max_abs_dp", "p99": "p99_abs_dp", "mean": "mean_abs_dp", "agreement": "agreement"}


@dataclass(frozen=True)
class Side:
    """One of the two: which bundle (path and digest), which variant of it, and where it ran."""

    path: str
    digest: str
    variant: str
    precision: Precision
    target: str


@dataclass(frozen=True)
class LabelChange:
    """A text (counted from 0) whose most probable label differs; margin: a side's top probability minus its second."""

    text: int
    label_a: str
    label_b: str
    margin_a: float
    margin_b: float


@dataclass(frozen=True)
class Quality:
    """One side on the texts whose label is known: accuracy, expected calibration error, Brier score."""

    texts: int
    accuracy: float
    ece: float
    brier: float


@dataclass(frozen=True)
class CompareResult:
    """B against the baseline A, over the same texts.

    drift: as in a certificate, A in the place of the reference. tolerance_name: what the tolerance was asked as. identical:
    all probabilities are equal bit for bit. other_ids: texts that B tokenizes to other ids than A. quality_a, quality_b:
    None where no text has a label. notes: what a reader should know of how the two were brought together.
    """

    a: Side
    b: Side
    drift: Drift
    tolerance: Tolerance
    tolerance_name: str
    verdict: Verdict
    identical: bool
    other_ids: int
    flips: tuple[LabelChange, ...]
    quality_a: Quality | None
    quality_b: Quality | None
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the differences are inside the tolerance."""
        return self.verdict.passed

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""
        return {"passed": self.passed, **asdict(self)}


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    variant_a: str | None = None,
    variant_b: str | None = None,
    texts: str | os.PathLike[str] | None = None,
    tolerance: str | None = None,
    provider: str = "auto",
    progress: bool = False,
) -> CompareResult:
    """Score the same texts with bundle `a` (the baseline) and bundle `b`, and hold the differences against a tolerance.

    variant_a: default, the provider's first; variant_b: default, the one of A's name where B has it, else the provider's
    first. texts: JSONL instead of A's golden texts; reference logits are not needed. tolerance: a precision (`int8`) or
    some of `max=…,p99=…,mean=…,agreement=…`; default, the looser one of the two precisions. Each bundle tokenizes by its
    own contract; labels are matched by name. Raises UsageError when the labels are others, InputError for a text that one of
    the two cannot read; a difference beyond the tolerance is a result, not an error.
    """
    report = step if progress else silent
    asked = None if tolerance is None else parse_tolerance(tolerance)
    baseline, other = _manifest(a), _manifest(b)
    order, notes = _match(baseline, other, (os.fspath(a), os.fspath(b)))
    variant_a = choose(baseline, provider=provider, variant=variant_a)[0].name
    if variant_b is None and variant_a in (known.name for known in other.variants):
        variant_b = variant_a
    golden, said = _texts(a, texts)
    first = _score(a, "A", variant_a, provider, golden, report)
    second = _score(b, "B", variant_b, provider, golden, report)
    labels, activation = baseline.labels, baseline.activation
    logits_b = second.logits[:, order]
    drift = measure(first.logits, logits_b, labels, activation, truth=golden.labels())
    p, q = probabilities_of(first.logits, activation), probabilities_of(logits_b, activation)
    looser = max(first.side.precision, second.side.precision, key=lambda name: TOLERANCES[name].max_abs_dp)
    limit = asked or TOLERANCES[looser]
    return CompareResult(
        a=first.side,
        b=second.side,
        drift=drift,
        tolerance=limit,
        tolerance_name=tolerance or looser,
        verdict=judge(drift, limit),
        identical=np.array_equal(p, q),
        other_ids=sum(not np.array_equal(x, y) for x, y in zip(first.ids, second.ids, strict=True)),
        flips=_changes(p, q, drift),
        quality_a=_quality(p, labels, golden.labels()) if activation == "softmax" else None,
        quality_b=_quality(q, labels, golden.labels()) if activation == "softmax" else None,
        notes=(*notes, *said),
    )


def parse_tolerance(text: str) -> Tolerance:
    """A precision's tolerance by its name, or some of `max=…,p99=…,mean=…,agreement=…`, the others unbounded.

    UsageError for anything else.
    """
    for precision, known_tolerance in TOLERANCES.items():
        if text == precision:
            return known_tolerance
    found: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in TOLERANCE_NAMES:
            known = [*TOLERANCES, *TOLERANCE_NAMES]
            raise UsageError(
                f"tolerance {text!r}: {name!r} is none of {', '.join(known)}.{did_you_mean(name, known)} "
                "Write --tolerance int8, or --tolerance p99=5e-3,agreement=0.999"
            )
        try:
            found[TOLERANCE_NAMES[name]] = float(value)
        except ValueError:
            raise UsageError(f"tolerance {text!r}: {value!r} is no number") from None
        if not 0 <= found[TOLERANCE_NAMES[name]] <= 1:
            raise UsageError(f"tolerance {text!r}: {name} lies between 0 and 1")
    # No difference of probabilities is above 1, no agreement below 0.
    return Tolerance(
        max_abs_dp=found.get("max_abs_dp", 1.0),
        p99_abs_dp=found.get("p99_abs_dp", 1.0),
        mean_abs_dp=found.get("mean_abs_dp"),
        agreement=found.get("agreement", 0.0),
        flip_margin=None,
    )


@dataclass(frozen=True)
class _Scored:
    """What one side made of the texts: ids int64 [sequence] of each, and logits float32 [texts, labels]."""

    side: Side
    ids: list[npt.NDArray[np.int64]]
    logits: npt.NDArray[np.float32]


def _manifest(path: str | os.PathLike[str]) -> Manifest:
    with Bundle(path) as bundle:
        bundle.require_classifier("compare")
        return bundle.manifest


def _match(a: Manifest, b: Manifest, paths: tuple[str, str]) -> tuple[list[int], tuple[str, ...]]:
    """Where each of A's labels stands in B, and what is to be said of it; UsageError unless both say the same things."""
    both = (
        f"{paths[0]} has {', '.join(a.labels)} ({a.activation}); {paths[1]} has {', '.join(b.labels)} ({b.activation})"
    )
    if sorted(a.labels) != sorted(b.labels):
        raise UsageError(f"the two have other labels, so their probabilities cannot be compared: {both}")
    if a.activation != b.activation:
        raise UsageError(f"the two mean other things by a probability, so they cannot be compared: {both}")
    order = [b.labels.index(label) for label in a.labels]
    notes = []
    if a.labels != b.labels:
        notes.append(f"labels stand in another order and are matched by name: {both}")
    if a.source.sha256 != b.source.sha256:
        notes.append("the two were made from different checkpoints")
    return order, tuple(notes)


def _texts(path: str | os.PathLike[str], texts: str | os.PathLike[str] | None) -> tuple[GoldenSet, tuple[str, ...]]:
    """The texts to score, and what is to be said of them."""
    if texts is not None:
        return read_golden(Path(texts)), ()
    with Bundle(path) as bundle:
        shipped = read_shipped(bundle.read(GOLDEN_NAME))
    note = shipped.note()
    return shipped.inside(), (f"A's golden set: {note}",) if note else ()


def _score(
    path: str | os.PathLike[str],
    name: str,
    variant: str | None,
    provider: str,
    golden: GoldenSet,
    report: Reporter,
) -> _Scored:
    """The texts as this bundle reads and scores them, with its recalibration."""
    classifier = Classifier(path, provider=provider, variant=variant)
    ids = []
    for number, text in enumerate(golden.texts):
        try:
            contract = classifier.manifest.contract
            ids.append(classifier.encoder.encode(text_of_record(text.record, contract)).input_ids)
        except InputError as error:
            raise InputError(f"{name} ({os.fspath(path)}) cannot read text {number}: {error}") from error
    chosen = classifier.variant
    with report(f"scoring {len(ids)} texts with {name}, {chosen.name}", len(ids)) as tick:
        logits = calibrated(classifier.logits(ids, progress=tick), chosen.recalibration)
    side = Side(os.fspath(path), classifier.digest, chosen.name, chosen.precision, classifier.target)
    return _Scored(side, ids, logits)


def _changes(p: FloatArray, q: FloatArray, drift: Drift) -> tuple[LabelChange, ...]:
    """The flips of a drift, with the margins of both sides' probabilities [texts, labels]."""
    return tuple(
        LabelChange(flip.text, flip.reference, flip.variant, _margin(p[flip.text]), _margin(q[flip.text]))
        for flip in drift.flips
    )


def _margin(row: FloatArray) -> float:
    second, first = np.sort(row)[-2:]
    return float(first - second)


def _quality(p: FloatArray, labels: Sequence[str], truth: Sequence[str | None]) -> Quality | None:
    """Accuracy, ECE and Brier score (summed over labels) of probabilities [texts, labels] where the label is known."""
    known = [(row, labels.index(name)) for row, name in enumerate(truth) if name in labels]
    if not known:
        return None
    rows, classes = np.array(known).T
    chosen = p[rows]
    right = chosen.argmax(axis=1) == classes
    return Quality(
        len(rows), float(right.mean()), expected_calibration_error(chosen, right), brier_score(chosen, classes)
    )
