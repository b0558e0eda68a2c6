"""The reference: the checkpoint in PyTorch and transformers, on the same token ids. The one place that needs torch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from samescore.calibrate.golden import GoldenSet, ReferenceInfo, with_logits
from samescore.calibrate.metrics import measure
from samescore.calibrate.next_token import label_scores
from samescore.calibrate.progress import Reporter as Reporter
from samescore.calibrate.progress import Tick, resumed_step
from samescore.calibrate.resume import Key, Row, Rows, Store
from samescore.export.adapter import CONFIG_NAME, AdaptedCheckpoint
from samescore.export.checkpoint import Checkpoint
from samescore.export.language_model import LanguageModel
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import CheckpointError, MissingDependencyError

DType = Literal["float32", "bfloat16"]


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


def import_peft() -> Any:
    """peft, or MissingDependencyError naming the extra."""
    import_torch()
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"the reference of an adapter is PEFT itself, which needs {error.name}: pip install 'samescore[calibrate]', or "
            "hand in a golden set that already holds reference logits (--golden)"
        ) from error
    return peft


def reference_versions() -> tuple[str, str]:
    """The versions of torch and transformers."""
    torch = import_torch()
    import transformers

    return str(torch.__version__), str(transformers.__version__)


@dataclass(frozen=True)
class ReferenceRun:
    """Logits float32 [texts, labels]; of label tokens also the label mass float64 [texts] (see `next_token`), else None."""

    logits: npt.NDArray[np.float32]
    label_mass: npt.NDArray[np.float64] | None


def reference_logits(
    checkpoint: Checkpoint,
    input_ids: Sequence[npt.NDArray[np.int64]],
    *,
    dtype: DType = "float32",
    progress: Tick | None = None,
) -> npt.NDArray[np.float32]:
    """Logits float32 [texts, labels], each text alone and unpadded: see `run_reference`."""
    return run_reference(checkpoint, input_ids, dtype=dtype, progress=progress).logits


def run_reference(
    checkpoint: Checkpoint,
    input_ids: Sequence[npt.NDArray[np.int64]],
    *,
    dtype: DType = "float32",
    rows: Rows | None = None,
    progress: Tick | None = None,
) -> ReferenceRun:
    """A sequence classifier, or a language model at label tokens, over texts' ids int64 [sequence], each alone and unpadded.

    rows: what is known already and need not be computed; gets what is computed. progress: called with the tokens of each
    computed text. CheckpointError when the checkpoint lacks weights (transformers would invent random ones).
    """
    import_torch()
    rows = Rows() if rows is None else rows
    missing = [ids for ids in input_ids if rows.get(ids) is None]
    if missing:
        _compute(checkpoint, missing, dtype, rows, progress)
    found = [row for ids in input_ids if (row := rows.get(ids)) is not None]
    masses = [row.label_mass for row in found if row.label_mass is not None]
    return ReferenceRun(np.stack([row.logits for row in found]), np.array(masses) if masses else None)


def _compute(
    checkpoint: Checkpoint, input_ids: Sequence[npt.NDArray[np.int64]], dtype: DType, rows: Rows, progress: Tick | None
) -> None:
    """PyTorch's row of each text, kept as soon as it is there."""
    torch = import_torch()
    model = load_reference(checkpoint, dtype=dtype)
    label_ids = checkpoint.label_ids if isinstance(checkpoint, TokenScorer) else None
    # Qwen3.5 logs at its first call that faster kernels exist.
    with torch.inference_mode(), quiet():
        for ids in input_ids:
            tokens = torch.from_numpy(ids[None, :])
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            mass = None
            if label_ids is not None:
                row, mass = label_scores(model, inputs, label_ids)
            else:
                row = model(**inputs).logits[0].float().numpy()
            rows.keep(ids, Row(np.array(row, np.float32), mass))
            if progress is not None:
                progress(len(ids))


def load_reference(checkpoint: Checkpoint, *, dtype: DType = "float32") -> Any:
    """The transformers model in evaluation mode, from local safetensors only; an adapter is PEFT's, on and not merged.

    Of label tokens it is the whole language model. `AutoModelForCausalLM` takes the text model out of a multimodal
    checkpoint: it renames `model.language_model.…` and never looks at the weights of other towers (Qwen3.5's text class
    gives the multimodal class's logits bit for bit).
    """
    if isinstance(checkpoint, AdaptedCheckpoint):
        return _load_adapted(checkpoint, dtype)
    auto = "AutoModelForCausalLM" if isinstance(checkpoint, LanguageModel) else "AutoModelForSequenceClassification"
    model, missing = _load(auto, checkpoint.folder, dtype)
    if missing:
        raise _random(checkpoint.folder, missing)
    return model.eval()


def _load_adapted(checkpoint: AdaptedCheckpoint, dtype: DType) -> Any:
    """PEFT's model: the base in transformers, and the adapter beside its layers."""
    peft = import_peft()
    model, missing = _load(
        "AutoModelForSequenceClassification",
        checkpoint.base.folder,
        dtype,
        num_labels=len(checkpoint.labels),
        ignore_mismatched_sizes=True,
    )
    # The base has no head of its own, or one for other labels: only what the adapter supplies may be missing.
    if invented := missing - checkpoint.supplied:
        raise _random(checkpoint.base.folder, invented)
    try:
        with quiet():
            # Without the cast everything runs in `dtype`, as the base does.
            adapted = peft.PeftModel.from_pretrained(
                model, checkpoint.folder, torch_device="cpu", autocast_adapter_dtype=False
            )
            loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"PEFT {peft.__version__} cannot load {checkpoint.folder} onto {checkpoint.base.folder}: {error}"
        ) from error
    if unloaded := loaded.keys() - checkpoint.adapter_keys():
        raise _random(checkpoint.folder, unloaded)
    return adapted.eval()


def _load(auto: str, folder: Path, dtype: DType, **options: Any) -> tuple[Any, set[str]]:
    """The model that one of transformers' auto classes makes, and the names of the weights that it had to invent."""
    if (folder / CONFIG_NAME).is_file():
        # transformers would load the adapter unasked, and does not find it.
        raise CheckpointError(
            f"{folder} is a whole checkpoint, but holds an {CONFIG_NAME} that belongs to no adapter there: copy the folder "
            "without that file, and export the copy"
        )
    torch = import_torch()
    import transformers

    with quiet():
        model, info = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    return model, {*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])}


def _random(folder: Path, missing: set[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} lacks {', '.join(sorted(missing))}: transformers would fill them with random numbers, so it is no reference"
    )


def position_logits(
    checkpoint: Checkpoint, input_ids: Sequence[npt.NDArray[np.int64]]
) -> list[npt.NDArray[np.float32]] | None:
    """What BERT's head says of every position, float32 [sequence, labels] of each text's ids; None for other models."""
    torch = import_torch()
    model = load_reference(checkpoint)
    if not hasattr(model, "bert") or not hasattr(model, "classifier"):
        return None
    rows = []
    with torch.inference_mode(), quiet():
        for ids in input_ids:
            hidden = model.bert(torch.from_numpy(ids[None, :])).last_hidden_state[0]
            # The pooler reads position 0: each position is handed to it as a text of its own.
            rows.append(model.classifier(model.bert.pooler(hidden[:, None, :])).float().numpy())
    return rows


@dataclass(frozen=True)
class ReferenceTokenizer:
    """The tokenizer that transformers loads from a checkpoint.

    encode: token ids of each text, special tokens included. control: ids that text must not become, how many of which
    (`added`) it puts around each text. spelled: all special tokens as they are written. spell: the text of ids.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    spell: Callable[[Sequence[int]], str]
    control: frozenset[int]
    spelled: frozenset[str]
    added: int


def load_tokenizer(checkpoint: Checkpoint) -> ReferenceTokenizer:
    """`AutoTokenizer` of the folder that the checkpoint's tokenizer.json lies in, without any remote code."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"comparing token ids with the Hugging Face tokenizer needs {error.name}: pip install 'samescore[calibrate]', or "
            "leave it away with --tokenization-texts 0"
        ) from error
    folder = checkpoint.folder
    if isinstance(checkpoint, AdaptedCheckpoint) and not (folder / "tokenizer.json").is_file():
        folder = checkpoint.base.folder
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        with quiet():
            found: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
        return found

    # `all_special_ids` names only those with a role (eos, pad …), not the others that text is read as.
    special = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ReferenceTokenizer(
        encode=encode,
        spell=lambda ids: str(tokenizer.decode(list(ids))),
        control=(frozenset(tokenizer.all_special_ids) | frozenset(special)) - {tokenizer.unk_token_id},
        spelled=frozenset(special.values()),
        added=int(tokenizer.num_special_tokens_to_add()),
    )


def add_reference(
    golden: GoldenSet,
    checkpoint: Checkpoint,
    report: Reporter,
    *,
    yardstick: bool = False,
    store: Store | None = None,
) -> GoldenSet:
    """The encoded golden set with PyTorch's float32 logits; `yardstick` also measures the reference's bfloat16 run.

    store: where logits are kept between runs (default: nowhere).
    """
    import_torch()
    ids, digest = golden.input_ids(), checkpoint.sha256()

    def measured(dtype: DType, title: str) -> ReferenceRun:
        opened = store.rows(_key(checkpoint, digest, dtype)) if store else Rows()
        with opened as rows, resumed_step(report, title, ids, rows) as tick:
            return run_reference(checkpoint, ids, dtype=dtype, rows=rows, progress=tick)

    run = measured("float32", f"PyTorch float32 reference on {len(ids)} texts")
    noise = bf16 = None
    if yardstick:
        bf16 = measured("bfloat16", f"PyTorch bfloat16 on {len(ids)} texts (the yardstick)").logits
        noise = measure(run.logits, bf16, checkpoint.labels, checkpoint.activation)
    torch_version, transformers_version = reference_versions()
    info = ReferenceInfo(
        checkpoint_sha256=digest,
        dtype="float32",
        torch=torch_version,
        transformers=transformers_version,
        bf16_mean_abs_dp=noise.mean_abs_dp if noise else None,
        bf16_p99_abs_dp=noise.p99_abs_dp if noise else None,
        label_mass_mean=None if run.label_mass is None else float(run.label_mass.mean()),
        label_mass_min=None if run.label_mass is None else float(run.label_mass.min()),
    )
    return replace(with_logits(golden, run.logits, info), bfloat16=bf16)


def _key(checkpoint: Checkpoint, digest: str, dtype: DType) -> Key:
    """Everything that decides the reference's numbers, but for the CPU."""
    torch, transformers = reference_versions()
    return {
        "what": "reference",
        "checkpoint": digest,
        "dtype": dtype,
        "torch": torch,
        "transformers": transformers,
        "peft": str(import_peft().__version__) if isinstance(checkpoint, AdaptedCheckpoint) else None,
        "threads": import_torch().get_num_threads(),
        "label_ids": [int(i) for i in checkpoint.label_ids] if isinstance(checkpoint, TokenScorer) else None,
    }


@contextmanager
def quiet() -> Iterator[None]:
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
