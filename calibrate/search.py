"""The recipe search: which parts of a network get finer number formats, so that a variant stays inside a budget.

    calibration texts → recipe as it is, built and measured ─ inside → nothing to choose
                                                            └ outside → effects → frontier → as few steps as the prediction
                                                              allows → built, measured → more or fewer → recipe

How far the prediction is from what a built variant does is learned from building it. Nothing here needs PyTorch, no golden
text is looked at (the budget is held against our own float32 graph), and no chance is involved.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from samescore.calibrate.activations import CalibrationRun
from samescore.calibrate.certify import score_all
from samescore.calibrate.effects import Effects, Logits, part_effects, parts_of
from samescore.calibrate.frontier import make_frontier, weights_of
from samescore.calibrate.reference import Reporter
from samescore.calibrate.stages import read_model
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.recipes import NumberFormat, Recipe
from samescore.runtime.errors import GateError
from samescore.runtime.manifest import Activation
from samescore.runtime.prefill import Ids, Reader
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

# Variants that are built to find how many steps are needed.
BUILDS = 8
# Multiplications that measuring the parts' effects may take (some ten minutes on two cores), and how many texts at least and
# at most.
EFFECT_WORK, EFFECT_TEXTS = 3e13, (4, 128)
# Every part's changed hidden states of all these texts are in memory at once: long texts are cut, and bytes are counted.
EFFECT_TOKENS, EFFECT_BYTES = 512, 2e9


S = TypeVar("S")


class Limit(Protocol[S]):
    """How much a recipe may spend, and how that is measured: `Budget` of classifiers, `TokenBudget` of language models."""

    def over(self, texts: int) -> Limit[S]:
        """The same for so many calibration texts."""

    def spent(self, reference: Logits, logits: Logits, activation: Activation) -> S:
        """What a built recipe's logits [texts, labels] spend."""

    def excess(self, spent: S) -> float:
        """The largest number over its limit; at most 1 when all are inside."""

    def effects(self, logits: Logits, activation: Activation) -> Effects[S]:
        """What takes in the effects of parts, of the logits with nothing quantized."""

    def said(self, spent: S) -> str:
        """In words."""


@dataclass(frozen=True)
class Choice(Generic[S]):
    """The parts that get another format, and what that is worth on the calibration texts.

    time: of all products over that of the recipe as it is, by the table of `frontier`. sensitivity: by part, the mean change
    of a text's probabilities when that part alone is quantized; None where nothing had to be chosen.
    """

    formats: Mapping[str, NumberFormat]
    time: float
    spent: S
    sensitivity: Mapping[str, float] | None


def search(
    checkpoint: Checkpoint,
    recipe: Recipe,
    budget: Limit[S],
    input_ids: Sequence[Ids],
    run: CalibrationRun,
    *,
    max_tokens: int,
    prefix: Ids | None,
    workspace: Path | None = None,
    report: Reporter,
) -> Choice[S]:
    """The cheapest formats with which the recipe stays inside the budget on the calibration texts.

    input_ids: int64 [sequence] of each text. run: of the float32 graph over them. prefix: what all begin with
    (`TextEncoder.prefix_ids`). GateError when even the finest formats are not enough; UsageError for an architecture without
    parts.
    """
    budget = budget.over(len(input_ids))
    trials = _Trials(checkpoint, recipe, budget, input_ids, run, max_tokens, prefix, workspace)
    with report(f"the recipe as it is on {len(input_ids)} calibration texts"):
        plain = trials.measure({})
    if budget.excess(plain) <= 1:
        return Choice({}, 1.0, plain, None)
    chosen = effect_texts(checkpoint, recipe, input_ids)
    effects = part_effects(
        checkpoint,
        recipe,
        chosen,
        run.statistics,
        budget.effects,
        max_tokens=max_tokens,
        workspace=workspace,
        report=report,
    )
    frontier = make_frontier(checkpoint, recipe, effects)
    with report("searching for formats inside the budget", BUILDS) as tick:
        count, spent = fewest(
            frontier.predicted,
            lambda kept: trials.measure(frontier.choices(kept)),
            len(frontier.steps),
            budget,
            tick,
            plain,
        )
    return Choice(frontier.choices(count), frontier.time(count), spent, effects.sensitivity(recipe))


def effect_texts(checkpoint: Checkpoint, recipe: Recipe, input_ids: Sequence[Ids]) -> list[Ids]:
    """The beginnings of every so manieth calibration text, as many as EFFECT_WORK and EFFECT_BYTES allow."""
    parts = parts_of(checkpoint)
    changes = sum(len(recipe.options(part)) - 1 for part in parts)
    weights = sum(weights_of(checkpoint, part) for part in parts if "embed" not in part)
    cut = [ids[:EFFECT_TOKENS] for ids in input_ids]
    tokens = sum(map(len, cut)) / len(cut)
    # A changed text runs through half the stages on average; it is there before and after one.
    work = changes / 2 * weights * tokens
    size = changes * 2 * tokens * int(checkpoint.config["hidden_size"]) * 4
    least, most = EFFECT_TEXTS
    count = min(max(int(min(EFFECT_WORK / work, EFFECT_BYTES / size)), least), most)
    step = max(1, len(cut) // count)
    return cut[::step][:count]


def fewest(
    predict: Callable[[int], S],
    try_out: Callable[[int], S],
    steps: int,
    budget: Limit[S],
    tick: Callable[[], None],
    plain: S,
) -> tuple[int, S]:
    """The smallest number of steps that are measured to be inside the budget, in at most BUILDS builds (and one of all
    steps, where none of these passed). plain: what no step leaves, which is outside.

    Starts where the prediction is inside, corrects the prediction by what was measured, and halves the gap between the
    most steps that failed and the fewest that passed. GateError when all of them fail.
    """
    low, high = 0, steps
    expected = budget.excess(predict(0))
    correction = budget.excess(plain) / expected if expected else 1.0
    best: S | None = None
    for _ in range(BUILDS):
        guess = next((k for k in range(steps + 1) if correction * budget.excess(predict(k)) <= 1), steps)
        kept = guess if low < guess < high else (low + high + 1) // 2
        spent = try_out(kept)
        tick()
        if budget.excess(spent) <= 1:
            high, best = kept, spent
        else:
            low = kept
        expected = budget.excess(predict(kept))
        correction = budget.excess(spent) / expected if expected else correction
        if high - low <= max(1, steps // 32):
            break
    if best is None:
        best, high = spent if low == steps else try_out(steps), steps
        if budget.excess(best) > 1:
            raise GateError(
                f"no choice of formats stays inside the budget: with the finest for every part, {budget.said(best)}. "
                "Nothing was written. Export cpu-fp32, or name a wider --budget"
            )
    return high, best


@dataclass(frozen=True)
class _Trials(Generic[S]):
    """Builds whole variants and measures them on the calibration texts."""

    checkpoint: Checkpoint
    recipe: Recipe
    budget: Limit[S]
    input_ids: Sequence[Ids]
    run: CalibrationRun
    max_tokens: int
    prefix: Ids | None
    workspace: Path | None

    def measure(self, formats: Mapping[str, NumberFormat]) -> S:
        """How far from float32 these parts in these formats are."""
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.workspace) as temporary:
            folder = Path(temporary)
            recipe = self.recipe.choosing(formats)
            if isinstance(self.checkpoint, Generator):
                recipe = replace(recipe, state=False)  # texts are read whole, as the reference has read them
            build_graph(self.checkpoint, recipe, folder, statistics=self.run.statistics, max_tokens=self.max_tokens)
            reader = Reader(Session(read_model(folder), "cpu", intra_op_threads=1), self.prefix)
            logits = score_all(reader, self.input_ids, workers=available_threads())
        return self.budget.spent(self.run.logits, logits, self.checkpoint.activation)
