"""Activation statistics on calibration texts, measured on our own float32 graph: no PyTorch needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.stages import Flow, exact_recipe, result_name, stage_feeds, stage_session, stages_of
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import tap_name
from samescore.runtime.prefill import Ids


@dataclass(frozen=True)
class CalibrationRun:
    """What the float32 graph says of the calibration texts: statistics of every linear layer's input channels, and logits
    float32 [texts, labels].
    """

    statistics: Mapping[str, ChannelStatistics]
    logits: npt.NDArray[np.float32]


def collect_statistics(
    checkpoint: Checkpoint,
    input_ids: Sequence[Ids],
    *,
    workspace: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> CalibrationRun:
    """Run the float32 graph over texts' ids int64 [sequence]; a text weighs as much as any other.

    The graph is built in a temporary folder below `workspace`, run on each text, and removed; where the architecture has
    stages, one after the other, so that one stage's weights are in memory and on disk at a time.
    """
    inputs: list[Flow] = [ids[None, :] for ids in input_ids]
    found: dict[str, ChannelStatistics] = {}
    for stage in stages_of(checkpoint):
        with stage_session(checkpoint, exact_recipe(), stage, workspace, taps=True) as session:
            names = [name for name in session.outputs if "/" in name]
            result = result_name(session)
            runs: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
            for number, value in enumerate(inputs):
                inputs[number], *values = session.run_outputs([result, *names], stage_feeds(session, value))
                for name, statistic in zip(names, values, strict=True):
                    runs[name].append(statistic)
                if progress is not None:
                    progress()
        for site in dict.fromkeys(name.partition("/")[2] for name in names):
            found[site] = ChannelStatistics(
                low=np.min(runs[tap_name(site, "low")], axis=0),
                high=np.max(runs[tap_name(site, "high")], axis=0),
                mean=np.asarray(np.mean(runs[tap_name(site, "mean")], axis=0, dtype=np.float64), dtype=np.float32),
            )
    return CalibrationRun(found, np.concatenate(inputs).astype(np.float32))
