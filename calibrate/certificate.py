"""`parity.json`: the evidence a bundle carries, one entry per variant, with everything needed to judge it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata

from samescore.calibrate.gate import Tolerance, Verdict
from samescore.calibrate.golden import ReferenceInfo
from samescore.calibrate.metrics import Drift
from samescore.calibrate.token_faults import TokenizationEquality
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.errors import BundleError
from samescore.runtime.manifest import parse_as

CERTIFICATE_NAME = "parity.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Invariance:
    """Largest absolute logit difference of the same text scored another way; 0 means bit for bit equal.

    neighbours: in one call with another text (padded where the graph can pad). workers: many texts at once on
    single-threaded workers, against one at a time on all threads. prefix: its first half read before (as a prompt that
    several responses share is), or nothing read before where the contract has a prompt that is read once; None for graphs
    that keep no state.
    """

    neighbours: float
    workers: float
    prefix: float | None


@dataclass(frozen=True)
class VariantParity:
    """One variant's numbers, the tolerance they were held against, the verdict, and what a failing one suffers from.

    before: the drift without the variant's recalibration; None where it has none. sensitivity: by part of the network, the
    mean largest change of a calibration text's probabilities when that part alone is quantized; None where no formats were
    searched.
    """

    drift: Drift
    invariance: Invariance
    tolerance: Tolerance
    verdict: Verdict
    before: Drift | None = None
    sensitivity: Mapping[str, float] | None = None
    diagnosis: str | None = None


@dataclass(frozen=True)
class Certificate:
    """The whole of `parity.json`.

    tokenization: our token ids against the Hugging Face tokenizer's; None where that was not asked for or transformers was
    not needed (stored reference logits).
    """

    reference: ReferenceInfo
    environment: Mapping[str, object]
    variants: Mapping[str, VariantParity]
    tokenization: TokenizationEquality | None = None

    def searched(self, sensitivities: Mapping[str, Mapping[str, float] | None]) -> Certificate:
        """The same with what recipe searches measured, by variant."""
        variants = {
            name: replace(parity, sensitivity=sensitivities.get(name)) for name, parity in self.variants.items()
        }
        return replace(self, variants=variants)

    def to_json(self) -> bytes:
        """UTF-8 JSON, two spaces."""
        document = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def parse_certificate(raw: bytes) -> Certificate:
    """The bytes of `parity.json`, strictly; BundleError names the first thing that is wrong."""
    try:
        document = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{CERTIFICATE_NAME} is not JSON: {error}") from error
    keys = {"schema_version", "reference", "environment", "variants", "tokenization"}
    if not isinstance(document, dict) or document.keys() != keys or document["schema_version"] != SCHEMA_VERSION:
        raise BundleError(f"{CERTIFICATE_NAME} is no certificate of schema {SCHEMA_VERSION}; it needs {sorted(keys)}")
    environment, variants, tokenization = (document[key] for key in ("environment", "variants", "tokenization"))
    if not isinstance(environment, dict) or not isinstance(variants, dict):
        raise BundleError(f"{CERTIFICATE_NAME}: environment and variants must be objects")
    return Certificate(
        reference=parse_as(ReferenceInfo, document["reference"], "reference"),
        environment=environment,
        variants={name: parse_as(VariantParity, value, f"variants[{name!r}]") for name, value in variants.items()},
        tokenization=None if tokenization is None else parse_as(TokenizationEquality, tokenization, "tokenization"),
    )


def environment(threads: int) -> dict[str, object]:
    """Where numbers were made: versions, CPU and the flags that pick int8 kernels."""
    return {
        "samescore": metadata.version("samescore"),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "tokenizers": metadata.version("tokenizers"),
        "onnxruntime": _onnxruntime_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "int8_flags": list(int8_flags()),
        "threads": threads,
    }


def parity_table(variants: Mapping[str, VariantParity]) -> str:
    """A table for people: one row per variant, and a line for each number that failed."""
    numbers = f"{'max |Δp|':>10}{'p99 |Δp|':>10}{'mean |Δp|':>11}{'KLD':>9}"
    lines = [f"{'variant':<15}{'texts':>6}{numbers}{'same label':>20}{'noise':>7}  gate"]
    for name, parity in variants.items():
        d = parity.drift
        agreement = f"{d.agreement:.2%} ≥ {d.agreement_low:.2%}"
        noise = f"{d.noise_ratio:.2f}" if d.noise_ratio is not None else "–"
        kld = f"{d.kld:.1e}" if d.kld is not None else "–"
        lines.append(
            f"{name:<15}{d.texts:>6}{d.max_abs_dp:>10.1e}{d.p99_abs_dp:>10.1e}{d.mean_abs_dp:>11.1e}{kld:>9}"
            f"{agreement:>20}{noise:>7}  {parity.verdict.outcome}"
        )
        lines.extend(f"  {line}" for line in (*parity.verdict.failures, *parity.verdict.notes))
        if parity.diagnosis is not None:
            lines.append(f"  diagnosis: {parity.diagnosis}")
    return "\n".join(lines)


def tokenization_line(tokenization: TokenizationEquality | None) -> str | None:
    """One line on the comparison of token ids, or None where there was none."""
    if tokenization is None:
        return None
    if tokenization.different == 0:
        return f"token ids: as transformers' on {tokenization.texts} strings"
    return f"token ids: FAIL, {tokenization.different} of {tokenization.texts} strings differ from transformers'\n" + (
        f"  diagnosis: {tokenization.first_difference}"
    )


TABLE_LEGEND = (
    "Δp: largest difference of a text's probabilities from the PyTorch float32 reference. same label: share of texts, "
    "and its 95 % lower bound. noise: mean Δp over that of the reference's own bfloat16 run."
)


def _onnxruntime_version() -> str:
    from samescore.runtime.providers import import_onnxruntime

    return str(import_onnxruntime().__version__)
