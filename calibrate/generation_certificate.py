"""`parity.json` of a bundle that generates text: per variant what was measured, held against what, and the verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from samescore.calibrate.certificate import SCHEMA_VERSION
from samescore.calibrate.generation_gate import GenerationTolerance, Outcome
from samescore.calibrate.generation_golden import GenerationReference
from samescore.calibrate.generation_metrics import GreedyAgreement, TokenDrift


@dataclass(frozen=True)
class GenerationDrift:
    """One variant along the reference's greedy answers and along real texts.

    vocabulary: `whole`, or `top` where the reference is known at its likeliest tokens only and every KLD is a lower bound.
    noise_ratio: mean KLD over that of the reference's own bfloat16 run, of answers and of texts; None where not measured.
    """

    vocabulary: Literal["whole", "top"]
    answers: TokenDrift
    texts: TokenDrift
    greedy: GreedyAgreement
    answers_noise_ratio: float | None
    texts_noise_ratio: float | None


@dataclass(frozen=True)
class GenerationParity:
    """What is known of one variant. NOT MEASURED is no pass: nothing is known then."""

    outcome: Outcome
    failures: tuple[str, ...] = ()
    tolerance: GenerationTolerance | None = None
    drift: GenerationDrift | None = None


@dataclass(frozen=True)
class GenerationCertificate:
    """The whole of a generator's `parity.json`."""

    environment: Mapping[str, object]
    variants: Mapping[str, GenerationParity]
    reference: GenerationReference | None = None

    @property
    def measured(self) -> bool:
        """Whether every variant was held against PyTorch."""
        return all(parity.outcome != "NOT MEASURED" for parity in self.variants.values())

    @property
    def passed(self) -> bool:
        """Whether every variant was measured and is inside its tolerance."""
        return all(parity.outcome == "PASS" for parity in self.variants.values())

    def to_json(self) -> bytes:
        """UTF-8 JSON, two spaces; what is not finite is null."""
        document = {"schema_version": SCHEMA_VERSION, "task": "generate", **_finite(asdict(self))}
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


LEGEND = (
    "KLD: mean over next tokens, reference to variant, along the reference's greedy answers and along texts (95 % interval). "
    "same: likeliest token. greedy: answers equal to the last token, those parting at near ties, others. perplexity: the "
    "variant's over the reference's, on texts. noise: mean KLD over that of the reference's own bfloat16."
)


def generation_table(variants: Mapping[str, GenerationParity]) -> str:
    """A table for people: two rows per variant, and a line for each number that failed."""
    lines = [f"{'variant':<11}{'along':<9}{'tokens':>7}{'KLD':>28}{'p99 |Δp|':>10}{'same':>8}{'noise':>7}  gate"]
    for name, parity in variants.items():
        drift = parity.drift
        if drift is None:
            lines.append(f"{name:<15}{parity.outcome}")
            lines.extend(f"  {line}" for line in parity.failures)
            continue
        for along, one, noise in (
            ("answers", drift.answers, drift.answers_noise_ratio),
            ("texts", drift.texts, drift.texts_noise_ratio),
        ):
            kld = f"{one.mean_kld:.2e} [{one.mean_kld_low:.1e}, {one.mean_kld_high:.1e}]"
            ratio = "–" if noise is None else f"{noise:.2f}"
            gate = parity.outcome if along == "answers" else ""
            lines.append(
                f"{name:<11}{along:<9}{one.positions:>7}{kld:>28}{one.p99_abs_dp:>10.1e}{one.same:>8.2%}{ratio:>7}  {gate}"
            )
        lines.append(f"  {greedy_line(drift)}; {perplexity_line(drift)}")
        lines.extend(f"  {line}" for line in parity.failures)
    return "\n".join(lines)


def greedy_line(drift: GenerationDrift) -> str:
    """How the greedy answers compare, in words."""
    greedy = drift.greedy
    return (
        f"greedy: {greedy.identical} of {greedy.prompts} answers the same, {greedy.near_ties} part at near ties "
        f"({greedy.tie:g} of a logit), {greedy.outside} elsewhere"
    )


def perplexity_line(drift: GenerationDrift) -> str:
    """The ratio of perplexities on texts, in words."""
    t = drift.texts
    return (
        f"perplexity {t.perplexity:.2f} times {t.perplexity_ratio:.5f} "
        f"[{t.perplexity_ratio_low:.5f}, {t.perplexity_ratio_high:.5f}]"
    )
