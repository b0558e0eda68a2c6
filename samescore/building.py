"""Recipes and variants of an export: calibrated, searched for formats inside a budget, built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from samescore.calibrate.activations import CalibrationRun, collect_statistics
from samescore.calibrate.budget import Budget, TokenBudget
from samescore.calibrate.effects import parts_of
from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.generation_gate import GENERATION_TOLERANCES
from samescore.calibrate.reference import Reporter
from samescore.calibrate.search import Choice, Limit, search
from samescore.calibrate.stages import stages_of
from samescore.export.build import build_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.recipes import FINER, VariantSpec
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import Precision, Variant
from samescore.runtime.prefill import Ids


def asked_formats(
    specs: Sequence[VariantSpec],
    checkpoint: Checkpoint,
    *,
    budget: str | None,
    recipe: str | os.PathLike[str] | None,
    allow_drift: bool,
) -> tuple[list[VariantSpec], dict[str, Limit[Any]]]:
    """The variants, with the formats of an earlier bundle if asked for, and the budget of each that is to be searched.

    budget: `gate`, numbers, `none`, or None: the gate for every quantized variant, unless drift is allowed anyway. recipe: the
    earlier bundle. UsageError when both are given, or a budget and no variant is quantized.
    """
    if recipe is not None and budget is not None:
        raise UsageError("--recipe takes formats over, --budget searches for them: name one of the two")
    if recipe is not None:
        return _recipes_of(recipe, specs, checkpoint), {}
    if budget == "none" or (budget is None and allow_drift):
        return list(specs), {}
    limit = _token_budget if isinstance(checkpoint, Generator) else _label_budget
    found = {spec.name: limit(budget or "gate", spec.precision) for spec in specs if spec.recipe.linear in FINER}
    if budget and not found:
        raise UsageError(
            f"--budget {budget} chooses number formats of a quantized variant, and {', '.join(s.name for s in specs)} "
            "quantizes nothing: name one as --variant cpu-int8, or leave --budget away"
        )
    return list(specs), found


def _label_budget(text: str, precision: Precision) -> Limit[Any]:
    return Budget.parse(text, TOLERANCES[precision])


def _token_budget(text: str, precision: Precision) -> Limit[Any]:
    return TokenBudget.parse(text, GENERATION_TOLERANCES[precision])


def _recipes_of(
    path: str | os.PathLike[str], specs: Sequence[VariantSpec], checkpoint: Checkpoint
) -> list[VariantSpec]:
    """The variants with the formats that an earlier bundle's variants of the same names have.

    UsageError when it lacks a variant, or has formats for parts that this checkpoint's network does not have.
    """
    with Bundle(path) as bundle:
        found = [
            replace(spec, recipe=spec.recipe.with_text(bundle.manifest.variant(spec.name).recipe)) for spec in specs
        ]
    parts = set(parts_of(checkpoint)) if any(spec.recipe.choices for spec in found) else set()
    if strange := sorted({part for spec in found for part, _ in spec.recipe.choices} - parts):
        raise UsageError(
            f"--recipe {os.fspath(path)} has formats for parts that this network does not have: {', '.join(strange[:3])}"
        )
    return found


class Calibrated:
    """A checkpoint with its calibration texts: what its activations do, the formats that a budget needs, and variants."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        input_ids: Sequence[Ids],
        max_tokens: int,
        prefix: Ids,
        workspace: Path,
        report: Reporter,
        *,
        grams: bool = False,
    ):
        """grams: also collect the Gram matrices that GPTQ rounds by."""
        self.grams = grams
        self.checkpoint = checkpoint
        self.input_ids = input_ids
        self.max_tokens = max_tokens
        self.prefix = prefix
        self.workspace = workspace
        self.report = report
        self.run = self._run()

    def _run(self) -> CalibrationRun | None:
        if not self.input_ids:
            return None
        count = len(self.input_ids)
        steps = count * len(stages_of(self.checkpoint))
        with self.report(f"activation statistics of {count} calibration texts", steps) as tick:
            return collect_statistics(
                self.checkpoint, self.input_ids, grams=self.grams, workspace=self.workspace, progress=tick
            )

    def within(
        self, specs: Sequence[VariantSpec], budgets: Mapping[str, Limit[Any]]
    ) -> tuple[list[VariantSpec], dict[str, Choice[Any]]]:
        """The variants with the formats that their budgets need, and what was found on the way."""
        found = {spec.name: self._search(spec, budgets[spec.name]) for spec in specs if spec.name in budgets}
        chosen = [
            replace(spec, recipe=spec.recipe.choosing(found[spec.name].formats)) if spec.name in found else spec
            for spec in specs
        ]
        return chosen, found

    def _search(self, spec: VariantSpec, budget: Limit[Any]) -> Choice[Any]:
        assert self.run is not None  # the exports have seen to it that there are calibration texts
        return search(
            self.checkpoint,
            spec.recipe,
            budget,
            self.input_ids,
            self.run,
            max_tokens=self.max_tokens,
            prefix=self.prefix,
            workspace=self.workspace,
            report=self.report,
        )

    def build(self, specs: Sequence[VariantSpec], folder: Path) -> list[Variant]:
        """Every variant into a bundle's folder."""
        built = []
        for spec in specs:
            with self.report(f"building {spec.name}"):
                built.append(
                    build_variant(
                        self.checkpoint,
                        spec,
                        folder,
                        max_tokens=self.max_tokens,
                        statistics=self.run.statistics if self.run else None,
                    )
                )
        return built
