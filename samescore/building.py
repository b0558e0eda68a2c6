"""Recipes and variants of an export: calibrated, searched for formats inside a budget, built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from samescore.calibrate.activations import CalibrationRun, collect_statistics
from samescore.calibrate.budget import Budget
from samescore.calibrate.effects import parts_of
from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.reference import Reporter
from samescore.calibrate.search import Choice, search
from samescore.calibrate.stages import stages_of
from samescore.export.build import build_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import FINER, VariantSpec
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import UsageError
from samescore.runtime.manifest import Variant
from samescore.runtime.prefill import Ids


def budgets_of(specs: Sequence[VariantSpec], asked: str | None, *, allow_drift: bool) -> dict[str, Budget]:
    """The budget of each variant whose formats are to be searched.

    asked: `gate`, numbers, `none`, or None: the gate for every quantized variant, unless drift is allowed anyway.
    UsageError when a budget was asked for and no variant is quantized.
    """
    if asked == "none" or (asked is None and allow_drift):
        return {}
    found = {
        spec.name: Budget.parse(asked or "gate", TOLERANCES[spec.precision])
        for spec in specs
        if spec.recipe.linear in FINER
    }
    if asked and not found:
        raise UsageError(
            f"--budget {asked} chooses number formats of a quantized variant, and {', '.join(s.name for s in specs)} "
            "quantizes nothing: name one as --variant cpu-int8, or leave --budget away"
        )
    return found


def recipes_of(path: str | os.PathLike[str], specs: Sequence[VariantSpec], checkpoint: Checkpoint) -> list[VariantSpec]:
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

    def within(self, spec: VariantSpec, budget: Budget) -> tuple[VariantSpec, Choice]:
        """The variant with the formats that the budget needs, and what was found on the way."""
        assert self.run is not None  # `export_bundle` has seen to it that there are calibration texts
        choice = search(
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
        return replace(spec, recipe=spec.recipe.choosing(choice.formats)), choice

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
