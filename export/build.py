"""One variant of one checkpoint, written to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from samescore.export.adapter import MERGE_FIRST, AdaptedCheckpoint
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import Recipe, VariantSpec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import CheckpointError, MissingDependencyError, UsageError
from samescore.runtime.manifest import Variant

Statistics = Mapping[str, ChannelStatistics]

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"


@dataclass(frozen=True)
class Architecture:
    """A hand-built graph: the classes of transformers it stands for, the function that builds it, and what it offers.

    classifiers: classes with a trained head. language_models: classes that label tokens make a classifier of
    (`TokenScorer`). variants: names, the first is the default. parts: what a recipe may choose a format for, by stage.
    stages: the layers, cut so that calibration holds one stage at a time; or None for a graph that is built whole.
    bounded: its plain form reads texts up to a limit only, so `build` takes `max_tokens`.
    """

    classifiers: tuple[str, ...]
    language_models: tuple[str, ...]
    build: Callable[..., Any]
    variants: tuple[str, ...]
    parts: Callable[[Checkpoint], list[list[str]]]
    stages: Callable[[Checkpoint], list[range]] | None = None
    bounded: bool = False

    def limit(self, recipe: Recipe, max_tokens: int | None) -> int | None:
        """The longest text that the graph of a recipe can read; None: as long as memory allows."""
        return max_tokens if self.bounded and not recipe.contrib else None


def architectures() -> tuple[Architecture, ...]:
    """Every hand-built graph."""
    try:
        from samescore.export.graphs import bert, llama, qwen3_5
    except ImportError as error:
        raise MissingDependencyError(f"export needs {error.name}: pip install 'samescore[export]'") from error
    return (
        Architecture((bert.ARCHITECTURE,), (), bert.build, bert.VARIANTS, bert.parts, bert.stages),
        Architecture(
            (llama.ARCHITECTURE,), ("LlamaForCausalLM",), llama.build, llama.VARIANTS, llama.parts, llama.stages
        ),
        Architecture(
            (), qwen3_5.LANGUAGE_MODELS, qwen3_5.build, qwen3_5.VARIANTS, qwen3_5.parts, qwen3_5.stages, bounded=True
        ),
    )


def architecture_of(checkpoint: Checkpoint) -> Architecture | None:
    """The hand-built graph for a checkpoint's class, or None (the generic route)."""
    name, scorer = checkpoint.architecture, isinstance(checkpoint, TokenScorer)
    return next((a for a in architectures() if name in (a.language_models if scorer else a.classifiers)), None)


def check_variant(checkpoint: Checkpoint, spec: VariantSpec) -> None:
    """UsageError for a variant that the checkpoint's architecture does not offer."""
    architecture = architecture_of(checkpoint)
    offered = architecture.variants if architecture else ("cpu-fp32",)
    if spec.name not in offered:
        why = "" if architecture else " (it has no hand-built graph)"
        raise UsageError(
            f"{checkpoint.architecture} cannot be exported as {spec.name}{why}; its variants are {', '.join(offered)}"
        )


def check_buildable(checkpoint: Checkpoint) -> None:
    """CheckpointError for what neither a hand-built graph nor tracing can export as a classifier."""
    known = [name for architecture in architectures() for name in architecture.language_models]
    if checkpoint.architecture in known and not isinstance(checkpoint, TokenScorer):
        raise CheckpointError(
            f"{checkpoint.folder} holds a language model ({checkpoint.architecture}), not a classifier. To score its next "
            "token, name the tokens: --label-tokens Yes,No"
        )
    if isinstance(checkpoint, TokenScorer) and checkpoint.architecture not in known:
        raise CheckpointError(
            f"{checkpoint.folder} is a {checkpoint.architecture}; label tokens are scored by {', '.join(known)}"
        )
    if isinstance(checkpoint, AdaptedCheckpoint) and architecture_of(checkpoint) is None:
        raise CheckpointError(
            f"{checkpoint.folder} is an adapter for {checkpoint.architecture}, which has no hand-built graph. {MERGE_FIRST}"
        )


def build_graph(
    checkpoint: Checkpoint,
    recipe: Recipe,
    folder: Path,
    *,
    statistics: Statistics | None = None,
    taps: bool = False,
    stage: range | None = None,
    max_tokens: int | None = None,
) -> Any:
    """Write `model.onnx` and its data file into `folder`; the onnx_ir model.

    taps: the graph also outputs its linear layers' input statistics. stage: build only these layers. max_tokens: the
    longest text that it must read.
    """
    architecture = architecture_of(checkpoint)
    if architecture is None:
        raise UsageError(f"{checkpoint.architecture} has no hand-built graph")
    import onnx_ir as ir

    from samescore.export.weights import WeightFile

    options: dict[str, Any] = {} if stage is None else {"stage": stage}
    if limit := architecture.limit(recipe, max_tokens):
        options["max_tokens"] = limit
    weights = WeightFile(folder / DATA_NAME)
    try:
        model = architecture.build(checkpoint, weights, recipe, statistics=statistics, taps=taps, **options)
    finally:
        weights.close()
    ir.save(model, folder / MODEL_NAME)
    check_graph(folder / MODEL_NAME)
    return model


def build_variant(
    checkpoint: Checkpoint,
    spec: VariantSpec,
    bundle: Path,
    *,
    max_tokens: int,
    statistics: Statistics | None = None,
) -> Variant:
    """Build a variant into `bundle/<name>/`; what the manifest says of it.

    max_tokens: the longest text that it must read. statistics: of activations, for recipes that smooth (see
    `samescore.calibrate`). Nothing is left behind on failure.
    """
    check_variant(checkpoint, spec)
    folder = bundle / spec.name
    folder.mkdir(parents=True)
    try:
        architecture = architecture_of(checkpoint)
        if architecture is None:
            return _build_generic(checkpoint, spec, folder)
        model = build_graph(checkpoint, spec.recipe, folder, statistics=statistics, max_tokens=max_tokens)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    recipe = {
        "linear": spec.recipe.linear,
        "embedding": spec.recipe.embedding,
        "smoothing": "from calibration texts" if statistics and spec.recipe.smoothing else "none",
        "graph": "fused operators, no padding" if spec.recipe.contrib else "plain ONNX, attention mask",
    }
    if spec.recipe.choices:
        recipe["parts"] = spec.recipe.to_text()
    inputs = tuple(value.name for value in model.graph.inputs)
    variant = _variant(spec, inputs, spec.recipe.opset, recipe, (DATA_NAME,))
    return replace(variant, max_tokens=architecture.limit(spec.recipe, max_tokens))


def _build_generic(checkpoint: Checkpoint, spec: VariantSpec, folder: Path) -> Variant:
    """Any other classifier, traced by transformers: float32 on the CPU only."""
    check_buildable(checkpoint)
    from samescore.export.generic import export_generic

    graph = export_generic(checkpoint.folder, folder)
    recipe = {
        "linear": "float32",
        "embedding": "float32",
        "smoothing": "none",
        "graph": "traced by transformers.exporters",
    }
    return _variant(spec, graph.inputs, graph.opset, recipe, graph.data_files)


def _variant(
    spec: VariantSpec, inputs: tuple[str, ...], opset: int, recipe: Mapping[str, str], data: tuple[str, ...]
) -> Variant:
    return Variant(
        name=spec.name,
        target=spec.target,
        precision=spec.precision,
        model=f"{spec.name}/{MODEL_NAME}",
        data=tuple(f"{spec.name}/{name}" for name in data),
        inputs=inputs,
        opset=opset,
        max_tokens=None,
        recipe=recipe,
    )


def check_graph(path: Path) -> None:
    """onnx.checker on a graph file; AssertionError would be a bug of the graph builder, so it is not caught."""
    import onnx

    onnx.checker.check_model(str(path))
