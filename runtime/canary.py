"""The start-up canary: a few golden texts scored on this box, held against what the bundle said where it was certified.

`canary.json`, lossless (logits are `float.hex()` of float32):

    {"schema_version": 1,
     "texts": [{"input_ids": [0, …], "reference": ["0x1.8p+0", …]}, …],
     "variants": {"cpu-int8": {"logits": [["0x1.8p+0", …], …], "allowed_max": 0.02, "allowed_mean": 0.001, "gate_max": 0.05,
                               "environment": {"provider": "cpu", "onnxruntime": "1.31.1", "cpu": "…", "int8_flags": […]}}}}
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import Bundle
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.errors import BundleError, CanaryError, UsageError, did_you_mean
from samescore.runtime.manifest import Activation, parse_as
from samescore.runtime.padded import PaddedReader
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.prefill import Reader
from samescore.runtime.providers import import_onnxruntime

log = logging.getLogger(__name__)

CANARY_NAME = "canary.json"
SCHEMA_VERSION = 1
BUDGET_SECONDS = 2.0
# Fewer texts than this prove nothing.
LEAST_TEXTS = 4

Policy = Literal["flag", "refuse", "off"]
Status = Literal["passed", "tripped", "skipped"]


@dataclass(frozen=True)
class Environment:
    """What decides which kernels run. int8_flags: those of `cpu.INT8_FLAGS` that the CPU has."""

    provider: str
    onnxruntime: str
    cpu: str
    int8_flags: tuple[str, ...]


@dataclass(frozen=True)
class CanaryText:
    """Token ids [sequence] and the reference's logits [labels] as `float.hex()`."""

    input_ids: tuple[int, ...]
    reference: tuple[str, ...]


@dataclass(frozen=True)
class VariantCanary:
    """A variant's logits [texts][labels] as `float.hex()`, measured in `environment`.

    allowed_max, allowed_mean: by how much the probabilities of one text, and of all on average, may differ from these on
    another box with the same provider. gate_max: by how much they may differ from the reference's on another provider, whose
    kernels round otherwise everywhere.
    """

    logits: tuple[tuple[str, ...], ...]
    allowed_max: float
    allowed_mean: float
    gate_max: float
    environment: Environment


@dataclass(frozen=True)
class Canary:
    """The whole of `canary.json`."""

    schema_version: int
    texts: tuple[CanaryText, ...]
    variants: Mapping[str, VariantCanary]


@dataclass(frozen=True)
class CanaryResult:
    """What the canary found when the bundle was loaded.

    texts: how many were scored. max_moved, mean_moved: the largest difference of a text's probabilities from the certified
    ones, over texts; max_abs_dp: from the PyTorch reference (None when nothing was scored). reason: what differs or was found,
    in words. seconds: what it took.
    """

    status: Status
    texts: int
    max_moved: float | None
    mean_moved: float | None
    max_abs_dp: float | None
    reason: str
    seconds: float


def here(provider: str) -> Environment:
    """The environment of this process with that provider."""
    return Environment(provider, str(import_onnxruntime().__version__), cpu_model(), int8_flags())


def check_policy(policy: str) -> None:
    """UsageError unless it is a policy."""
    if policy not in get_args(Policy):
        known = get_args(Policy)
        raise UsageError(
            f"unknown canary policy {policy!r}; policies are {', '.join(known)}.{did_you_mean(policy, known)}"
        )


def read_canary(bundle: Bundle, variant: str) -> Canary:
    """The bundle's canary, checked; BundleError when there is none for the variant."""
    if CANARY_NAME not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.path} holds no {CANARY_NAME}: export it again, or load it with canary='off' (--canary off)"
        )
    try:
        document = json.loads(bundle.read(CANARY_NAME))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{CANARY_NAME} is not JSON: {error}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise BundleError(f"{CANARY_NAME} has schema version {version!r}; this samescore reads {SCHEMA_VERSION}")
    canary = parse_as(Canary, document, CANARY_NAME)
    if variant not in canary.variants:
        raise BundleError(f"{CANARY_NAME} knows no variant {variant!r}; it knows: {', '.join(canary.variants)}")
    rows = [*(text.reference for text in canary.texts), *canary.variants[variant].logits]
    if len(rows) != 2 * len(canary.texts) or any(len(row) != len(bundle.manifest.labels) for row in rows):
        raise BundleError(f"{CANARY_NAME}: {variant} needs a row of {len(bundle.manifest.labels)} logits for each text")
    if not canary.texts or not all(text.input_ids and min(text.input_ids) >= 0 for text in canary.texts):
        raise BundleError(f"{CANARY_NAME}: needs texts, each with token ids")
    return canary


def check_canary(
    canary: Canary | None,
    variant: str,
    reader: Reader,
    activation: Activation,
    *,
    policy: Policy,
) -> CanaryResult:
    """Hold this session against the certified numbers, as far as the policy asks for it (None: `off`).

    `flag` scores the texts only where the environment is not the certified one (and always on GPUs, whose model and driver are no
    part of it), and warns; `refuse` always does and raises CanaryError when the canary trips.
    Texts run one by one, under `flag` until BUDGET_SECONDS are over, or all in padded batches where texts are scored so; the
    first one also warms up, outside that time.
    """
    if canary is None:
        return CanaryResult("skipped", 0, None, None, None, "canary='off'", 0.0)
    certified = canary.variants[variant]
    differs = _differences(certified.environment, here(reader.session.target))
    if policy == "flag" and not differs and reader.session.target == "cpu":
        log.debug("canary of %s not needed: this is the environment it was certified in", variant)
        return CanaryResult("skipped", 0, None, None, None, "the environment is the certified one", 0.0)
    seconds = math.inf if policy == "refuse" else BUDGET_SECONDS
    result = _score(canary, certified, reader, activation, differs or "nothing known", seconds)
    if policy == "refuse" and result.status != "passed":
        _refuse(variant, result)
    said = "canary of %s %s: %s"
    log.log(
        logging.WARNING if result.status == "tripped" else logging.INFO, said, variant, result.status, result.reason
    )
    return result


def _refuse(variant: str, result: CanaryResult) -> NoReturn:
    raise CanaryError(f"canary of {variant} {result.status}, and nothing is scored: {result.reason}")


def _score(
    canary: Canary,
    certified: VariantCanary,
    reader: Reader,
    activation: Activation,
    differs: str,
    budget: float,
) -> CanaryResult:
    fits = [i for i, text in enumerate(canary.texts) if reader.longest is None or len(text.input_ids) <= reader.longest]
    if not fits:
        return CanaryResult("skipped", 0, None, None, None, f"every text has more than {reader.longest} tokens", 0.0)
    texts = [canary.texts[i] for i in fits]
    rows, seconds = _read(texts, reader, budget)
    p = probabilities_of(np.stack(rows), activation)
    by_text = _largest(p - _probabilities([certified.logits[i] for i in fits[: len(rows)]], activation))
    moved, mean = float(by_text.max()), float(by_text.mean())
    drift = float(_largest(p - _probabilities([text.reference for text in texts[: len(rows)]], activation)).max())
    counted = f"{len(rows)} of {len(texts)} texts in {seconds:.1f} s"
    numbers = (moved, mean, drift)
    elsewhere = certified.environment.provider != reader.session.target
    if elsewhere and not drift <= certified.gate_max:
        reason = (
            f"over {counted} probabilities are up to {drift:.1e} from PyTorch's (allowed {certified.gate_max:.0e}). What differs "
            f"from where the bundle was certified: {differs}. See every number with: samescore verify BUNDLE"
        )
        return CanaryResult("tripped", len(rows), *numbers, reason, seconds)
    if not elsewhere and (moved > certified.allowed_max or mean > certified.allowed_mean):
        reason = (
            f"over {counted} probabilities moved by up to {moved:.1e}, {mean:.1e} on average, from where the bundle was "
            f"certified (allowed {certified.allowed_max:.0e} and {certified.allowed_mean:.0e}) and are up to {drift:.1e} from "
            f"PyTorch's. What differs from there: {differs}. See every number with: samescore verify BUNDLE"
        )
        return CanaryResult("tripped", len(rows), *numbers, reason, seconds)
    if len(rows) < min(LEAST_TEXTS, len(texts)):
        reason = (
            f"only {counted}; what differs from where it was certified: {differs}. Check with: samescore verify BUNDLE"
        )
        return CanaryResult("skipped", len(rows), *numbers, reason, seconds)
    reason = f"over {counted} probabilities moved by at most {moved:.1e}; what differs from where it was certified: {differs}"
    return CanaryResult("passed", len(rows), *numbers, reason, seconds)


def _read(texts: Sequence[CanaryText], reader: Reader, budget: float) -> tuple[list[npt.NDArray[np.float32]], float]:
    """Logits [labels] of each text, as scoring reads them: together in padded batches, or one by one while there is time; and
    the seconds it took.
    """
    sequences = [np.array(text.input_ids, np.int64) for text in texts]
    reader.logits(sequences[0])
    started = time.monotonic()
    rows: list[npt.NDArray[np.float32]] = []
    if isinstance(reader, PaddedReader):
        rows = reader.read(sequences)
    else:
        for ids in sequences:
            rows.append(reader.logits(ids))
            if time.monotonic() - started > budget:
                break
    return rows, time.monotonic() - started


def _probabilities(logits: Sequence[Sequence[str]], activation: Activation) -> npt.NDArray[np.float64]:
    try:
        rows = np.array([[float.fromhex(value) for value in row] for row in logits])
    except (ValueError, OverflowError) as error:
        raise BundleError(f"{CANARY_NAME}: a logit is not a hexadecimal float: {error}") from error
    return probabilities_of(rows, activation)


def _largest(differences: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each text's largest magnitude of [texts, labels]; infinite where a logit is not finite."""
    return np.where(np.isfinite(differences).all(axis=1), np.abs(differences).max(axis=1), np.inf)


def _differences(there: Environment, now: Environment) -> str:
    """What is not as it was, in words; empty when nothing is."""
    found = []
    for name, old, new in (
        ("provider", there.provider, now.provider),
        ("ONNX Runtime", there.onnxruntime, now.onnxruntime),
        ("CPU", there.cpu, now.cpu),
        ("int8 instruction sets", ", ".join(there.int8_flags) or "none", ", ".join(now.int8_flags) or "none"),
    ):
        if old != new:
            found.append(f"{name} {new} (was {old})")
    return "; ".join(found)
