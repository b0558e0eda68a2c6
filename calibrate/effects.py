"""What each part of a network loses to each number format: the sensitivity that a recipe search goes by.

calibration texts ─ stage by stage ─┬→ float logits
                                    └→ logits with one part in one format, for each part and format
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.reference import Reporter
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
Statistics = Mapping[str, ChannelStatistics]
Key = tuple[str, NumberFormat]


@dataclass(frozen=True)
class Effects:
    """logits float32 [texts, labels] in float, and those with one part in one format."""

    logits: npt.NDArray[np.float32]
    changed: Mapping[Key, npt.NDArray[np.float32]]
    activation: Activation

    def of(self, part: str, number_format: NumberFormat) -> FloatArray:
        """What it does to the probabilities, float64 [texts, labels]; nothing for a format that was not run (the finest)."""
        p = probabilities_of(self.logits, self.activation)
        changed = self.changed.get((part, number_format))
        return np.zeros_like(p) if changed is None else probabilities_of(changed, self.activation) - p

    def logit_change(self, part: str, number_format: NumberFormat) -> FloatArray:
        """The same of the logits."""
        changed = self.changed.get((part, number_format), self.logits)
        return changed.astype(np.float64) - self.logits

    def sensitivity(self, recipe: Recipe) -> dict[str, float]:
        """The mean largest change of a text's probabilities when a part alone is in the recipe's own format, by part."""
        return {
            part: float(np.abs(self.of(part, chosen)).max(axis=1).mean())
            for part, chosen in self.changed
            if chosen == recipe.options(part)[0]
        }


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
    *,
    max_tokens: int | None = None,
    workspace: Path | None = None,
    report: Reporter,
) -> Effects:
    """What each part does to every text (ids int64 [sequence], none longer than max_tokens) in each format but the finest.

    A changed text goes on through the float later stages, so each stage is built once in float and once per part and format.
    """
    architecture = architecture_of(checkpoint)
    assert architecture is not None
    by_stage = architecture.parts(checkpoint)
    in_float = float_recipe(recipe)
    clean: list[Flow] = [ids[None, :] for ids in input_ids]
    changed: dict[Key, list[Flow]] = {}
    total = sum(len(recipe.options(part)) - 1 for stage in by_stage for part in stage)
    with report(f"effect of each part on {len(input_ids)} calibration texts", total) as tick:
        for stage, here in zip(stages_of(checkpoint), by_stage, strict=True):
            with stage_session(checkpoint, exact_recipe(), stage, workspace) as session:
                after = {key: run_stage(session, values) for key, values in changed.items()}
                untouched = run_stage(session, clean)
            for key in [(part, option) for part in here for option in recipe.options(part)[:-1]]:
                only = in_float.choosing(dict([key]))
                with stage_session(
                    checkpoint, only, stage, workspace, statistics=statistics, max_tokens=max_tokens
                ) as session:
                    after[key] = run_stage(session, clean)
                tick()
            clean, changed = untouched, after
    return Effects(_rows(clean), {key: _rows(values) for key, values in changed.items()}, checkpoint.activation)


def float_recipe(recipe: Recipe) -> Recipe:
    """The recipe with nothing quantized and no state."""
    return replace(recipe, linear="float16" if recipe.half else "float32", embedding="float32", state=False)


def _rows(values: Sequence[Flow]) -> npt.NDArray[np.float32]:
    return np.concatenate(values).astype(np.float32)
