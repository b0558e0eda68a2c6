"""Activation statistics on calibration texts, measured on our own float32 graph: no PyTorch needed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.stages import Flow, exact_recipe, result_name, stage_feeds, stage_session, stages_of
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import INPUT, TAPS, tap_name
from samescore.runtime.prefill import Ids
from samescore.runtime.session import Session

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CalibrationRun:
    """What the float32 graph says of the calibration texts: statistics of every linear layer's input channels, and logits
    float32 [texts, labels].
    """

    statistics: Mapping[str, ChannelStatistics]
    logits: FloatArray


def collect_statistics(
    checkpoint: Checkpoint,
    input_ids: Sequence[Ids],
    *,
    grams: bool = False,
    workspace: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> CalibrationRun:
    """Run the float32 graph over texts' ids int64 [sequence]; a text weighs as much as any other.

    Of language models, which read from left to right, a text that the next one goes on with counts for its logits alone:
    its activations come again.

    The graph is built in a temporary folder below `workspace`, run on each text, and removed; where the architecture has
    stages, one after the other, so that one stage's weights are in memory and on disk at a time. grams: also the Gram
    matrix of each layer's input. It takes 4 K² bytes for K channels, in memory for one stage at a time and on the disk of
    `workspace` for all of them, in files without a name that are gone with the result.
    """
    inputs: list[Flow] = [ids[None, :] for ids in input_ids]
    found: dict[str, ChannelStatistics] = {}
    recipe = replace(exact_recipe(), rounding="gptq" if grams else "nearest")
    counts = _counts(input_ids) if isinstance(checkpoint, Generator) else [True] * len(inputs)
    for stage in stages_of(checkpoint):
        with stage_session(checkpoint, recipe, stage, workspace, taps=True) as session:
            result, taps = result_name(session), _Taps(session)
            for number, value in enumerate(inputs):
                names = [result, *taps.names] if counts[number] else [result]
                inputs[number], *values = session.run_outputs(names, stage_feeds(session, value))
                if counts[number]:
                    taps.add(values)
                if progress is not None:
                    progress()
        found |= taps.statistics(workspace)
    return CalibrationRun(found, np.concatenate(inputs).astype(np.float32))


def _counts(input_ids: Sequence[Ids]) -> list[bool]:
    """Of each text whether it is more than the beginning of the next."""
    following = [*input_ids[1:], np.empty(0, np.int64)]
    return [not np.array_equal(ids, other[: len(ids)]) for ids, other in zip(input_ids, following, strict=True)]


class _Taps:
    """What the taps of one stage say, text by text."""

    def __init__(self, session: Session):
        self.names = [name for name in session.outputs if "/" in name]
        self._runs: dict[str, list[FloatArray]] = {name: [] for name in self.names}
        self._grams: dict[str, FloatArray] = {}
        self._texts = 0

    def add(self, values: Sequence[FloatArray]) -> None:
        """One text's outputs, in the order of the names."""
        self._texts += 1
        for name, value in zip(self.names, values, strict=True):
            statistic, _, site = name.partition("/")
            if statistic == INPUT:
                gram = value.T @ (value / np.float32(len(value)))
                self._grams[site] = self._grams[site] + gram if site in self._grams else gram
            else:
                self._runs[name].append(value)

    def statistics(self, workspace: Path | None) -> dict[str, ChannelStatistics]:
        """Of each site; Gram matrices are on disk from now on."""
        found = {}
        for site in dict.fromkeys(name.partition("/")[2] for name in self.names):
            low, high, mean = (self._runs[tap_name(site, statistic)] for statistic in TAPS)
            gram = self._grams.pop(site, None)
            found[site] = ChannelStatistics(
                low=np.min(low, axis=0),
                high=np.max(high, axis=0),
                mean=np.asarray(np.mean(mean, axis=0, dtype=np.float64), dtype=np.float32),
                gram=None if gram is None else _spooled(gram / np.float32(self._texts), workspace),
            )
        return found


def _spooled(array: FloatArray, workspace: Path | None) -> FloatArray:
    """The same array in an unnamed file below `workspace`, read from there; the file is gone with the array."""
    with tempfile.TemporaryFile(dir=workspace) as file:
        array.tofile(file)
        file.flush()
        return np.memmap(file, array.dtype, mode="r", shape=array.shape)
