"""Which golden texts a bundle checks itself with at load, and what it certified for them: the making of `canary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.golden import GoldenSet
from samescore.runtime.canary import LEAST_TEXTS, SCHEMA_VERSION, Canary, CanaryText, VariantCanary, here
from samescore.runtime.manifest import Activation, Target, Variant
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.prefill import Ids

# At most so many texts, and so many tokens in all beyond what is read once: a canary is to take no time.
TEXTS, TOKENS = 32, 2048
# Probabilities may move by the gate's p99 between boxes, and on average by a share of that: other kernels round otherwise in a
# few places, a broken one everywhere. Saturating int8 products moved them by 2.2e-3 on average, other CPUs' exact ones by less
# than 1e-5. float32 sums in another order are not a fault.
MEAN_SHARE, LEAST_MEAN = 0.05, 5e-6


def canary_json(
    golden: GoldenSet,
    variants: Sequence[Variant],
    logits: Mapping[str, npt.NDArray[np.float32]],
    *,
    activation: Activation,
    prefix: Ids,
    certified_on: Mapping[str, Target] | None = None,
) -> bytes:
    """`canary.json` of variants measured on this box, as UTF-8 JSON.

    golden: with ids and reference logits. variants: as in the manifest. logits: each one's by its name, float32
    [texts, labels]. prefix: ids that the bundle's texts begin with. certified_on: where, by a variant's name (default: cpu).
    """
    chosen = choose_texts(golden, activation, prefix)
    texts = [golden.texts[index] for index in chosen]
    canary = Canary(
        SCHEMA_VERSION,
        tuple(CanaryText(tuple(map(int, text.input_ids)), _hex(text.logits)) for text in texts),  # type: ignore[arg-type]
        {
            variant.name: VariantCanary(
                logits=tuple(_hex(logits[variant.name][index]) for index in chosen),
                allowed_max=TOLERANCES[variant.precision].p99_abs_dp,
                allowed_mean=max(MEAN_SHARE * TOLERANCES[variant.precision].p99_abs_dp, LEAST_MEAN),
                gate_max=TOLERANCES[variant.precision].max_abs_dp,
                environment=here((certified_on or {}).get(variant.name, "cpu")),
            )
            for variant in variants
        },
    )
    return (json.dumps(asdict(canary), ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def choose_texts(golden: GoldenSet, activation: Activation, prefix: Ids) -> list[int]:
    """Indices of short texts of every label and of near and clear decisions, so mixed that the first few are a sample too."""
    sequences = golden.input_ids()
    size = len(prefix)
    own = np.array([len(ids) - (size if np.array_equal(ids[:size], prefix) else 0) for ids in sequences])
    p = probabilities_of(golden.logits(), activation)
    ranked = np.sort(p, axis=1)
    margins = ranked[:, -1] - ranked[:, -2] if p.shape[1] > 1 else p[:, 0]
    order = np.argsort(own, kind="stable")[:TEXTS]
    count = max(min(LEAST_TEXTS, len(order)), int(np.sum(np.cumsum(own[order]) <= TOKENS)))
    short = own <= TOKENS // TEXTS
    short[order[:count]] = True
    label = p.argmax(axis=1)
    by_label = [
        sorted(np.flatnonzero(short & (label == k)), key=lambda i: margins[i]) for k in sorted(set(label[short]))
    ]
    queues = [_spread(indices) for indices in by_label]
    mixed = [int(queue[turn]) for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return mixed[:TEXTS]


def _spread(indices: list[np.intp]) -> list[np.intp]:
    """At most TEXTS of them, evenly spread, in an order whose beginning is spread too (bits of the place reversed)."""
    places = np.unique(np.linspace(0, len(indices) - 1, min(TEXTS, len(indices))).astype(int))
    order = sorted(range(len(places)), key=lambda place: f"{place:032b}"[::-1])
    return [indices[places[place]] for place in order]


def _hex(row: npt.NDArray[np.float32]) -> tuple[str, ...]:
    return tuple(float(value).hex() for value in row)
