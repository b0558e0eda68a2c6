"""Variants and the recipes that make them: which numbers a file holds, and which operators it may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samescore.runtime.errors import UsageError, did_you_mean
from samescore.runtime.manifest import Precision, Target

# Statistics of a linear layer's input channels that a tapped graph also outputs, and the operators that make them.
TAPS = {"low": "ReduceMin", "high": "ReduceMax", "mean": "ReduceMean"}

NumberFormat = Literal["float32", "float16", "int8-row"]


@dataclass(frozen=True)
class Recipe:
    """How a graph stores and computes.

    linear: format of the weight matrices; `int8-row` is int8 weights per output channel times uint8 activations with one
      dynamic scale per token. embedding: format of the word embedding table; `int8-row` has one scale per row.
    contrib: fused com.microsoft operators and no attention mask (texts run unpadded), or plain ONNX with a mask.
    smoothing: SmoothQuant's alpha for int8 activations, which are also centred; None leaves them as they are.
    """

    linear: NumberFormat
    embedding: NumberFormat
    contrib: bool
    opset: int
    ir_version: int
    smoothing: float | None = None


@dataclass(frozen=True)
class VariantSpec:
    """A named variant: what it is for and its recipe."""

    name: str
    target: Target
    precision: Precision
    recipe: Recipe
    summary: str


VARIANTS: tuple[VariantSpec, ...] = (
    VariantSpec(
        "cpu-fp32",
        "cpu",
        "fp32",
        Recipe("float32", "float32", contrib=True, opset=21, ir_version=10),
        "CPU, float32, fused operators",
    ),
    VariantSpec(
        "cpu-int8",
        "cpu",
        "int8",
        Recipe("int8-row", "int8-row", contrib=True, opset=21, ir_version=10, smoothing=0.65),
        "CPU, int8 weights, one activation scale per token, outliers smoothed from calibration texts",
    ),
    VariantSpec(
        "migraphx-fp16",
        "migraphx",
        "fp16",
        # MIGraphX: one operator that it does not know puts the whole model on the CPU, so plain ONNX <= 21 only.
        Recipe("float16", "float16", contrib=False, opset=20, ir_version=10),
        "ROCm through MIGraphX, float16 with float32 islands, plain ONNX",
    ),
)
ALIASES = {"portable-fp16": "migraphx-fp16"}


def variant_spec(name: str) -> VariantSpec:
    """The variant of that name (or alias); UsageError lists those there are."""
    wanted = ALIASES.get(name, name)
    for spec in VARIANTS:
        if spec.name == wanted:
            return spec
    known = [spec.name for spec in VARIANTS] + list(ALIASES)
    raise UsageError(f"unknown variant {name!r}; variants are {', '.join(known)}.{did_you_mean(name, known)}")


def tap_name(site: str, statistic: str) -> str:
    """The name of the graph output that holds one statistic of a linear layer's input."""
    return f"{statistic}/{site}"
