"""Activation statistics on calibration texts, measured on our own float32 graph: no PyTorch needed."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.export.build import DATA_NAME, MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import tap_name, variant_spec
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads


def collect_statistics(
    checkpoint: Checkpoint,
    input_ids: Sequence[npt.NDArray[np.int64]],
    *,
    workspace: Path | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Statistics of every linear layer's input channels over the texts; a text weighs as much as any other.

    A float32 graph is built in a temporary folder below `workspace`, run on each text, and removed.
    """
    with tempfile.TemporaryDirectory(prefix=".statistics-", dir=workspace) as temporary:
        folder = Path(temporary)
        build_graph(checkpoint, variant_spec("cpu-fp32").recipe, folder, taps=True)
        session = Session(read_model(folder), "cpu", intra_op_threads=available_threads())
        names = [name for name in session.outputs if name != "logits"]
        runs: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in names}
        for ids in input_ids:
            for name, value in zip(names, session.run_outputs(names, {"input_ids": ids[None, :]}), strict=True):
                runs[name].append(value)
            if progress is not None:
                progress()
    sites = {name.partition("/")[2]: None for name in names}
    return {
        site: ChannelStatistics(
            low=np.min(runs[tap_name(site, "low")], axis=0),
            high=np.max(runs[tap_name(site, "high")], axis=0),
            mean=np.asarray(np.mean(runs[tap_name(site, "mean")], axis=0, dtype=np.float64), dtype=np.float32),
        )
        for site in sites
    }


def read_model(folder: Path) -> ModelBytes:
    """A graph that was just built, as a session wants it."""
    with (folder / DATA_NAME).open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return ModelBytes(graph=(folder / MODEL_NAME).read_bytes(), data={DATA_NAME: data})
