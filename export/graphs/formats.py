"""The recipe's way to multiply: each linear layer in the number format that the recipe chose for its part of the network."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from samescore.export.graphs.blocks import FloatArray, GraphBuilder
from samescore.export.graphs.linears import (
    Blocks4Linears,
    Blocks8Linears,
    FloatLinears,
    GatedWeights,
    Linears,
    WeightOnlyInt8Linears,
)
from samescore.export.graphs.row_linears import RowDigitLinears, RowInt8Linears
from samescore.export.quantize import ChannelStatistics, Rescaling
from samescore.export.recipes import NumberFormat

Statistics = Mapping[str, ChannelStatistics]


class ChosenLinears:
    """Hands every layer to the format that the recipe has for it."""

    def __init__(self, g: GraphBuilder, statistics: Statistics | None, taps: bool):
        self.g = g
        self.statistics = statistics
        self.taps = taps
        self._made: dict[NumberFormat, Linears] = {}

    def rescaling(
        self, site: str, weight: FloatArray, *, centred: bool = True, tied: tuple[int, int] | None = None
    ) -> Rescaling | None:
        """See Linears."""
        return self._of(site).rescaling(site, weight, centred=centred, tied=tied)

    def __call__(
        self,
        x: ir.Value,
        site: str,
        weight: FloatArray,
        bias: FloatArray | None = None,
        *,
        name: str | None = None,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        """See Linears."""
        return self._of(site)(x, site, weight, bias, name=name, after_gelu=after_gelu, rescaled=rescaled)

    def gated(self, x: ir.Value, prefix: str, weights: GatedWeights, rescaled: Rescaling | None) -> ir.Value:
        """See Linears."""
        return self._of(prefix).gated(x, prefix, weights, rescaled)

    def _of(self, site: str) -> Linears:
        number_format = self.g.recipe.format_of(site)
        if number_format not in self._made:
            self._made[number_format] = _linears(self.g, number_format, self.statistics, self.taps)
        return self._made[number_format]


def make_linears(g: GraphBuilder, *, statistics: Statistics | None = None, taps: bool = False) -> Linears:
    """How the graph's recipe multiplies."""
    if g.recipe.choices:
        return ChosenLinears(g, statistics, taps)
    return _linears(g, g.recipe.linear, statistics, taps)


def _linears(g: GraphBuilder, number_format: NumberFormat, statistics: Statistics | None, taps: bool) -> Linears:
    match number_format:
        case "int8-row":
            return RowInt8Linears(g, statistics)
        case "int8-row-a16":
            return RowDigitLinears(g, statistics, wide_weights=False)
        case "int16-row":
            return RowDigitLinears(g, statistics, wide_weights=True)
        case "int8-weights":
            return WeightOnlyInt8Linears(g, statistics)
        case "int8-blocks":
            return Blocks8Linears(g, statistics)
        case "int4-blocks":
            return Blocks4Linears(g, statistics)
        case _:
            return FloatLinears(g, taps=taps)
