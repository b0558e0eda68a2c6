"""Which parts of a network a quantized variant keeps in float, so that its drift stays inside a budget.

    calibration texts ─ stage by stage ─┬→ float32 logits
                                        └→ logits with one part quantized, for each part → its effect
    parts ranked by effect per stored byte → as few as the prediction allows → built, measured → more or fewer → recipe

The effect of one part is what its quantization alone does to each text's probabilities. Effects of several parts are added
as independent errors, in squares; how far that is from what the built variant does is learned from building it.

Nothing here needs PyTorch, and no golden text is looked at: the budget is held against our own float32 graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.certify import score_all
from samescore.calibrate.gate import Tolerance
from samescore.calibrate.metrics import Drift, measure
from samescore.calibrate.reference import Reporter
from samescore.calibrate.stages import Flow, exact_recipe, read_model, run_stage, stage_session, stages_of
from samescore.export.build import architecture_of, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import Recipe
from samescore.runtime.errors import GateError, UsageError, did_you_mean
from samescore.runtime.manifest import Activation
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.prefill import Ids, Reader
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

FloatArray = npt.NDArray[np.float64]
Statistics = Mapping[str, ChannelStatistics]

# The calibration texts are few, and others must stay inside too: their p99 was up to twice as large.
SAFETY = 0.5
# Variants that are built to find the number of exact parts.
BUILDS = 8
# Bytes that a weight takes more when it is not quantized: a float32 matrix, a float16 embedding.
MATRIX_BYTES, EMBEDDING_BYTES = 3, 1
BUDGET_NAMES = {"max": "max_abs_dp", "p99": "p99_abs_dp", "mean": "mean_abs_dp"}


@dataclass(frozen=True)
class Budget:
    """The largest drift that a search may leave, of each number; None where it does not matter."""

    max_abs_dp: float | None
    p99_abs_dp: float | None
    mean_abs_dp: float | None

    @classmethod
    def parse(cls, text: str, tolerance: Tolerance) -> Budget:
        """`gate`, the tolerance's own numbers, or some of `max=…,p99=…,mean=…`; UsageError for anything else."""
        if text == "gate":
            return cls(tolerance.max_abs_dp, tolerance.p99_abs_dp, tolerance.mean_abs_dp)
        found: dict[str, float] = {}
        for item in text.split(","):
            name, _, value = item.partition("=")
            if name not in BUDGET_NAMES:
                raise UsageError(
                    f"budget {text!r}: {name!r} is none of gate, {', '.join(BUDGET_NAMES)}.{did_you_mean(name, BUDGET_NAMES)} "
                    "Write --budget gate, or --budget p99=5e-3,mean=1e-3"
                )
            try:
                found[BUDGET_NAMES[name]] = float(value)
            except ValueError:
                raise UsageError(f"budget {text!r}: {value!r} is no number") from None
            if not 0 < found[BUDGET_NAMES[name]] <= 1:
                raise UsageError(f"budget {text!r}: {name} is a difference of probabilities, more than 0 and at most 1")
        return cls(**{field: found.get(field) for field in BUDGET_NAMES.values()})

    def excess(self, drift: Drift | Mapping[str, float]) -> float:
        """The largest number over what is left of its limit by SAFETY; at most 1 when all are inside."""
        values: Mapping[str, float] = drift if isinstance(drift, Mapping) else vars(drift)
        limits: dict[str, float] = {name: limit for name, limit in vars(self).items() if limit is not None}
        return max(values[name] / (SAFETY * limit) for name, limit in limits.items())


@dataclass(frozen=True)
class Effects:
    """logits float32 [texts, labels] in float32, and by part those with that part alone quantized."""

    logits: npt.NDArray[np.float32]
    parts: Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Choice:
    """The parts to keep exact, the share of the quantizable weights that they hold, and the drift on calibration texts."""

    exact: tuple[str, ...]
    share: float
    drift: Drift


def search(
    checkpoint: Checkpoint,
    recipe: Recipe,
    budget: Budget,
    input_ids: Sequence[Ids],
    statistics: Statistics | None,
    *,
    max_tokens: int,
    prefix: Ids | None,
    workspace: Path | None = None,
    report: Reporter,
) -> Choice:
    """The fewest bytes of exact parts with which the recipe stays inside the budget on the calibration texts.

    input_ids: int64 [sequence] of each text. prefix: what all begin with (`TextEncoder.prefix_ids`). GateError when even
    every part in float is not enough; UsageError for an architecture without parts.
    """
    parts = parts_of(checkpoint)
    effects = part_effects(
        checkpoint, recipe, input_ids, statistics, max_tokens=max_tokens, workspace=workspace, report=report
    )
    sizes = {part: stored_bytes(checkpoint, part) for part in parts}
    trials = _Trials(checkpoint, recipe, input_ids, statistics, max_tokens, prefix, workspace, effects.logits)
    ranked = rank(effects, sizes, checkpoint.activation)
    with report("searching for the parts to keep exact", BUILDS) as tick:
        count, drift = fewest(
            lambda kept: predicted(effects, ranked[kept:], checkpoint.activation),
            lambda kept: trials.measure(tuple(ranked[:kept])),
            len(ranked),
            budget,
            tick,
        )
    exact = tuple(part for part in parts if part in ranked[:count])
    return Choice(exact, sum(sizes[part] for part in exact) / sum(sizes.values()), drift)


def parts_of(checkpoint: Checkpoint) -> list[str]:
    """What may be kept exact, in the network's order; UsageError for an architecture without a hand-built graph."""
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
    """What quantizing each part alone does to every text, none of them longer than max_tokens.

    A perturbed text goes on through the exact later stages, so each stage is built once exact and once per part of it.
    """
    architecture = architecture_of(checkpoint)
    assert architecture is not None
    by_stage = architecture.parts(checkpoint)
    recipe = replace(recipe, state=False)
    clean: list[Flow] = [ids[None, :] for ids in input_ids]
    perturbed: dict[str, list[Flow]] = {}
    with report("effect of each part", sum(map(len, by_stage))) as tick:
        for stage, here in zip(stages_of(checkpoint), by_stage, strict=True):
            with stage_session(checkpoint, exact_recipe(), stage, workspace) as session:
                after = {part: run_stage(session, values) for part, values in perturbed.items()}
                exact = run_stage(session, clean)
            for part in here:
                others = tuple(other for other in here if other != part)
                only = replace(recipe, exact=others)
                with stage_session(
                    checkpoint, only, stage, workspace, statistics=statistics, max_tokens=max_tokens
                ) as session:
                    after[part] = run_stage(session, clean)
                tick()
            clean, perturbed = exact, after
    return Effects(_rows(clean), {part: _rows(values) for part, values in perturbed.items()})


def _rows(values: Sequence[Flow]) -> npt.NDArray[np.float32]:
    return np.concatenate(values).astype(np.float32)


def stored_bytes(checkpoint: Checkpoint, part: str) -> int:
    """How many bytes more a part takes when it is kept exact."""
    shapes = [checkpoint.shape(name) for name in checkpoint.names() if name.startswith(f"{part}.")]
    each = EMBEDDING_BYTES if "embed" in part else MATRIX_BYTES
    return each * sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)


def rank(effects: Effects, sizes: Mapping[str, int], activation: Activation) -> list[str]:
    """Parts by mean squared effect per byte, the most rewarding to keep exact first."""
    worth = {part: float(np.square(_effect(effects, part, activation)).mean()) / sizes[part] for part in effects.parts}
    return sorted(worth, key=lambda part: -worth[part])


def _effect(effects: Effects, part: str, activation: Activation) -> FloatArray:
    """What the part does to the probabilities, float64 [texts, labels]."""
    return probabilities_of(effects.parts[part], activation) - probabilities_of(effects.logits, activation)


def predicted(effects: Effects, quantized: Sequence[str], activation: Activation) -> dict[str, float]:
    """The drift when these parts are quantized, if their effects are independent."""
    squares = [np.square(_effect(effects, part, activation)) for part in quantized]
    dp = np.sqrt(np.sum(squares, axis=0)).max(axis=1) if squares else np.zeros(len(effects.logits))
    return {
        "max_abs_dp": float(dp.max()),
        "p99_abs_dp": float(np.quantile(dp, 0.99)),
        "mean_abs_dp": float(dp.mean()),
    }


def fewest(
    predict: Callable[[int], Mapping[str, float]],
    try_out: Callable[[int], Drift],
    parts: int,
    budget: Budget,
    tick: Callable[[], None],
) -> tuple[int, Drift]:
    """The smallest number of exact parts whose measured drift is inside the budget, in at most BUILDS builds (and one
    of all parts, where none of these passed).

    Starts where the prediction is inside, corrects the prediction by what was measured, and halves the gap between the
    most parts that failed and the fewest that passed. GateError when all of them fail.
    """
    low, high, correction = -1, parts, 1.0
    best: Drift | None = None
    for _ in range(BUILDS):
        guess = next((k for k in range(parts + 1) if correction * budget.excess(predict(k)) <= 1), parts)
        kept = guess if low < guess < high else (low + high + 1) // 2
        drift = try_out(kept)
        tick()
        if budget.excess(drift) <= 1:
            high, best = kept, drift
        else:
            low = kept
        expected = budget.excess(predict(kept))
        correction = budget.excess(drift) / expected if expected else correction
        if high - low <= max(1, parts // 32):
            break
    if best is None:
        best, high = try_out(parts), parts
        if budget.excess(best) > 1:
            raise GateError(
                "no choice of exact parts stays inside the budget: with all of them in float, "
                f"mean |Δp| is {best.mean_abs_dp:.1e} and max {best.max_abs_dp:.1e}. Nothing was written. Export cpu-fp32, or "
                "name a wider --budget"
            )
    return high, best


@dataclass(frozen=True)
class _Trials:
    """Builds whole variants and measures them on the calibration texts."""

    checkpoint: Checkpoint
    recipe: Recipe
    input_ids: Sequence[Ids]
    statistics: Statistics | None
    max_tokens: int
    prefix: Ids | None
    workspace: Path | None
    logits: npt.NDArray[np.float32]

    def measure(self, exact: tuple[str, ...]) -> Drift:
        """The drift from float32 with these parts exact."""
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.workspace) as temporary:
            folder = Path(temporary)
            recipe = replace(self.recipe, exact=exact)
            build_graph(self.checkpoint, recipe, folder, statistics=self.statistics, max_tokens=self.max_tokens)
            reader = Reader(Session(read_model(folder), "cpu", intra_op_threads=1), self.prefix)
            logits = score_all(reader, self.input_ids, workers=available_threads())
        return measure(self.logits, logits, self.checkpoint.labels, self.checkpoint.activation)
