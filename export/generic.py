"""Classifiers without a hand-built graph: traced by transformers, then compared with PyTorch over many shapes."""

from __future__ import annotations

import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.export.build import DATA_NAME, MODEL_NAME, check_graph
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import CheckpointError, GateError, MissingDependencyError
from samescore.runtime.providers import import_onnxruntime

CLASSIFIER_SUFFIX = "ForSequenceClassification"
# Of max(1, |logit|).
TOLERANCE = 1e-4
# Attention is quadratic: beyond this, a comparison needs gigabytes.
LONGEST_CHECKED = 4096
BATCH = 3
ODD_LENGTH = 17
# torch.export takes sizes 0 and 1 for constants, and equal sizes for one.
TRACED_SHAPE = (2, 13)

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GenericGraph:
    """A traced graph in its folder.

    model_file, data_files: names in the folder. inputs, outputs: of the graph, in order. opset: of the ONNX domain.
    checked_tokens: the longest text that was compared with PyTorch. max_difference: the largest |logit difference| of
    the comparison, over max(1, |logit|).
    """

    model_file: str
    data_files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    checked_tokens: int
    max_difference: float


@dataclass(frozen=True)
class Case:
    """What both were asked, and what PyTorch answered."""

    feeds: dict[str, Ids]
    logits: npt.NDArray[np.float32]


def export_generic(checkpoint_folder: Path, output_dir: Path) -> GenericGraph:
    """Trace a sequence classifier in float32 into `output_dir/model.onnx`, with free batch and sequence axes.

    A traced graph can be wrong at shapes other than the traced one without saying so; therefore it is run against
    PyTorch over a grid of shapes, up to the longest text that the checkpoint takes (at most LONGEST_CHECKED).

    Raises CheckpointError when the checkpoint is no sequence classifier, lacks weights, or cannot be traced; GateError
    when the graph differs from PyTorch; MissingDependencyError without the extra `calibrate` or ONNX Runtime. Nothing
    is left behind then.
    """
    _require_packages()
    import_onnxruntime()
    checkpoint = Checkpoint(checkpoint_folder)
    _require_classifier(checkpoint)
    model = _load(checkpoint)
    existed = output_dir.is_dir()
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".traced-") as staging:
            graph = _traced(model, checkpoint, Path(staging))
            for name in (graph.model_file, *graph.data_files):
                (Path(staging) / name).replace(output_dir / name)
    except BaseException:
        if not existed:
            output_dir.rmdir()
        raise
    return graph


def shape_grid(max_tokens: int) -> list[tuple[int, int]]:
    """The (batch, length) pairs to compare: one and several texts of the most, an odd number of, 2, and 1 tokens.

    The longest come first, because some models choose the way they attend at their first call.
    """
    longest = min(max_tokens, LONGEST_CHECKED)
    lengths = {1, min(2, longest), min(ODD_LENGTH, longest), longest}
    return [
        (batch, length)
        for length in sorted(lengths, reverse=True)
        for batch in (1, BATCH)
        if batch == 1 or batch * length <= LONGEST_CHECKED
    ]


def reference_cases(model: Any, shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Random texts of each (batch, length) and PyTorch's logits of them. Rows after the first are padded on the right.

    CheckpointError when PyTorch cannot run a shape.
    """
    return [Case(feeds, _torch_logits(model, feeds)) for feeds in (_feeds(model, *shape) for shape in shapes)]


def check_shapes(path: Path, cases: Sequence[Case]) -> float:
    """Run an ONNX file on the CPU over all cases; the largest |logit difference| over max(1, |logit|).

    GateError names the first shape at which that is above TOLERANCE, or which the graph cannot run.
    """
    session = _session(path)
    names = [value.name for value in session.get_inputs()]
    return max(_difference(session, names, case) for case in cases)


def _difference(session: Any, names: Sequence[str], case: Case) -> float:
    shape = "batch {} × {} tokens".format(*case.feeds["input_ids"].shape)
    try:
        logits = session.run(["logits"], {name: case.feeds[name] for name in names})[0]
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise GateError(f"the traced graph cannot run {shape}: {_first_line(error)}") from error
    if logits.shape != case.logits.shape:
        raise GateError(
            f"the traced graph gives logits of shape {logits.shape} at {shape}; PyTorch's are {case.logits.shape}"
        )
    absolute = np.abs(logits - case.logits)
    relative = float(np.max(absolute / np.maximum(1.0, np.abs(case.logits))))
    # Written so that NaN fails.
    if not relative <= TOLERANCE:
        raise GateError(
            f"the traced graph differs from PyTorch at {shape}: max abs logit difference {np.max(absolute):.2e}, "
            f"tolerance {TOLERANCE:.0e} of max(1, |logit|)"
        )
    return relative


def _traced(model: Any, checkpoint: Checkpoint, folder: Path) -> GenericGraph:
    """Trace, write and compare in `folder`."""
    grid = shape_grid(checkpoint.max_tokens)
    # Before tracing, which can leave a model changed.
    cases = reference_cases(model, grid)
    program = _trace(model)
    _clean(program)
    _write(program, folder)
    worst = check_shapes(folder / MODEL_NAME, cases)
    return GenericGraph(
        model_file=MODEL_NAME,
        data_files=(DATA_NAME,) if (folder / DATA_NAME).is_file() else (),
        inputs=tuple(value.name for value in program.graph.inputs),
        outputs=tuple(value.name for value in program.graph.outputs),
        opset=int(program.opset_imports[""]),
        checked_tokens=max(length for _, length in grid),
        max_difference=worst,
    )


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
        import torch  # noqa: F401
        import transformers.exporters  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"an architecture without a hand-built graph is traced, which needs {error.name}: "
            "pip install 'samescore[calibrate]'"
        ) from error


def _require_classifier(checkpoint: Checkpoint) -> None:
    architectures = [str(name) for name in checkpoint.config.get("architectures") or []]
    if not any(name.endswith(CLASSIFIER_SUFFIX) for name in architectures):
        raise CheckpointError(
            f"{checkpoint.folder} is {' and '.join(architectures) or 'of no architecture that config.json names'}: "
            f"only *{CLASSIFIER_SUFFIX} of transformers can be traced"
        )


def _load(checkpoint: Checkpoint) -> Any:
    """The transformers model in float32 and evaluation mode, every weight of which was in the checkpoint."""
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        with _silence():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                checkpoint.folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises a dozen unrelated types here
        raise CheckpointError(f"transformers cannot load {checkpoint.folder}: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.folder} lacks the weights {', '.join(missing)}: transformers would invent them. It is no "
            f"finished {checkpoint.architecture}; train or fetch its classifier first"
        )
    if type(model).__name__ not in checkpoint.config["architectures"]:
        raise CheckpointError(
            f"{checkpoint.folder} is {checkpoint.architecture}, but transformers loads {type(model).__name__} for it: "
            "the class is the checkpoint's own code, which samescore does not run"
        )
    model.config.use_cache = False
    return model.eval()


def _trace(model: Any) -> Any:
    """The onnx_ir model of `model`, traced with both axes free."""
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    tensors = {name: torch.from_numpy(value) for name, value in _feeds(model, *TRACED_SHAPE).items()}
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    config = OnnxConfig(dynamic=True, dynamic_shapes={name: dict(axes) for name in tensors})
    try:
        with _silence():
            program = OnnxExporter().export(model, tensors, config=config).program
    except Exception as error:  # as many types as there are ways to write a model
        raise CheckpointError(
            f"{type(model).__name__} cannot be traced with free batch and sequence axes: {_first_line(error)}"
        ) from error
    if "logits" not in [value.name for value in program.graph.outputs]:
        raise CheckpointError(f"{type(model).__name__} traces to a graph without logits")
    return program


def _clean(program: Any) -> None:
    """Keep only the logits, and nothing of the machine that traced: nodes carry stack traces with its paths."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

    outputs = program.graph.outputs
    outputs[:] = [value for value in outputs if value.name == "logits"]
    RemoveUnusedNodesPass()(program)
    ClearMetadataAndDocStringPass()(program)


def _write(program: Any, folder: Path) -> None:
    import onnx
    import onnx_ir

    with _silence():
        onnx_ir.save(program, folder / MODEL_NAME, external_data=DATA_NAME)
    try:
        check_graph(folder / MODEL_NAME)
    except onnx.checker.ValidationError as error:
        raise GateError(f"the traced graph is not valid ONNX: {_first_line(error)}") from error


def _session(path: Path) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # PyTorch computes in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise GateError(f"ONNX Runtime {ort.__version__} cannot load the traced graph: {_first_line(error)}") from error


def _feeds(model: Any, batch: int, length: int) -> dict[str, Ids]:
    """The random texts of a shape, always the same: the first of full length, the others shorter and padded."""
    config = model.config.get_text_config()
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = np.random.default_rng(batch * 100_003 + length).integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    names = inspect.signature(model.forward).parameters
    for row in range(batch):
        padding = row * (length // BATCH) if "attention_mask" in names else 0
        real = max(1, length - padding)
        if model.config.is_encoder_decoder:
            _end_once(ids[row, :real], config.eos_token_id)
        ids[row, real:] = config.pad_token_id or 0
        mask[row, real:] = 0
    return {name: value for name, value in (("input_ids", ids), ("attention_mask", mask)) if name in names}


def _end_once(row: Ids, eos: int) -> None:
    """Encoder-decoder classifiers read the state at the one end-of-sequence token."""
    row[row == eos] = abs(eos - 1)
    row[-1] = eos


def _torch_logits(model: Any, feeds: dict[str, Ids]) -> npt.NDArray[np.float32]:
    import torch

    try:
        with _silence(), torch.inference_mode():
            logits = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits
    except Exception as error:  # as many types as there are ways to write a model
        shape = "batch {} × {} tokens".format(*feeds["input_ids"].shape)
        hint = ". Set pad_token_id in config.json" if model.config.get_text_config().pad_token_id is None else ""
        raise CheckpointError(
            f"PyTorch itself cannot run {type(model).__name__} on {shape}: {_first_line(error).rstrip('.')}{hint}"
        ) from error
    result: npt.NDArray[np.float32] = logits.float().numpy()
    return result


@contextmanager
def _silence() -> Iterator[None]:
    """No chatter of torch, transformers and onnxscript, on stdout least of all: what matters is raised as an error."""
    disabled = logging.root.manager.disable
    # Their handlers hold the real stderr.
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
