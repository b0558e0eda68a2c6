"""The tables of a report: a certificate's numbers in people's words, and golden texts made safe to look at."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.certificate import CERTIFICATE_NAME
from samescore.calibrate.gate import Tolerance
from samescore.calibrate.golden import GoldenText
from samescore.calibrate.scores import SCORES_NAME
from samescore.calibrate.shipped import KnownText
from samescore.runtime.manifest import Manifest, Variant
from samescore.runtime.prediction import probabilities_of

FloatArray = npt.NDArray[np.float64]

# How much of a long text is shown.
TEXT_HEAD, TEXT_TAIL = 150, 90

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
class Evidence:
    """A bundle's golden texts with the reference's logits float32 [texts, labels] and probabilities p float64, and lengths."""

    manifest: Manifest
    texts: Sequence[GoldenText | KnownText]
    logits: npt.NDArray[np.float32]
    p: FloatArray
    lengths: npt.NDArray[np.int64]
    truth: npt.NDArray[np.int64]
    groups: Mapping[str, Mapping[str, npt.NDArray[np.int64]]]
    bfloat16: FloatArray | None


def small(value: float | None) -> str:
    """A number as people read it: three digits, a power of ten below 0.001; – for none."""
    if value is None:
        return "–"
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:#.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float | None) -> str:
    """A share in percent, with as many digits as tell it from 100 %."""
    return "–" if value is None else f"{100 * value:.2f} %"


def differences(p: FloatArray, logits: npt.NDArray[Any], manifest: Manifest) -> tuple[FloatArray, FloatArray]:
    """|Δp| of each text as in the certificate (1 where logits are not finite), and the probabilities [texts, labels]."""
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(logits).all(axis=1))
    q = probabilities_of(np.where(finite[:, None], logits, 0), manifest.activation)
    q[~finite] = 0
    return np.where(finite, np.abs(p - q).max(axis=1), 1.0), q


def decided(drift: Mapping[str, Any], tolerance: Tolerance) -> list[dict[str, Any]]:
    """The numbers that the gate looks at, each with what is allowed and whether it is inside."""
    rows = []
    for name in ("max_abs_dp", "p99_abs_dp", "mean_abs_dp"):
        allowed = getattr(tolerance, name)
        if allowed is not None:
            rows.append(_held(NAMES[name][0], small(drift[name]), f"≤ {allowed:g}", drift[name] <= allowed))
    agreement = drift["agreement"]
    inside = agreement >= tolerance.agreement
    rows.append(_held(NAMES["agreement"][0], share(agreement), f"≥ {share(tolerance.agreement)}", inside))
    if tolerance.flip_margin is not None:
        margin = max((flip["margin"] for flip in drift["flips"]), default=0.0)
        inside = margin <= tolerance.flip_margin
        rows.append(_held("largest margin of a flip", small(margin), f"≤ {tolerance.flip_margin:g}", inside))
    return rows


def _held(name: str, measured: str, allowed: str, inside: bool) -> dict[str, Any]:
    return {"name": name, "measured": measured, "allowed": allowed, "inside": inside}


def number_rows(drift: Mapping[str, Any], tolerance: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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
            "allowed": _allowed(key, tolerance.get(key)),
        }


def _allowed(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"≥ {share(value)}" if key == "agreement" else f"≤ {value:g}"


def sensitivity(variant: Variant, effects: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """What quantizing each part alone costs (mean |Δp|), the largest first, and the parts that have finer formats."""
    if not effects:
        return []
    formats = dict(entry.split("=", 1) for entry in variant.recipe.get("parts", "").split())
    largest = max(effects.values()) or 1.0
    ranked = sorted(effects.items(), key=lambda item: -item[1])
    return [
        {"part": part, "effect": value, "percent": f"{100 * value / largest:.1f}", "format": formats.get(part)}
        for part, value in ranked
    ]


def slices(
    dp: FloatArray, p: FloatArray, q: FloatArray, groups: Mapping[str, Mapping[str, npt.NDArray[np.int64]]]
) -> Iterator[dict[str, Any]]:
    """N, mean, p99, max |Δp| and label agreement of each group of texts."""
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


def told(number: int, dp: FloatArray, q: FloatArray, evidence: Evidence) -> dict[str, Any]:
    """One text for a table: what it says, and what both made of it."""
    p, labels = evidence.p[number], evidence.manifest.labels
    text = evidence.texts[number]
    return {
        "number": number,
        "dp": float(dp[number]),
        "tokens": int(evidence.lengths[number]),
        "reference": labels[int(p.argmax())],
        "reference_p": float(p.max()),
        "reference_margin": float(margins(p[None])[0]),
        "variant": labels[int(q[number].argmax())],
        "variant_p": float(q[number].max()),
        "variant_margin": float(margins(q[number][None])[0]),
        "label": text.label,
        "text": _not_inside(text) if isinstance(text, KnownText) else shortened(_said(text.record)),
    }


def _not_inside(text: KnownText) -> str:
    return f"text not inside the bundle (digest {text.digest[:16]}…)"


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
    """The text on one line, its characters without a shape `marked`."""
    return " ".join(marked(text).split())


def marked(text: str) -> str:
    """Controls, bidi marks, lone surrogates and other characters without a shape as ⟨U+202E⟩, but for white space.

    The joiners U+200C and U+200D stay: scripts and emoji need them.
    """
    return "".join(
        f"⟨U+{ord(c):04X}⟩"
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in "\t\n\r\u200c\u200d"
        else c
        for c in text
    )


def margins(p: FloatArray) -> FloatArray:
    """The top probability of each row [labels] minus its second; 1 for a single label."""
    if p.shape[1] == 1:
        return np.ones(len(p))
    ranked = np.sort(p, axis=1)
    result: FloatArray = ranked[:, -1] - ranked[:, -2]
    return result


def contradictions(dp: FloatArray, drift: Mapping[str, Any]) -> list[str]:
    """Numbers of the certificate that its own scores do not give."""
    again = {"texts": len(dp), "max_abs_dp": float(dp.max()), "mean_abs_dp": float(dp.mean())}
    return [
        f"{NAMES[name][0]} is {small(value)} by {SCORES_NAME}, {small(drift[name])} by {CERTIFICATE_NAME}"
        for name, value in again.items()
        if not np.isclose(value, drift[name], rtol=1e-6, atol=1e-12)
    ]
