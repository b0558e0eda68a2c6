"""The reference: the checkpoint in PyTorch and transformers, on the same token ids. The one place that needs torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from samescore.calibrate.golden import GoldenSet, ReferenceInfo, with_logits
from samescore.calibrate.metrics import measure
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import CheckpointError, MissingDependencyError

DType = Literal["float32", "bfloat16"]


class Reporter(Protocol):
    """Opens a step with a title and, where it is known, the number of things to do; yields a function to count them."""

    def __call__(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[], None]]: ...  # noqa: D102


def import_torch() -> Any:
    """torch, or MissingDependencyError naming the extra."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"reference numbers need {error.name}: pip install 'samescore[calibrate]', or hand in a golden set that "
            "already holds reference logits (--golden)"
        ) from error
    return torch


def reference_versions() -> tuple[str, str]:
    """The versions of torch and transformers."""
    torch = import_torch()
    import transformers

    return str(torch.__version__), str(transformers.__version__)


def reference_logits(
    folder: Path,
    input_ids: Sequence[npt.NDArray[np.int64]],
    *,
    dtype: DType = "float32",
    progress: Callable[[], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Logits float32 [texts, labels] of a sequence classifier, each text alone and unpadded.

    CheckpointError when the checkpoint lacks weights (transformers would invent random ones).
    """
    torch = import_torch()
    model = load_reference(folder, dtype=dtype)
    rows = []
    with torch.inference_mode():
        for ids in input_ids:
            logits = model(
                input_ids=torch.from_numpy(ids[None, :]), attention_mask=torch.ones((1, len(ids)), dtype=torch.int64)
            ).logits
            rows.append(logits[0].float().numpy())
            if progress is not None:
                progress()
    return np.stack(rows).astype(np.float32)


def load_reference(folder: Path, *, dtype: DType = "float32") -> Any:
    """The transformers model in evaluation mode, from local safetensors only."""
    torch = import_torch()
    from transformers import AutoModelForSequenceClassification

    with _quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)}: transformers would fill them with random numbers, so it is no reference"
        )
    return model.eval()


def add_reference(golden: GoldenSet, checkpoint: Checkpoint, report: Reporter, *, yardstick: bool = False) -> GoldenSet:
    """The encoded golden set with PyTorch's float32 logits; `yardstick` also measures the reference's bfloat16 run."""
    import_torch()
    ids = golden.input_ids()
    with report(f"PyTorch float32 reference on {len(ids)} texts", len(ids)) as tick:
        logits = reference_logits(checkpoint.folder, ids, progress=tick)
    noise = None
    if yardstick:
        with report(f"PyTorch bfloat16 on {len(ids)} texts (the yardstick)", len(ids)) as tick:
            bf16 = reference_logits(checkpoint.folder, ids, dtype="bfloat16", progress=tick)
        noise = measure(logits, bf16, checkpoint.labels, checkpoint.activation)
    torch_version, transformers_version = reference_versions()
    info = ReferenceInfo(
        checkpoint_sha256=checkpoint.sha256(),
        dtype="float32",
        torch=torch_version,
        transformers=transformers_version,
        bf16_mean_abs_dp=noise.mean_abs_dp if noise else None,
        bf16_p99_abs_dp=noise.p99_abs_dp if noise else None,
    )
    return with_logits(golden, logits, info)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, warnings or logs of transformers: what matters is raised as an error."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
