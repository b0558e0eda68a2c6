"""Where in the network a variant leaves the checkpoint: its residual stream against that of an exact float32 graph.

    delivered file   → hidden.0, mixed.0, hidden.1, … → logits ─┐
    checkpoint → float32 graph, stage by stage → the same ──────┴→ relative error of each → the step that stands out

Nothing here needs PyTorch; the float32 graph holds one stage of layers at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.stages import Flow, exact_recipe, read_model, result_name, stage_feeds, stages_of
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.intermediate import with_hidden_outputs
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.manifest import Precision
from samescore.runtime.prefill import Ids, feeds_for
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

Values = Mapping[str, npt.NDArray[Any]]
LOGITS = "logits"

# Relative error that rounding alone may leave after the first layers, by precision: growth is counted from here.
ROUNDING: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-2, "int4": 1e-1}
# A step stands out when the error grows by this much more than in the median step.
OUTSTANDING = 4.0


@dataclass(frozen=True)
class Step:
    """One value of the network's residual stream, or the logits.

    error: root mean square over tokens of |variant - float32| / |float32|; infinite where the variant's is not finite.
    growth: error over the error one step before (or over what rounding leaves, where that is more).
    """

    name: str
    error: float
    growth: float


@dataclass(frozen=True)
class Localization:
    """The steps in the order of the network, the number of layers, and the index of the step that stands out, or None."""

    steps: tuple[Step, ...]
    layers: int
    outstanding: int | None

    def __str__(self) -> str:
        """One sentence with the numbers."""
        first, last = self.steps[0], self.steps[-1]
        if self.outstanding is None:
            worst = max(self.steps, key=lambda step: step.growth)
            return (
                f"spread over all layers: rounding (relative error {first.error:.1e} at the embedding, {last.error:.1e} at "
                f"the logits; no step stands out, the largest is {place_of(worst.name, self.layers)}, x{worst.growth:.1f})"
            )
        step = self.steps[self.outstanding]
        before = self.steps[self.outstanding - 1].error if self.outstanding else 0.0
        after = f"{step.error:.1e}" if np.isfinite(step.error) else "NaN or infinite"
        return (
            f"the drift enters at {place_of(step.name, self.layers)}: relative error {before:.1e} before, {after} after "
            f"(float32 of the checkpoint on the same tokens)"
        )


def localize(
    model: ModelBytes,
    target: str,
    checkpoint: Checkpoint,
    input_ids: Sequence[Ids],
    *,
    precision: Precision,
    workspace: Path | None = None,
) -> Localization | None:
    """Compare a delivered file with the checkpoint on a few texts' ids.

    None for a file that does not name its values, or a checkpoint of another shape.
    """
    graph, names = with_hidden_outputs(model.graph)
    if not names:
        return None
    session = Session(replace(model, graph=graph), target, intra_op_threads=available_threads())
    wanted = [*names, LOGITS]
    variant = [
        dict(zip(wanted, session.run_outputs(wanted, feeds_for(session.inputs, ids[None, :])), strict=True))
        for ids in input_ids
    ]
    exact = _exact_values(checkpoint, input_ids, workspace)
    if _shapes(variant) != _shapes([{name: values[name] for name in wanted if name in values} for values in exact]):
        return None
    errors = [_error([v[name] for v in variant], [e[name] for e in exact]) for name in wanted]
    layers = int(checkpoint.config["num_hidden_layers"])
    return find_step(wanted, errors, layers=layers, rounding=ROUNDING[precision])


def _shapes(runs: Sequence[Values]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: np.shape(value) for name, value in values.items()} for values in runs]


def find_step(names: Sequence[str], errors: Sequence[float], *, layers: int, rounding: float) -> Localization:
    """The first step whose error grows by far more than in the median step."""
    before = [rounding, *(max(error, rounding) for error in errors[:-1])]
    growths = [
        error / previous if np.isfinite(previous) else 1.0 for error, previous in zip(errors, before, strict=True)
    ]
    steps = tuple(Step(*step) for step in zip(names, errors, growths, strict=True))
    typical = max(1.0, float(np.median(growths)))
    found = next((i for i, growth in enumerate(growths) if growth >= OUTSTANDING * typical), None)
    return Localization(steps, layers, found)


def place_of(name: str, layers: int) -> str:
    """What a value's name stands for, in words."""
    if name == LOGITS:
        return "the head (everything behind the last layer)"
    kind, _, number = name.partition(".")
    index = int(number)
    if name == "hidden.0":
        return "the embedding"
    if kind == "mixed":
        return f"layer {index} of {layers} (counted from 0), its attention"
    return f"layer {index - 1} of {layers} (counted from 0), its feed-forward"


def _exact_values(checkpoint: Checkpoint, input_ids: Sequence[Ids], workspace: Path | None) -> list[dict[str, Any]]:
    """The residual stream and the logits of each text in float32, stage by stage."""
    flows: list[Flow] = [ids[None, :] for ids in input_ids]
    found: list[dict[str, Any]] = [{} for _ in input_ids]
    for stage in stages_of(checkpoint):
        with tempfile.TemporaryDirectory(prefix=".locate-", dir=workspace) as temporary:
            build_graph(checkpoint, exact_recipe(), Path(temporary), stage=stage)
            built = read_model(Path(temporary))
            graph, names = with_hidden_outputs(built.graph)
            session = Session(replace(built, graph=graph), "cpu", intra_op_threads=available_threads())
            result = result_name(session)
            for number, flow in enumerate(flows):
                values = session.run_outputs([*names, result], stage_feeds(session, flow))
                found[number].update(zip([*names, result], values, strict=True))
                flows[number] = values[-1]
    return found


def _error(variant: Sequence[npt.NDArray[Any]], exact: Sequence[npt.NDArray[Any]]) -> float:
    """Root mean square over rows of the relative error; logits are taken relative to their size over all texts."""
    wide = [np.asarray(values, np.float64).reshape(-1, values.shape[-1]) for values in (*variant, *exact)]
    a, b = np.concatenate(wide[: len(variant)]), np.concatenate(wide[len(variant) :])
    if not np.isfinite(a).all():
        return float("inf")
    size = np.linalg.norm(b, axis=1)
    # A row of nearly nothing would count for everything.
    size = np.maximum(size, np.sqrt(np.mean(size**2)) * 1e-2) if len(size) > len(exact) else np.sqrt(np.mean(size**2))
    return float(np.sqrt(np.mean((np.linalg.norm(a - b, axis=1) / size) ** 2)))
