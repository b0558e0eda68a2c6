"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, and a seeded draw.

The steps come in the order in which transformers applies them, and each is defined as there:

    logits → repetition, presence and frequency penalty → / temperature → top-k → top-p → min-p → softmax → draw

Log probabilities that are reported are those of the model itself: the softmax of the logits before any of these steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import GenerationError, UsageError, did_you_mean

Logits = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]

MAX_TOKENS = 512
MOST_LOGPROBS = 100
# Candidates looked at first for top-p: sorting a whole vocabulary of 248,000 takes as long as a step of a small model.
FIRST_CANDIDATES = 512


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop. UsageError names a value that is out of its range.

    temperature: 0 takes the most probable token (greedy) and ignores top_k, top_p, min_p and seed. top_k: 0 is off. top_p: 1
    is off. min_p: 0 is off. repetition_penalty: 1 is off; over the prompt and the answer. presence_penalty and
    frequency_penalty: 0 is off; over the answer. seed: None draws one; the same seed gives the same tokens, for each prompt
    alone. max_tokens: the most tokens of an answer. stop: strings that end the answer and are not part of its text.
    logprobs: None, or how many of the most probable tokens to report beside each chosen one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = MAX_TOKENS
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (holds, wanted) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            whole = name in ("top_k", "seed", "max_tokens", "logprobs")
            number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not holds(value):
                raise UsageError(f"{name} must be {wanted}, got {value!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be a list of non-empty strings, got {self.stop!r}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda value: 0 <= value <= 100, "a number from 0 (greedy) to 100"),
    "top_k": (lambda value: value >= 0, "a whole number, 0 (off) or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1 (off)"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 (off) to 1"),
    "repetition_penalty": (lambda value: 0 < value <= 100, "a number above 0, at most 100; 1 is off"),
    "presence_penalty": (lambda value: -100 <= value <= 100, "a number from -100 to 100; 0 is off"),
    "frequency_penalty": (lambda value: -100 <= value <= 100, "a number from -100 to 100; 0 is off"),
    "seed": (lambda value: value >= 0, "a whole number, 0 or more"),
    "max_tokens": (lambda value: value >= 1, "a whole number, 1 or more"),
    "logprobs": (lambda value: 0 <= value <= MOST_LOGPROBS, f"a whole number from 0 to {MOST_LOGPROBS}"),
}
# What generation_config.json may set, and how a caller names it here.
_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def sampling_from(defaults: Mapping[str, float], options: Mapping[str, Any]) -> Sampling:
    """The checkpoint's generation defaults with a caller's options over them.

    defaults: of generation_config.json; where its `do_sample` is not 1, the answer is greedy unless the caller names a
    temperature, as in transformers. What neither names is off. UsageError for an unknown option or a bad value.
    """
    known = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in known:
            raise UsageError(
                f"unknown sampling option {name!r}; there are: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    values: dict[str, Any] = {name: defaults[name] for name in _DEFAULTS if name in defaults}
    values["temperature"] = values.get("temperature", 1.0) if defaults.get("do_sample") == 1 else 0.0
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    elif isinstance(given.get("stop"), Sequence):
        given["stop"] = tuple(given["stop"])
    return replace(Sampling(), **{**values, **given})


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log probability (natural logarithm), and the most probable tokens at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one answer. prompt: its token ids, which the repetition penalty counts."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | npt.NDArray[np.int64]):
        self.sampling = sampling
        self._seen = set(map(int, prompt)) if sampling.repetition_penalty != 1 else set()
        self._counts: Counter[int] = Counter()
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Logits) -> int:
        """The next token's id from logits float32 [vocabulary]; GenerationError when they are no numbers."""
        if not np.isfinite(logits).all():
            raise GenerationError(
                "the model's logits are not finite numbers (NaN or infinity): the variant overflows on this prompt. Try "
                "another variant, cpu-fp32 above all, and check the bundle: samescore verify BUNDLE"
            )
        scores = self._penalized(logits)
        token = int(scores.argmax()) if self.sampling.greedy else self._draw(scores)
        self._counts[token] += 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _draw(self, scores: Logits | Scores) -> int:
        ids, log_odds = candidates(scores, self.sampling)
        cumulative = np.cumsum(np.exp(log_odds - log_odds.max()))
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def _penalized(self, logits: Logits) -> Logits | Scores:
        s = self.sampling
        counting = s.presence_penalty != 0 or s.frequency_penalty != 0
        if s.repetition_penalty == 1 and not counting:
            return logits
        scores: Scores = logits.astype(np.float64)
        penalize_repetition(scores, self._seen, s.repetition_penalty)
        if counting and self._counts:
            ids = np.fromiter(self._counts, np.int64)
            scores[ids] -= s.presence_penalty + s.frequency_penalty * np.fromiter(self._counts.values(), np.float64)
        return scores


def penalize_repetition(scores: Scores, seen: set[int], penalty: float) -> None:
    """Divide positive scores [vocabulary] of seen tokens by the penalty and multiply negative ones by it, in place.

    CTRL (Keskar et al. 2019, arXiv:1909.05858, section 4.1), for negative scores as transformers'
    RepetitionPenaltyLogitsProcessor. Ids beyond the vocabulary are left out.
    """
    if penalty == 1:
        return
    ids = np.array(sorted(token for token in seen if token < len(scores)), np.int64)
    chosen = scores[ids]
    scores[ids] = np.where(chosen < 0, chosen * penalty, chosen / penalty)


def candidates(scores: Logits | Scores, sampling: Sampling) -> tuple[npt.NDArray[np.int64], Scores]:
    """The tokens that top-k, top-p and min-p leave of scores [vocabulary]: their ids and scores / temperature.

    top-k: the k largest, and those that equal the last of them (TopKLogitsWarper). top-p: the fewest most probable tokens
    whose probabilities reach top_p (Holtzman et al. 2020, arXiv:1904.09751; TopPLogitsWarper). min-p: tokens of at least
    min_p times the largest probability (Nguyen et al. 2024, arXiv:2407.01082; MinPLogitsWarper). At least one is left.
    """
    scaled: Scores = np.asarray(scores, np.float64) / sampling.temperature
    ids = np.arange(len(scaled), dtype=np.int64)
    if 0 < sampling.top_k < len(scaled):
        least = np.partition(scaled, len(scaled) - sampling.top_k)[len(scaled) - sampling.top_k]
        ids = np.flatnonzero(scaled >= least)
    largest = scaled.max()
    total = float(np.exp(scaled[ids] - largest).sum())
    if sampling.min_p > 0:
        # Ratios of probabilities do not change by top-p, so this may come first: it leaves less to sort.
        ids = ids[scaled[ids] >= largest + math.log(sampling.min_p)]
    if sampling.top_p < 1:
        ids = _nucleus(scaled - largest, ids, sampling.top_p * total)
    return ids, scaled[ids]


def _nucleus(log_odds: Scores, ids: npt.NDArray[np.int64], mass: float) -> npt.NDArray[np.int64]:
    """The fewest of the tokens `ids`, best first, whose odds exp(log_odds) reach `mass`; all where they do not."""
    count = min(FIRST_CANDIDATES, len(ids))
    while True:
        chosen = ids[np.argpartition(-log_odds[ids], count - 1)[:count]]
        chosen = chosen[np.argsort(-log_odds[chosen], kind="stable")]
        reached = np.cumsum(np.exp(log_odds[chosen]))
        if reached[-1] >= mass or count == len(ids):
            # A token stays while those before it have not reached the mass.
            return chosen[: int(np.searchsorted(reached, mass, side="left")) + 1]
        count = min(count * 8, len(ids))


def logprob_of(logits: Logits, token: int, top: int) -> TokenLogprob:
    """Log softmax in float64 of logits float32 [vocabulary]: the token's, and those of the `top` most probable tokens."""
    scores = logits.astype(np.float64)
    largest = scores.max()
    normalizer = largest + math.log(np.exp(scores - largest).sum())
    best = np.argpartition(-scores, min(top, len(scores)) - 1)[:top] if top else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -scores[best]))]
    return TokenLogprob(
        token, float(scores[token] - normalizer), tuple((int(i), float(scores[i] - normalizer)) for i in best)
    )
