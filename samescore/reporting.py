"""`samescore report`: a bundle's evidence as one HTML file, for people who look rather than read. No PyTorch.

    bundle.json, parity.json ─┬→ verdicts, tables ─┐
    golden.jsonl, scores.npz ─┴→ figures, texts ───┴→ report.html.jinja → one file that needs nothing else

The same bundle gives the same bytes: there is no date, and nothing of the machine that writes the report.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate import plots
from samescore.calibrate.certificate import CERTIFICATE_NAME
from samescore.calibrate.gate import Tolerance
from samescore.calibrate.golden import GoldenText, read_golden
from samescore.calibrate.scores import BFLOAT16, SCORES_NAME, read_scores
from samescore.runtime import prediction
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import BundleError, MissingDependencyError
from samescore.runtime.manifest import Manifest, Variant, parse_as
from samescore.runtime.prediction import probabilities_of

FloatArray = npt.NDArray[np.float64]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
GOLDEN_NAME = "golden.jsonl"
# How much is shown: parity.json and scores.npz hold the rest.
WORST, FLIPS, TEXT_HEAD, TEXT_TAIL = 20, 50, 150, 90

# What the numbers of a drift are called, and what they mean.
NAMES = {
    "texts": ("texts", "N, the number of golden texts"),
    "max_abs_dp": ("max |Δp|", "the largest difference"),
    "beyond_max_high": (
        "rate beyond the max, at most",
        "95 % upper bound of the share of such texts that differ by more",
    ),
    "p999_abs_dp": ("p99.9 |Δp|", "one text in 1000 differs more"),
    "p99_abs_dp": ("p99 |Δp|", "one text in 100 differs more"),
    "mean_abs_dp": ("mean |Δp|", "the average difference"),
    "max_abs_dlogit": ("max |Δlogit|", "before the softmax or sigmoid"),
    "kld": ("KLD, nats", "mean Kullback-Leibler divergence from the reference"),
    "agreement": ("same label", "share of texts with the same most probable label"),
    "not_finite": ("NaN or infinite", "texts with such logits"),
    "noise_ratio": ("noise ratio", "mean |Δp| over that of the reference's own bfloat16 run"),
    "labelled": ("texts with a label", "for accuracy and calibration"),
    "labels.accuracy": ("accuracy", "share of texts whose known label is the most probable one"),
    "labels.accuracy_shift": ("accuracy shift", "variant minus reference"),
    "labels.ece": ("ECE", "expected calibration error"),
    "labels.ece_shift": ("ECE shift", "variant minus reference"),
    "labels.brier": ("Brier score", "mean squared error of the probabilities"),
    "labels.brier_shift": ("Brier shift", "variant minus reference"),
}
SHARES = {"agreement", "beyond_max_high", "labels.accuracy"}
INVARIANCE = {
    "neighbours": "beside another text in one call",
    "workers": "many texts at once, against one at a time",
    "prefix": "with its beginning read before",
}


@dataclass(frozen=True)
class _Evidence:
    """A bundle's golden texts with the reference's probabilities p float64 [texts, labels], and their lengths in tokens."""

    manifest: Manifest
    texts: Sequence[GoldenText]
    p: FloatArray
    lengths: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    groups: Mapping[str, Mapping[str, npt.NDArray[np.int64]]]
    bfloat16: FloatArray | None


def render_report(path: str | os.PathLike[str]) -> str:
    """The HTML page of the bundle at `path`.

    BundleError for a bundle that is damaged or was written without its scores; MissingDependencyError without the extra.
    """
    jinja2 = _import_jinja()
    plots.import_matplotlib()
    with Bundle(path) as bundle:
        if SCORES_NAME not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} holds no {SCORES_NAME}, the logits behind its certificate, so there is nothing to draw: "
                "export it again with this samescore"
            )
        manifest, digest = bundle.manifest, bundle.digest
        certificate = json.loads(bundle.read(CERTIFICATE_NAME))
        scores = read_scores(bundle.read(SCORES_NAME))
        evidence = _evidence(manifest, bundle.read(GOLDEN_NAME), scores)
    variants = [
        _variant(number, variant, certificate["variants"][variant.name], scores[variant.name], evidence)
        for number, variant in enumerate(manifest.variants)
        if variant.name in certificate["variants"] and variant.name in scores
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
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


def small(value: float | None) -> str:
    """A number as people read it: three digits, a power of ten below 0.001; – for none."""
    if value is None:
        return "–"
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 1e-3:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float | None) -> str:
    """A share in percent, with as many digits as tell it from 100 %."""
    return "–" if value is None else f"{100 * value:.2f} %"


def _import_jinja() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            f"a report needs {error.name}, which is not installed: pip install 'samescore[report]'"
        ) from error
    return jinja2


def _evidence(manifest: Manifest, raw: bytes, scores: Mapping[str, npt.NDArray[np.float32]]) -> _Evidence:
    """What the golden set and the scores say; BundleError where they do not belong together."""
    golden = read_golden(raw, GOLDEN_NAME)
    logits = golden.logits()
    for name, array in scores.items():
        if array.shape != logits.shape:
            raise BundleError(f"{SCORES_NAME}: {name} has shape {array.shape}, the golden set {logits.shape}")
    bfloat16 = scores.get(BFLOAT16)
    p = probabilities_of(logits, manifest.activation)
    index = {label: number for number, label in enumerate(manifest.labels)}
    return _Evidence(
        manifest=manifest,
        texts=golden.texts,
        p=p,
        lengths=np.array([len(ids) for ids in golden.input_ids()]),
        truth=np.array([index.get(label or "", -1) for label in golden.labels()]),
        groups=_groups(raw),
        bfloat16=None if bfloat16 is None else _differences(p, bfloat16, manifest)[0],
    )


def _groups(raw: bytes) -> dict[str, dict[str, npt.NDArray[np.int64]]]:
    """The numbers of the texts of each slice and of each language, where the golden set's lines name them."""
    lines = [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
    lines = [line for line in lines if "golden" not in line]
    groups: dict[str, dict[str, npt.NDArray[np.int64]]] = {}
    for key in ("slice", "language"):
        named = [str(line.get(key) or "not said") for line in lines]
        if set(named) != {"not said"}:
            groups[key] = {name: np.flatnonzero(np.array(named) == name) for name in sorted(set(named))}
    return groups


def _differences(p: FloatArray, logits: npt.NDArray[np.float32], manifest: Manifest) -> tuple[FloatArray, FloatArray]:
    """|Δp| of each text as in the certificate (1 where logits are not finite), and the probabilities [texts, labels]."""
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
    q = probabilities_of(np.where(finite[:, None], logits, 0), manifest.activation)
    q[~finite] = 0
    return np.where(finite, np.abs(p - q).max(axis=1), 1.0), q


def _variant(
    number: int, variant: Variant, parity: Mapping[str, Any], logits: npt.NDArray[np.float32], evidence: _Evidence
) -> dict[str, Any]:
    """Everything that the page says of one variant."""
    dp, q = _differences(evidence.p, logits, evidence.manifest)
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
        "decided": _decided(drift, tolerance),
        "rows": list(_rows(drift, parity["tolerance"])),
        "figures": _figures(f"v{number}", variant, dp, q, logits, tolerance, evidence),
        "sensitivity": _sensitivity(variant, parity.get("sensitivity")),
        "invariance": [(INVARIANCE.get(name, name), value) for name, value in parity["invariance"].items()],
        "slices": list(_slices(dp, evidence.p, q, evidence.groups)),
        "flips": [_told(int(i), dp, q, evidence) for i in flipped[np.argsort(-dp[flipped], kind="stable")][:FLIPS]],
        "flip_count": len(flipped),
        "worst": [_told(int(i), dp, q, evidence) for i in np.argsort(-dp, kind="stable")[:WORST]],
        "differs": _contradictions(dp, drift),
    }


def _decided(drift: Mapping[str, Any], tolerance: Tolerance) -> list[dict[str, Any]]:
    """The numbers that the gate looks at, each with what is allowed and whether it is inside."""
    rows = []
    for name in ("max_abs_dp", "p99_abs_dp", "mean_abs_dp"):
        allowed = getattr(tolerance, name)
        if allowed is not None:
            rows.append((NAMES[name][0], drift[name], "≤", allowed, drift[name] <= allowed, small))
    rows.append(
        (
            NAMES["agreement"][0],
            drift["agreement"],
            "≥",
            tolerance.agreement,
            drift["agreement"] >= tolerance.agreement,
            share,
        )
    )
    if tolerance.flip_margin is not None:
        margin = max((flip["margin"] for flip in drift["flips"]), default=0.0)
        rows.append(
            ("largest margin of a flip", margin, "≤", tolerance.flip_margin, margin <= tolerance.flip_margin, small)
        )
    keys = ("name", "measured", "sign", "allowed", "inside")
    return [
        dict(zip(keys, (name, form(value), sign, form(allowed), inside), strict=True))
        for name, value, sign, allowed, inside, form in rows
    ]


def _rows(drift: Mapping[str, Any], tolerance: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number of a drift with its interval and tolerance; numbers that this version does not know by their own names."""
    flat = {key: value for key, value in drift.items() if not isinstance(value, Mapping | list)}
    for outer, inner in drift.items():
        if isinstance(inner, Mapping):
            flat.update({f"{outer}.{key}": value for key, value in inner.items()})
    for key, value in flat.items():
        base, _, end = key.rpartition("_")
        if end in ("low", "high") and base in flat:
            continue
        name, meaning = NAMES.get(key, (key, ""))
        low, high = flat.get(f"{key}_low"), flat.get(f"{key}_high")
        form: Callable[[float | None], str] = share if key in SHARES else small
        yield {
            "name": name,
            "meaning": meaning,
            "value": value,
            "text": form(value),
            "has_interval": f"{key}_low" in flat,
            "low": low,
            "high": high,
            "low_text": form(low),
            "high_text": "not bounded by so few texts" if high is None else form(high),
            "allowed": None
            if tolerance.get(key) is None
            else ("≥ " if key == "agreement" else "≤ ") + form(tolerance[key]),
        }


def _figures(
    slug: str,
    variant: Variant,
    dp: FloatArray,
    q: FloatArray,
    logits: npt.NDArray[np.float32],
    tolerance: Tolerance,
    evidence: _Evidence,
) -> list[dict[str, str]]:
    """The figures of one variant: title, SVG, words for those who cannot see it, caption, and whether it is wide."""
    p, count = evidence.p, len(dp)
    limits = {"p99 allowed": tolerance.p99_abs_dp, "max allowed": tolerance.max_abs_dp}
    numbers = ", ".join(
        f"{name} {small(float(np.quantile(dp, at)))}" for name, at in (("median", 0.5), ("p99", 0.99), ("max", 1.0))
    )
    near = _margins(p) <= tolerance.near_tie
    same = int((dp <= plots.FLOOR).sum())
    binary = p.shape[1] == 2 and evidence.manifest.activation == "softmax"
    figures = [
        _figure(
            "How far are the texts off?",
            plots.histogram(f"{slug}-h", dp, limits),
            f"Histogram of |Δp| of {count} texts: {numbers}; allowed p99 {small(tolerance.p99_abs_dp)}, "
            f"max {small(tolerance.max_abs_dp)}.",
            "Left is better. Dotted: quantiles; orange: the tolerance."
            + (f" {same} texts at the left edge do not differ by 1e-9." if same else ""),
            wide=True,
        ),
        _figure(
            "Variant against reference",
            plots.probabilities(f"{slug}-p", p, q, tolerance.near_tie, band=binary),
            f"Scatter of the variant's probabilities over the reference's for {count} texts and {p.shape[1]} labels, and "
            f"of their difference; {int(near.sum())} texts are near ties.",
            f"On the line: equal. Rings: {int(near.sum())} near ties, the two best labels within {small(tolerance.near_tie)}"
            + ("; the grey band is where they lie." if binary else "."),
            wide=True,
            legend="labels",
        ),
        _figure(
            "How many differ by more?",
            plots.exceedance(
                f"{slug}-e", {variant.name: dp}, {0.01: tolerance.p99_abs_dp, 1 / count: tolerance.max_abs_dp}
            ),
            f"Quantile curve of |Δp|: {numbers}.",
            "The curve must stay below the triangles: p99 at 0.01, max at the right end.",
        ),
        _figure(
            "Do long texts differ more?",
            plots.against_length(f"{slug}-l", dp, evidence.lengths),
            f"Scatter of |Δp| over the length of {count} texts, {evidence.lengths.min()} to {evidence.lengths.max()} tokens, "
            "with the median of each length band.",
            "Each bar is the median of the texts between a length and its double.",
        ),
    ]
    if evidence.bfloat16 is not None:
        figures.append(_noise(slug, dp, evidence.bfloat16))
    if (known := evidence.truth >= 0).any():
        figures.append(_reliability(slug, variant, q, logits, known, evidence))
    return figures


def _noise(slug: str, dp: FloatArray, bfloat16: FloatArray) -> dict[str, str]:
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
    evidence: _Evidence,
) -> dict[str, str]:
    """Confidence against accuracy on the texts whose label is known: reference, variant, and recalibrated where it is."""
    sides = {"reference": evidence.p, "variant": q}
    calibrated, recalibration = getattr(prediction, "calibrated", None), getattr(variant, "recalibration", None)
    if calibrated is not None and recalibration is not None:
        sides["recalibrated"] = probabilities_of(calibrated(logits, recalibration), evidence.manifest.activation)
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
    title: str, svg: str, alternative: str, caption: str, *, wide: bool = False, legend: str = ""
) -> dict[str, Any]:
    from markupsafe import Markup

    return {"title": title, "svg": Markup(svg), "alt": alternative, "caption": caption, "wide": wide, "legend": legend}


def _overview(evidence: _Evidence, variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def _sensitivity(variant: Variant, effects: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """What quantizing each part alone costs (mean |Δp|), the largest first, and which parts stayed in float."""
    if not effects:
        return []
    exact = {part.strip() for part in variant.recipe.get("exact", "").split(",")}
    largest = max(effects.values()) or 1.0
    ranked = sorted(effects.items(), key=lambda item: -item[1])
    return [
        {"part": part, "effect": value, "percent": f"{100 * value / largest:.1f}", "exact": part in exact}
        for part, value in ranked
    ]


def _slices(
    dp: FloatArray, p: FloatArray, q: FloatArray, groups: Mapping[str, Mapping[str, npt.NDArray[np.int64]]]
) -> Iterator[dict[str, Any]]:
    same = p.argmax(axis=1) == q.argmax(axis=1)
    for kind, members in groups.items():
        for name, rows in members.items():
            yield {
                "kind": kind,
                "name": visible(name),
                "texts": len(rows),
                "mean": float(dp[rows].mean()),
                "p99": float(np.quantile(dp[rows], 0.99)),
                "max": float(dp[rows].max()),
                "agreement": float(same[rows].mean()),
            }


def _told(number: int, dp: FloatArray, q: FloatArray, evidence: _Evidence) -> dict[str, Any]:
    """One text for a table: what it says, and what both made of it."""
    p, labels = evidence.p[number], evidence.manifest.labels
    text = evidence.texts[number]
    return {
        "number": number,
        "dp": float(dp[number]),
        "tokens": int(evidence.lengths[number]),
        "reference": labels[int(p.argmax())],
        "reference_p": float(p.max()),
        "reference_margin": float(_margins(p[None])[0]),
        "variant": labels[int(q[number].argmax())],
        "variant_p": float(q[number].max()),
        "variant_margin": float(_margins(q[number][None])[0]),
        "label": text.label,
        "text": shortened(_said(text.record)),
    }


def _said(record: Mapping[str, Any]) -> str:
    """A golden text's words: its text, its turns, or its prompt and response."""
    if "text" in record:
        return str(record["text"])
    if "messages" in record:
        return "  ".join(f"{message['role']}: {message['content']}" for message in record["messages"])
    return f"{record['prompt']}  →  {record['response']}"


def shortened(text: str) -> str:
    """Beginning and end of a text, with what cannot be seen made visible."""
    if len(text) <= TEXT_HEAD + TEXT_TAIL + 20:
        return visible(text)
    return f"{visible(text[:TEXT_HEAD])} […] {visible(text[-TEXT_TAIL:])} ({len(text):,} characters)"


def visible(text: str) -> str:
    """Controls, bidi marks, lone surrogates and other characters without a shape as ⟨U+202E⟩; white space as one space.

    The joiners U+200C and U+200D stay: scripts and emoji need them.
    """
    shown = [
        f"⟨U+{ord(c):04X}⟩"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\t\n\r\u200c\u200d"
        else c
        for c in text
    ]
    return " ".join("".join(shown).split())


def _margins(p: FloatArray) -> FloatArray:
    """The top probability of each row [labels] minus its second; 1 for a single label."""
    if p.shape[1] == 1:
        return np.ones(len(p))
    ranked = np.sort(p, axis=1)
    result: FloatArray = ranked[:, -1] - ranked[:, -2]
    return result


def _contradictions(dp: FloatArray, drift: Mapping[str, Any]) -> list[str]:
    """Numbers of the certificate that its own scores do not give."""
    again = {"texts": len(dp), "max_abs_dp": float(dp.max()), "mean_abs_dp": float(dp.mean())}
    return [
        f"{NAMES[name][0]} is {small(value)} by {SCORES_NAME}, {small(drift[name])} by {CERTIFICATE_NAME}"
        for name, value in again.items()
        if not np.isclose(value, drift[name], rtol=1e-6, atol=1e-12)
    ]
