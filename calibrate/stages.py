"""Running a graph in stages of consecutive layers, so that one stage's weights are in memory and on disk at a time."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.export.build import DATA_NAME, MODEL_NAME, architecture_of, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import Recipe, variant_spec
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.prefill import feeds_for
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

Stage = range | None
# What passes between stages: ids int64 [1, sequence] before the first, hidden states float32 [1, sequence, hidden]
# between them, logits float32 [1, labels] after the last.
Flow = npt.NDArray[Any]


def stages_of(checkpoint: Checkpoint) -> list[Stage]:
    """The stages of a checkpoint's graph; [None] for an architecture that is run whole."""
    architecture = architecture_of(checkpoint)
    if architecture is None or architecture.stages is None:
        return [None]
    return list(architecture.stages(checkpoint))


def exact_recipe() -> Recipe:
    """float32 in fused operators, for what is measured against."""
    return replace(variant_spec("cpu-fp32").recipe, state=False)


@contextmanager
def stage_session(
    checkpoint: Checkpoint, recipe: Recipe, stage: Stage, workspace: Path | None, **options: Any
) -> Iterator[Session]:
    """A session of one stage, built below `workspace` and removed afterwards; options are those of `build_graph`."""
    with tempfile.TemporaryDirectory(prefix=".stage-", dir=workspace) as temporary:
        build_graph(checkpoint, recipe, Path(temporary), stage=stage, **options)
        yield Session(read_model(Path(temporary)), "cpu", intra_op_threads=available_threads())


def result_name(session: Session) -> str:
    """The output that goes on to the next stage."""
    return "logits" if "logits" in session.outputs else "hidden_after"


def stage_feeds(session: Session, value: Flow) -> dict[str, npt.NDArray[Any]]:
    """A stage's inputs for one text, which is never padded."""
    if "hidden" not in session.inputs:
        return feeds_for(session.inputs, value)
    length = value.shape[1]
    if "lengths" in session.inputs:
        return {"hidden": value, "lengths": np.array([length], np.int32)}
    if "attention_mask" in session.inputs:
        return {"hidden": value, "attention_mask": np.ones((1, length), np.int64)}
    return {"hidden": value}


def run_stage(session: Session, values: Sequence[Flow]) -> list[Flow]:
    """What each text becomes."""
    name = result_name(session)
    return [session.run_outputs([name], stage_feeds(session, value))[0] for value in values]


def read_model(folder: Path) -> ModelBytes:
    """A graph that was just built, as a session wants it."""
    with (folder / DATA_NAME).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return ModelBytes(graph=(folder / MODEL_NAME).read_bytes(), data={DATA_NAME: data})
