"""`samescore report`: a bundle's evidence as one HTML file, for people who look rather than read. No PyTorch.

    bundle.json, parity.json ─┬→ verdicts, tables ─┐
    golden set, scores.npz ───┴→ figures, texts ───┴→ report.html.jinja → one file that needs nothing else

The same bundle gives the same bytes: there is no date, and nothing of the machine that writes the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate import plots
from samescore.calibrate.certificate import CERTIFICATE_NAME
from samescore.calibrate.gate import Tolerance
from samescore.calibrate.recalibrate import judged_pair
from samescore.calibrate.scores import BFLOAT16, SCORES_NAME, read_scores
from samescore.calibrate.shipped import GOLDEN_NAME, ShippedSet, read_shipped
from samescore.report_tables import (
    INVARIANCE,
    Evidence,
    contradictions,
    decided,
    differences,
    margins,
    marked,
    number_rows,
    sensitivity,
    share,
    slices,
    small,
    told,
)
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, MissingDependencyError
from samescore.runtime.manifest import Manifest, Variant, parse_as
from samescore.runtime.prediction import probabilities_of

FloatArray = npt.NDArray[np.float64]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
# How much is shown: parity.json and scores.npz hold the rest.
WORST, FLIPS = 20, 50


def render_report(path: str | os.PathLike[str]) -> str:
    """The HTML page of the bundle at `path`.

    BundleError for a bundle that is damaged or was written without its scores; MissingDependencyError without the extra.
    """
    jinja2 = _import_jinja()
    plots.import_matplotlib()
    with Bundle(path) as bundle:
        bundle.require_classifier("report")
        if SCORES_NAME not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} holds no {SCORES_NAME}, the logits behind its certificate, so there is nothing to draw: "
                "export it again with this samescore"
            )
        manifest, digest = bundle.manifest, bundle.digest
        certificate = json.loads(bundle.read(CERTIFICATE_NAME))
        scores = read_scores(bundle.read(SCORES_NAME))
        evidence = _evidence(manifest, bundle.read(GOLDEN_NAME), scores)
    if missing := [v.name for v in manifest.variants if v.name not in scores or v.name not in certificate["variants"]]:
        raise BundleError(
            f"{os.fspath(path)}: {SCORES_NAME} or {CERTIFICATE_NAME} says nothing of {', '.join(missing)}"
        )
    variants = [
        _variant(number, variant, certificate["variants"][variant.name], scores[variant.name], evidence)
        for number, variant in enumerate(manifest.variants)
    ]
    environment = jinja2.Environment(
        autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(small=small, share=share)
    page: str = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        manifest=manifest,
        digest=digest,
        certificate=certificate,
        title=manifest.profile or manifest.source.name,
        variants=variants,
        overview=_overview(evidence, variants),
        colours=[plots.COLOURS[i % len(plots.COLOURS)] for i in range(len(manifest.labels))],
        texts=len(evidence.texts),
        flips_shown=FLIPS,
    )
    return page


def _finalize(value: Any) -> Any:
    """What is printed: strings from the bundle without invisible characters (jinja escapes them after this)."""
    return marked(value) if type(value) is str else value


def _import_jinja() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            f"a report needs {error.name}, which is not installed: pip install 'samescore[report]'"
        ) from error
    return jinja2


def _evidence(manifest: Manifest, raw: bytes, scores: Mapping[str, npt.NDArray[np.float32]]) -> Evidence:
    """What the golden set and the scores say; BundleError where they do not belong together."""
    golden = read_shipped(raw)
    logits = golden.logits()
    for name, array in scores.items():
        if array.shape != logits.shape:
            raise BundleError(f"{SCORES_NAME}: {name} has shape {array.shape}, the golden set {logits.shape}")
    bfloat16 = scores.get(BFLOAT16)
    p = probabilities_of(logits, manifest.activation)
    index = {label: number for number, label in enumerate(manifest.labels)}
    return Evidence(
        manifest=manifest,
        texts=golden.texts(),
        logits=logits,
        p=p,
        lengths=np.array(golden.lengths()),
        truth=np.array([index.get(label or "", -1) for label in golden.labels()]),
        groups=_groups(golden),
        bfloat16=None if bfloat16 is None else differences(p, bfloat16, manifest)[0],
    )


def _groups(golden: ShippedSet) -> dict[str, dict[str, npt.NDArray[np.int64]]]:
    """The numbers of the texts of each slice and of each language, where the golden set's lines name them."""
    texts = golden.texts()
    groups: dict[str, dict[str, npt.NDArray[np.int64]]] = {}
    said = {"slice": [text.slice for text in texts], "language": [text.language for text in texts]}
    for key, values in said.items():
        named = [value or "not said" for value in values]
        if set(named) != {"not said"}:
            groups[key] = {name: np.flatnonzero(np.array(named) == name) for name in sorted(set(named))}
    return groups


def _variant(
    number: int, variant: Variant, parity: Mapping[str, Any], logits: npt.NDArray[np.float32], evidence: Evidence
) -> dict[str, Any]:
    """Everything that the page says of one variant."""
    # What a user gets is judged: a recalibration is applied here, as in the certificate.
    reference, judged = judged_pair(evidence.logits, logits, variant.recalibration)
    evidence = replace(evidence, p=probabilities_of(reference, evidence.manifest.activation))
    dp, q = differences(evidence.p, judged, evidence.manifest)
    drift, tolerance = parity["drift"], parse_as(Tolerance, parity["tolerance"], f"{CERTIFICATE_NAME}: tolerance")
    flipped = np.flatnonzero(evidence.p.argmax(axis=1) != q.argmax(axis=1))
    manifest = evidence.manifest
    size = sum(entry.size for name, entry in manifest.files.items() if name.startswith(f"{variant.name}/"))
    return {
        "id": f"v{number}",
        "variant": variant,
        "dp": dp,
        "megabytes": f"{size / 1e6:.1f}",
        "verdict": parity["verdict"],
        "drift": drift,
        "tolerance": tolerance,
        "decided": decided(drift, tolerance),
        "rows": list(number_rows(drift, parity["tolerance"])),
        "figures": _figures(f"v{number}", variant, dp, q, logits, tolerance, evidence),
        "sensitivity": sensitivity(variant, parity.get("sensitivity")),
        "invariance": [(INVARIANCE.get(name, name), value) for name, value in parity["invariance"].items()],
        "slices": list(slices(dp, evidence.p, q, evidence.groups)),
        "flips": [told(int(i), dp, q, evidence) for i in flipped[np.argsort(-dp[flipped], kind="stable")][:FLIPS]],
        "flip_count": len(flipped),
        "worst": [told(int(i), dp, q, evidence) for i in np.argsort(-dp, kind="stable")[:WORST]],
        "differs": contradictions(dp, drift),
    }


def _figures(
    slug: str,
    variant: Variant,
    dp: FloatArray,
    q: FloatArray,
    logits: npt.NDArray[np.float32],
    tolerance: Tolerance,
    evidence: Evidence,
) -> list[dict[str, Any]]:
    """The figures of one variant."""
    figures = [
        _histogram(slug, dp, tolerance),
        _probabilities(slug, q, tolerance, evidence),
        _exceedance(slug, variant, dp, tolerance),
        _figure(
            "Do long texts differ more?",
            plots.against_length(f"{slug}-l", dp, evidence.lengths),
            f"Scatter of |Δp| over the length of {len(dp)} texts, {evidence.lengths.min()} to {evidence.lengths.max()} tokens, "
            "with the median of each length band.",
            f"Each bar: the median of the texts between a length and its double, where there are at least {plots.BAND_TEXTS}.",
        ),
    ]
    if evidence.bfloat16 is not None:
        figures.append(_noise(slug, dp, evidence.bfloat16))
    if (known := evidence.truth >= 0).any():
        figures.append(_reliability(slug, variant, q, logits, known, evidence))
    return figures


def _histogram(slug: str, dp: FloatArray, tolerance: Tolerance) -> dict[str, Any]:
    limits = {"p99 allowed": tolerance.p99_abs_dp, "max allowed": tolerance.max_abs_dp}
    same = int((dp <= plots.FLOOR).sum())
    return _figure(
        "How far are the texts off?",
        plots.histogram(f"{slug}-h", dp, limits),
        f"Histogram of |Δp| of {len(dp)} texts: {_quantiles(dp)}; allowed p99 {tolerance.p99_abs_dp:g}, "
        f"max {tolerance.max_abs_dp:g}.",
        "Left is better. Dotted: quantiles; orange: the tolerance."
        + (f" {same} texts at the left edge do not differ by 1e-9." if same else ""),
        wide=True,
    )


def _probabilities(slug: str, q: FloatArray, tolerance: Tolerance, evidence: Evidence) -> dict[str, Any]:
    p = evidence.p
    near = int((margins(p) <= tolerance.near_tie).sum())
    binary = p.shape[1] == 2 and evidence.manifest.activation == "softmax"
    return _figure(
        "Variant against reference",
        plots.probabilities(f"{slug}-p", p, q, tolerance.near_tie, band=binary),
        f"Scatter of the variant's probabilities over the reference's for {len(p)} texts and {p.shape[1]} labels, and of "
        f"their difference; {near} texts are near ties.",
        f"On the line: equal. Near ties, whose two best labels are within {tolerance.near_tie:g}, have a ring: {near} texts"
        + ("; the grey band is where they lie." if binary else "."),
        wide=True,
        legend=True,
    )


def _exceedance(slug: str, variant: Variant, dp: FloatArray, tolerance: Tolerance) -> dict[str, Any]:
    limits = {0.01: tolerance.p99_abs_dp, 1 / len(dp): tolerance.max_abs_dp}
    return _figure(
        "How many differ by more?",
        plots.exceedance(f"{slug}-e", {variant.name: dp}, limits),
        f"Quantile curve of |Δp|: {_quantiles(dp)}.",
        "The curve must stay below the triangles: p99 at 0.01, max at the right end.",
    )


def _quantiles(dp: FloatArray) -> str:
    at = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return ", ".join(f"{name} {small(float(np.quantile(dp, q)))}" for name, q in at.items())


def _noise(slug: str, dp: FloatArray, bfloat16: FloatArray) -> dict[str, Any]:
    return _figure(
        "Against the model's own noise",
        plots.noise(f"{slug}-n", dp, bfloat16),
        f"Histograms of |Δp|: the variant's median is {small(float(np.median(dp)))}, that of the reference's own bfloat16 run "
        f"{small(float(np.median(bfloat16)))}.",
        "Grey: what running the PyTorch model in bfloat16 instead of float32 does to the same texts.",
    )


def _reliability(
    slug: str,
    variant: Variant,
    q: FloatArray,
    logits: npt.NDArray[np.float32],
    known: npt.NDArray[np.bool_],
    evidence: Evidence,
) -> dict[str, Any]:
    """Confidence against accuracy on the texts whose label is known: reference and variant, before and after a correction."""
    sides = {"reference": probabilities_of(evidence.logits, evidence.manifest.activation), "variant": q}
    if variant.recalibration is not None:
        sides |= {"variant": differences(evidence.p, logits, evidence.manifest)[1], "recalibrated": q}
    truth = evidence.truth[known]
    measured = {name: (x[known].max(axis=1), x[known].argmax(axis=1) == truth) for name, x in sides.items()}
    accuracy = ", ".join(f"{name} {share(float(right.mean()))}" for name, (_, right) in measured.items())
    return _figure(
        "Does confidence mean accuracy?",
        plots.reliability(f"{slug}-r", measured),
        f"Reliability diagram of {int(known.sum())} texts with a known label; accuracy: {accuracy}.",
        f"On the diagonal: as often right as it claims. {int(known.sum())} texts with a label; accuracy: {accuracy}.",
    )


def _figure(
    title: str, svg: str, alternative: str, caption: str, *, wide: bool = False, legend: bool = False
) -> dict[str, Any]:
    """What the template needs of a figure; alternative: words for those who cannot see it; legend: of the labels."""
    from markupsafe import Markup

    return {"title": title, "svg": Markup(svg), "alt": alternative, "caption": caption, "wide": wide, "legend": legend}


def _overview(evidence: Evidence, variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All variants' quantile curves in one figure, and the reference's own bfloat16 run."""
    curves = {entry["variant"].name: entry["dp"] for entry in variants}
    if evidence.bfloat16 is not None:
        curves[BFLOAT16] = evidence.bfloat16
    p99 = ", ".join(f"{name} {small(float(np.quantile(dp, 0.99)))}" for name, dp in curves.items())
    return _figure(
        "All variants",
        plots.exceedance("all", curves, {}, plots.WIDE),
        f"Quantile curves of |Δp| of all variants; p99: {p99}.",
        "Lower is better. Read: at 0.01, the |Δp| that one text in a hundred exceeds."
        + (" Dashed: the PyTorch model itself in bfloat16." if evidence.bfloat16 is not None else ""),
        wide=True,
    )
