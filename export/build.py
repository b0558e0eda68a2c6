"""One variant of one checkpoint, written to a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samescore.export.adapter import MERGE_FIRST, AdaptedCheckpoint
from samescore.export.checkpoint import Checkpoint
from samescore.export.quantize import ChannelStatistics
from samescore.export.recipes import Recipe, VariantSpec
from samescore.runtime.errors import CheckpointError, MissingDependencyError, UsageError
from samescore.runtime.manifest import Variant

Statistics = Mapping[str, ChannelStatistics]

MODEL_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"


@dataclass(frozen=True)
class Architecture:
    """A hand-built graph: which class of transformers it stands for, and the function that builds it."""

    class_name: str
    build: Callable[..., Any]


def architecture_of(checkpoint: Checkpoint) -> Architecture | None:
    """The hand-built graph for a checkpoint's class, or None (the generic route)."""
    try:
        from samescore.export.graphs import bert
    except ImportError as error:
        raise MissingDependencyError(f"export needs {error.name}: pip install 'samescore[export]'") from error
    for architecture in (Architecture(bert.ARCHITECTURE, bert.build),):
        if checkpoint.architecture == architecture.class_name:
            return architecture
    return None


def check_buildable(checkpoint: Checkpoint) -> None:
    """CheckpointError for an adapter of an architecture without a hand-built graph: tracing would see its base alone."""
    if isinstance(checkpoint, AdaptedCheckpoint) and architecture_of(checkpoint) is None:
        raise CheckpointError(
            f"{checkpoint.folder} is an adapter for {checkpoint.architecture}, which has no hand-built graph. {MERGE_FIRST}"
        )


def build_graph(
    checkpoint: Checkpoint, recipe: Recipe, folder: Path, *, statistics: Statistics | None = None, taps: bool = False
) -> Any:
    """Write `model.onnx` and its data file into `folder`; the onnx_ir model."""
    architecture = architecture_of(checkpoint)
    if architecture is None:
        raise UsageError(f"{checkpoint.architecture} has no hand-built graph")
    import onnx_ir as ir

    from samescore.export.weights import WeightFile

    weights = WeightFile(folder / DATA_NAME)
    try:
        model = architecture.build(checkpoint, weights, recipe, statistics=statistics, taps=taps)
    finally:
        weights.close()
    ir.save(model, folder / MODEL_NAME)
    check_graph(folder / MODEL_NAME)
    return model


def build_variant(
    checkpoint: Checkpoint, spec: VariantSpec, bundle: Path, *, statistics: Statistics | None = None
) -> Variant:
    """Build a variant into `bundle/<name>/`; what the manifest says of it.

    statistics: of activations, for recipes that smooth (see `samescore.calibrate`). Nothing is left behind on failure.
    """
    folder = bundle / spec.name
    folder.mkdir(parents=True)
    try:
        if architecture_of(checkpoint) is None:
            return _build_generic(checkpoint, spec, folder)
        model = build_graph(checkpoint, spec.recipe, folder, statistics=statistics)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    recipe = {
        "linear": spec.recipe.linear,
        "embedding": spec.recipe.embedding,
        "smoothing": "none"
        if statistics is None or spec.recipe.smoothing is None
        else f"alpha {spec.recipe.smoothing}",
        "graph": "fused operators, no padding" if spec.recipe.contrib else "plain ONNX, attention mask",
    }
    return _variant(spec, tuple(value.name for value in model.graph.inputs), spec.recipe.opset, recipe, (DATA_NAME,))


def _build_generic(checkpoint: Checkpoint, spec: VariantSpec, folder: Path) -> Variant:
    """Any other classifier, traced by transformers: float32 on the CPU only."""
    check_buildable(checkpoint)
    if spec.name != "cpu-fp32":
        raise CheckpointError(
            f"{checkpoint.architecture} has no hand-built graph, so only the variant cpu-fp32 can be made of it, not {spec.name}"
        )
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
        recipe=recipe,
    )


def check_graph(path: Path) -> None:
    """onnx.checker on a graph file; AssertionError would be a bug of the graph builder, so it is not caught."""
    import onnx

    onnx.checker.check_model(str(path))
