"""Variants and the recipes that make them: which numbers a file holds, and which operators it may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from samescore.runtime.errors import UsageError, did_you_mean
from samescore.runtime.manifest import Precision, Target

# Statistics of a linear layer's input channels that a tapped graph also outputs, and the operators that make them.
TAPS = {"low": "ReduceMin", "high": "ReduceMax", "mean": "ReduceMean"}
# The statistic that is the input itself, which graphs with GPTQ rounding output too.
INPUT = "input"

NumberFormat = Literal[
    "float32", "float16", "int8-row", "int8-row-a16", "int16-row", "int8-weights", "int8-blocks", "int4-blocks"
]

Task = Literal["classify", "generate"]

# What a part of the network may have instead of its format, cheapest first; the last is all but exact.
FINER: dict[NumberFormat, tuple[NumberFormat, ...]] = {
    "int8-row": ("int8-row-a16", "int16-row"),
    "int4-blocks": ("int8-row", "int8-row-a16", "int16-row"),
    "int8-weights": ("float16",),
    "int8-blocks": ("float16",),
}
FINER_EMBEDDING: dict[NumberFormat, tuple[NumberFormat, ...]] = {"int8-row": ("float16",)}


@dataclass(frozen=True)
class Recipe:
    """How a graph stores and computes.

    linear: format of the weight matrices. `int8-row` is int8 weights per output channel times uint8 activations with
      one dynamic scale per token (W8A8); `int8-row-a16` has activations of two int8 digits (W8A16), `int16-row` weights too
      (W16A16); `int8-weights` is int8 weights per output channel, dequantized to float16;
      `int8-blocks` has one scale per `block` weights of a column (fewer where that does not divide it), `int4-blocks` one
      per 32; the operator multiplies them by float activations, which float32 files round to int8 blocks on a CPU.
    embedding: format of the word embedding table; `int8-row` has one scale per row.
    contrib: fused com.microsoft operators, or plain ONNX with an attention mask.
    half: linear layers compute in float16; norms, softmax and the residual stream stay float32.
    smoothing: whether scales from calibration texts are folded in: int8 activations are smoothed (and centred, where the
      architecture can), rounded weights favour channels with large activations.
    rounding: of `int4-blocks` weights: to the nearest, or by GPTQ where calibration texts give a Gram matrix. A tapped graph
      of a recipe with GPTQ also outputs what the Gram matrices are made of.
    rounded_rows: GPTQ rounds `int8-row` and `int8-row-a16` weights too.
    state: decoders also take and return their KV cache, for shared prefixes and for long texts in chunks.
    padding: the fused graph of an encoder also takes `lengths`, so that a batch may be padded; those of decoders always do.
    chunked: fused linear attention is one GatedDeltaNet operator, of which ONNX Runtime has no CPU kernel, and not
      LinearAttention.
    block: how many weights share a scale in `int8-blocks`, at most.
    slices: in how many parts, each with activation scales of its own, `int8-row` computes a gated feed-forward's inner
      channels, the largest together. More are nearer to float32, and slower where tokens come one at a time.
    choices: parts of the network, by the beginning of their weights' names (`model.layers.0.mlp`), and the format that
      they have instead of `linear` or `embedding`.
    """

    linear: NumberFormat
    embedding: NumberFormat
    contrib: bool
    opset: int
    ir_version: int
    smoothing: bool = False
    rounding: Literal["nearest", "gptq"] = "nearest"
    rounded_rows: bool = False
    half: bool = False
    state: bool = False
    padding: bool = False
    chunked: bool = False
    choices: tuple[tuple[str, NumberFormat], ...] = ()
    block: int = 128
    slices: int = 4

    def format_of(self, name: str, default: NumberFormat | None = None) -> NumberFormat:
        """The format of a weight or linear layer of that name; default: `linear`."""
        for part, chosen in self.choices:
            if name == part or name.startswith(f"{part}."):
                return chosen
        return default or self.linear

    def options(self, part: str) -> tuple[NumberFormat, ...]:
        """The formats that a part may have, from its present one to all but exact."""
        if "embed" in part:
            return (self.embedding, *FINER_EMBEDDING.get(self.embedding, ()))
        return (self.linear, *FINER.get(self.linear, ()))

    def to_text(self) -> str:
        """The choices as one line, `part=format part=format`."""
        return " ".join(f"{part}={chosen}" for part, chosen in self.choices)

    def with_text(self, recipe: Mapping[str, str]) -> Recipe:
        """The same with the choices of a manifest's `recipe`; UsageError for formats that this recipe's parts cannot have."""
        choices: dict[str, NumberFormat] = {}
        for entry in recipe.get("parts", "").split():
            part, _, chosen = entry.partition("=")
            known = next((option for option in self.options(part) if option == chosen), None)
            if known is None:
                raise UsageError(f"the recipe has {entry!r}; {part} can be {', '.join(self.options(part))}")
            choices[part] = known
        return self.choosing(choices)

    def choosing(self, choices: Mapping[str, NumberFormat]) -> Recipe:
        """The same with these parts in these formats."""
        return replace(self, choices=tuple(choices.items()))


@dataclass(frozen=True)
class VariantSpec:
    """A named variant: what it is for and its recipe.

    certified_on: where the gate runs it. The CPU provider runs nearly every graph, so that any box can certify it; a graph
    with an operator that it has no kernel for is certified on its own target. instead: a variant that any box can certify.
    """

    name: str
    target: Target
    precision: Precision
    recipe: Recipe
    summary: str
    certified_on: Target = "cpu"
    instead: str | None = None


# Classifiers and generators alike.
_CPU_FP32 = VariantSpec(
    "cpu-fp32",
    "cpu",
    "fp32",
    Recipe("float32", "float32", contrib=True, opset=21, ir_version=10, state=True),
    "CPU, float32, fused operators",
)

# MIGraphX: one operator that it does not know puts the whole model on the CPU, so plain ONNX <= 21 only.
VARIANTS: tuple[VariantSpec, ...] = (
    _CPU_FP32,
    VariantSpec(
        "cpu-int8",
        "cpu",
        "int8",
        Recipe("int8-row", "int8-row", contrib=True, opset=21, ir_version=10, smoothing=True, state=True),
        "CPU, int8 weights, one activation scale per token, outliers smoothed from calibration texts",
    ),
    VariantSpec(
        "cpu-int4",
        "cpu",
        "int4",
        Recipe(
            "int4-blocks",
            "int8-row",
            contrib=True,
            opset=21,
            ir_version=10,
            smoothing=True,
            rounding="gptq",
            state=True,
        ),
        "CPU, 4-bit weights in blocks of 32 rounded by GPTQ, int8 embedding, float32 head: the smallest file",
    ),
    VariantSpec(
        "cuda-fp16",
        "cuda",
        "fp16",
        Recipe("float16", "float16", contrib=True, opset=21, ir_version=10, half=True, padding=True),
        "NVIDIA, float16 with float32 islands, fused operators",
    ),
    VariantSpec(
        "cuda-int8",
        "cuda",
        "int8",
        Recipe(
            "int8-blocks",
            "int8-row",
            contrib=True,
            opset=21,
            ir_version=10,
            smoothing=True,
            half=True,
            padding=True,
        ),
        "NVIDIA, int8 weights in blocks times float16 activations, float32 islands, fused operators",
    ),
    VariantSpec(
        "cuda-fp16-chunked",
        "cuda",
        "fp16",
        Recipe("float16", "float16", contrib=True, opset=21, ir_version=10, half=True, padding=True, chunked=True),
        "NVIDIA, as cuda-fp16, linear attention in chunks on tensor cores (GatedDeltaNet); exported on a CUDA box only",
        certified_on="cuda",
        instead="cuda-fp16",
    ),
    VariantSpec(
        "migraphx-fp16",
        "migraphx",
        "fp16",
        Recipe("float16", "float16", contrib=False, opset=20, ir_version=10, half=True),
        "ROCm through MIGraphX, float16 with float32 islands, plain ONNX",
    ),
    VariantSpec(
        "migraphx-int8",
        "migraphx",
        "int8",
        Recipe("int8-weights", "int8-row", contrib=False, opset=20, ir_version=10, smoothing=True, half=True),
        "ROCm through MIGraphX, int8 weights dequantized to float16, plain ONNX",
    ),
)
# Of language models that generate text. Their layers are the classifiers' but for slices, which cost one token at a time more
# than they gain, and for GPTQ; one table in blocks of int8 serves as embedding and as head. Opset 24 has TensorScatter, which
# writes into a cache in place.
GENERATION_VARIANTS: tuple[VariantSpec, ...] = (
    VariantSpec(
        "cpu-int8",
        "cpu",
        "int8",
        Recipe(
            "int8-row",
            "int8-blocks",
            contrib=True,
            opset=24,
            ir_version=10,
            smoothing=True,
            rounding="gptq",
            rounded_rows=True,
            state=True,
            block=32,
            slices=1,
        ),
        "CPU, int8 weights rounded by GPTQ, int8 activations; embedding and head in blocks of 32, the head reads activations "
        "of two int8 digits",
    ),
    replace(_CPU_FP32, recipe=replace(_CPU_FP32.recipe, opset=24)),
    VariantSpec(
        "cpu-int4",
        "cpu",
        "int4",
        Recipe(
            "int4-blocks",
            "int8-blocks",
            contrib=True,
            opset=24,
            ir_version=10,
            smoothing=True,
            rounding="gptq",
            rounded_rows=True,
            state=True,
            block=32,
        ),
        "CPU, 4-bit weights in blocks of 32 rounded by GPTQ, int8 embedding and head",
    ),
    VariantSpec(
        "cuda-fp16",
        "cuda",
        "fp16",
        Recipe("float16", "float16", contrib=True, opset=21, ir_version=10, half=True, state=True),
        "NVIDIA, float16 with float32 islands and states, float16 KV cache",
    ),
)
ALIASES = {"portable-fp16": "migraphx-fp16", "portable-int8": "migraphx-int8"}


def variant_spec(name: str, task: Task = "classify") -> VariantSpec:
    """A task's variant of that name (or alias); UsageError lists those there are."""
    wanted, variants = ALIASES.get(name, name), VARIANTS if task == "classify" else GENERATION_VARIANTS
    for spec in variants:
        if spec.name == wanted:
            return spec
    known = [spec.name for spec in variants] + (list(ALIASES) if task == "classify" else [])
    raise UsageError(f"unknown variant {name!r}; variants are {', '.join(known)}.{did_you_mean(name, known)}")


def tap_name(site: str, statistic: str) -> str:
    """The name of the graph output that holds one statistic of a linear layer's input."""
    return f"{statistic}/{site}"
