"""Activation ranges on calibration texts, measured on our own float32 graph: no PyTorch needed."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.export.build import DATA_NAME, MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import RANGE_PREFIX, variant_spec
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads


def collect_ranges(
    checkpoint: Checkpoint,
    input_ids: Sequence[npt.NDArray[np.int64]],
    *,
    workspace: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, npt.NDArray[np.float32]]:
    """By linear layer, the largest magnitude of each input channel (float32 [K]) over the texts.

    A float32 graph is built in a temporary folder below `workspace`, run on each text, and removed.
    """
    with tempfile.TemporaryDirectory(prefix=".ranges-", dir=workspace) as temporary:
        folder = Path(temporary)
        build_graph(checkpoint, variant_spec("cpu-fp32").recipe, folder, taps=True)
        session = Session(read_model(folder), "cpu", intra_op_threads=available_threads())
        names = [name for name in session.outputs if name.startswith(RANGE_PREFIX)]
        peaks: dict[str, npt.NDArray[np.float32]] = {}
        for ids in input_ids:
            for name, peak in zip(names, session.run_outputs(names, {"input_ids": ids[None, :]}), strict=True):
                site = name.removeprefix(RANGE_PREFIX)
                peaks[site] = np.maximum(peaks[site], peak) if site in peaks else peak
            if progress is not None:
                progress()
    return peaks


def read_model(folder: Path) -> ModelBytes:
    """A graph that was just built, as a session wants it."""
    with (folder / DATA_NAME).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return ModelBytes(graph=(folder / MODEL_NAME).read_bytes(), data={DATA_NAME: data})
