"""What each part of a network loses to each number format: the sensitivity that a recipe search goes by.

calibration texts ─ stage by stage ─┬→ float logits
                                    └→ logits with one part in one format, for each part and format
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from samescore.calibrate.generation_metrics import divergences
from samescore.calibrate.progress import Reporter
from samescore.calibrate.spent import Spent, expected_disagreement
from samescore.calibrate.stages import Flow, exact_recipe, run_stage, stage_session, stages_of
from samescore.export.build import architecture_of
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import NumberFormat, Recipe
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.prefill import Ids

FloatArray = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
S = TypeVar("S")
Statistics = Mapping[str, ChannelStatistics]
Key = tuple[str, NumberFormat]


class Effects(ABC, Generic[S]):
    """What each part does to every calibration text in each format but the finest, which does nothing.

    changed: by part and format, one entry per text [texts, …]: whatever of a text's logits the predictions need. S: what a
    recipe is said to spend.
    """

    def __init__(self) -> None:
        self.changed: dict[Key, npt.NDArray[Any]] = {}

    @abstractmethod
    def add(self, key: Key, logits: Logits) -> None:
        """Take in the logits float32 [texts, labels] with one part in one format."""

    @abstractmethod
    def error(self, part: str, number_format: NumberFormat) -> float:
        """How much it is off; errors of several parts add up."""

    @abstractmethod
    def predicted(self, formats: Mapping[str, NumberFormat]) -> S:
        """What these parts in these formats leave together, taken as independent of each other."""

    @abstractmethod
    def _seen(self, key: Key) -> float:
        """The mean over texts of what a person looks at."""

    def sensitivity(self, recipe: Recipe) -> dict[str, float]:
        """The mean change of a text when a part alone is in the recipe's own format, by part."""
        return {part: self._seen((part, own)) for part, own in self.changed if own == recipe.options(part)[0]}


class LabelEffects(Effects[Spent]):
    """Of a classifier: changes of its labels' probabilities. logits: float32 [texts, labels] with nothing quantized."""

    def __init__(self, logits: Logits, activation: Activation):
        super().__init__()
        self.logits, self.activation = logits, activation

    def add(self, key: Key, logits: Logits) -> None:
        """See Effects."""
        self.changed[key] = logits

    def of(self, part: str, number_format: NumberFormat) -> FloatArray:
        """What it does to the probabilities, float64 [texts, labels]."""
        p = probabilities_of(self.logits, self.activation)
        return probabilities_of(self.changed.get((part, number_format), self.logits), self.activation) - p

    def error(self, part: str, number_format: NumberFormat) -> float:
        """The mean squared change of a probability."""
        return float(np.square(self.of(part, number_format)).mean())

    def predicted(self, formats: Mapping[str, NumberFormat]) -> Spent:
        """Squares of changes are added, of probabilities and of logits."""
        dp = np.sqrt(sum(np.square(self.of(*key)) for key in formats.items()))
        exact = self.logits.astype(np.float64)
        changes = np.sqrt(sum(np.square(self.changed.get(key, exact) - exact) for key in formats.items()))
        return Spent.moved(dp.max(axis=1), expected_disagreement(exact, changes, self.activation))

    def _seen(self, key: Key) -> float:
        return float(np.abs(self.of(*key)).max(axis=1).mean())


class TokenEffects(Effects[float]):
    """Of a language model: the Kullback-Leibler divergence of the next token's distribution, by text, in nats.

    It is quadratic in small changes of the logits, so that those of independent parts add up.
    """

    def __init__(self, logits: Logits, activation: Activation = "softmax"):
        super().__init__()
        self.logits = logits

    def add(self, key: Key, logits: Logits) -> None:
        """See Effects; the logits themselves would be too many to keep."""
        self.changed[key] = divergences(self.logits, logits)

    def error(self, part: str, number_format: NumberFormat) -> float:
        """The mean divergence."""
        found = self.changed.get((part, number_format))
        return 0.0 if found is None else float(found.mean())

    def predicted(self, formats: Mapping[str, NumberFormat]) -> float:
        """The mean divergence, all parts' added."""
        return sum(self.error(*key) for key in formats.items())

    def _seen(self, key: Key) -> float:
        return self.error(*key)


def parts_of(checkpoint: Checkpoint) -> list[str]:
    """What a recipe may choose a format for, in the network's order; UsageError without a hand-built graph."""
    architecture = architecture_of(checkpoint)
    if architecture is None:
        raise UsageError(f"{checkpoint.architecture} has no hand-built graph, so nothing to choose a budget for")
    return [part for stage in architecture.parts(checkpoint) for part in stage]


def part_effects(
    checkpoint: Checkpoint,
    recipe: Recipe,
    input_ids: Sequence[Ids],
    statistics: Statistics | None,
    effects_of: Callable[[Logits, Activation], Effects[S]],
    *,
    max_tokens: int | None = None,
    workspace: Path | None = None,
    report: Reporter,
) -> Effects[S]:
    """What each part does to every text (ids int64 [sequence], none longer than max_tokens) in each format but the finest.

    effects_of: makes what takes them in, of the logits with nothing quantized. A changed text goes on through the float later
    stages, so each stage is built once in float and once per part and format.
    """
    architecture = architecture_of(checkpoint)
    assert architecture is not None
    by_stage = architecture.parts(checkpoint)
    in_float = float_recipe(recipe)
    clean: list[Flow] = [ids[None, :] for ids in input_ids]
    changed: dict[Key, list[Flow]] = {}
    found: Effects[S] | None = None
    stages = stages_of(checkpoint)
    total = sum(len(recipe.options(part)) - 1 for stage in by_stage for part in stage)
    with report(f"effect of each part on {len(input_ids)} calibration texts", total) as tick:
        for stage, here in zip(stages, by_stage, strict=True):
            after: dict[Key, list[Flow]] = {}
            with stage_session(checkpoint, exact_recipe(), stage, workspace) as session:
                untouched = run_stage(session, clean)
                if stage == stages[-1]:
                    found = effects_of(_rows(untouched), checkpoint.activation)
                for key, values in changed.items():
                    _keep(after, found, key, run_stage(session, values))
            for key in [(part, option) for part in here for option in recipe.options(part)[:-1]]:
                only = in_float.choosing(dict([key]))
                with stage_session(
                    checkpoint, only, stage, workspace, statistics=statistics, max_tokens=max_tokens
                ) as session:
                    _keep(after, found, key, run_stage(session, clean))
                tick()
            clean, changed = untouched, after
    assert found is not None
    return found


def _keep(after: dict[Key, list[Flow]], found: Effects[S] | None, key: Key, values: list[Flow]) -> None:
    """What goes on to the next stage, or has come to its end: a vocabulary's logits are too many for all keys at once."""
    if found is None:
        after[key] = values
    else:
        found.add(key, _rows(values))


def float_recipe(recipe: Recipe) -> Recipe:
    """The recipe with nothing quantized and no state."""
    return replace(recipe, linear="float16" if recipe.half else "float32", embedding="float32", state=False)


def _rows(values: Sequence[Flow]) -> npt.NDArray[np.float32]:
    return np.concatenate(values).astype(np.float32)
