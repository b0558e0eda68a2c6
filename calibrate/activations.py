"""Activation statistics on calibration texts, measured on our own float32 graph: no PyTorch needed."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.export.build import DATA_NAME, MODEL_NAME, architecture_of, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import tap_name, variant_spec
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.prefill import Ids, feeds_for
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads


def collect_statistics(
    checkpoint: Checkpoint,
    input_ids: Sequence[Ids],
    *,
    workspace: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Statistics of every linear layer's input channels over the texts; a text weighs as much as any other.

    A float32 graph is built in a temporary folder below `workspace`, run on each text, and removed; where the
    architecture has stages, one after the other, so that one stage's weights are in memory and on disk at a time.
    """
    stages = stages_of(checkpoint)
    inputs: list[npt.NDArray[Any]] = [ids[None, :] for ids in input_ids]
    found: dict[str, ChannelStatistics] = {}
    for stage in stages:
        with tempfile.TemporaryDirectory(prefix=".statistics-", dir=workspace) as temporary:
            session = _stage_session(checkpoint, stage, Path(temporary))
            names = [name for name in session.outputs if "/" in name]
            result = "logits" if "logits" in session.outputs else "hidden_after"
            runs: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
            for number, value in enumerate(inputs):
                inputs[number], *values = session.run_outputs([result, *names], _feeds(session, value))
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
    return found


def stages_of(checkpoint: Checkpoint) -> list[range | None]:
    """The stages that statistics are collected in; [None] for an architecture that is run whole."""
    architecture = architecture_of(checkpoint)
    if architecture is None or architecture.stages is None:
        return [None]
    return list(architecture.stages(checkpoint))


def _stage_session(checkpoint: Checkpoint, stage: range | None, folder: Path) -> Session:
    recipe = replace(variant_spec("cpu-fp32").recipe, state=False)
    build_graph(checkpoint, recipe, folder, taps=True, stage=stage)
    return Session(read_model(folder), "cpu", intra_op_threads=available_threads())


def _feeds(session: Session, value: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """A stage's inputs: ids [1, sequence] or hidden states [1, sequence, hidden] of one text."""
    if "hidden" not in session.inputs:
        return feeds_for(session.inputs, value)
    return {"hidden": value, "lengths": np.array([value.shape[1]], np.int32)}


def read_model(folder: Path) -> ModelBytes:
    """A graph that was just built, as a session wants it."""
    with (folder / DATA_NAME).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return ModelBytes(graph=(folder / MODEL_NAME).read_bytes(), data={DATA_NAME: data})
