"""Llama (`LlamaForSequenceClassification`, `LlamaForCausalLM`), from the config and the tensors alone.

    ids → embedding → layers × (RMS norm → grouped-query attention with RoPE → add → RMS norm → SwiGLU → add)
        → last real token → RMS norm → score → logits

In the last layer everything after attention's keys and values is computed for the last real token alone (see `decoder`).
The graph can be cut into stages of consecutive layers, so that calibration needs one stage's weights at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs.attention import FusedAttention, PlainAttention, value_scale
from samescore.export.graphs.blocks import GraphBuilder
from samescore.export.graphs.decoder import (
    Decoder,
    DecoderConfig,
    check_known,
    decoder_facts,
    layer_parts,
    layer_stages,
)
from samescore.export.graphs.formats import make_linears
from samescore.export.quantize import ChannelStatistics, Rescaling
from samescore.export.recipes import Recipe
from samescore.export.weights import WeightFile

ARCHITECTURE = "LlamaForSequenceClassification"
VARIANTS = ("cpu-int8", "cpu-fp32", "cpu-int4", "cuda-fp16", "cuda-int8", "migraphx-fp16", "migraphx-int8")
stages = layer_stages


class LlamaConfig(DecoderConfig):
    """The facts of `config.json` that the graph needs."""

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> LlamaConfig:
        """From a checkpoint; CheckpointError for a Llama that this graph does not describe."""
        check_known(checkpoint, "llama", hidden_act="silu", attention_bias=False, mlp_bias=False)
        return cls(**decoder_facts(checkpoint, "llama"))


def build(
    checkpoint: Checkpoint,
    weights: WeightFile,
    recipe: Recipe,
    *,
    statistics: Mapping[str, ChannelStatistics] | None = None,
    taps: bool = False,
    stage: range | None = None,
    max_tokens: int | None = None,
) -> ir.Model:
    """The classifier's graph in one recipe, or the language model's (`Generator`).

    Inputs of fused recipes: `input_ids` int64 [batch, sequence], `lengths` int32 [batch] (real tokens of each row; the
    rest is right padding) and, with `recipe.state`, `past_key.<i>` and `past_value.<i>` float32 [batch, kv heads, past,
    head size] of each layer (`past` may be 0; batch 1 where it is not), which come back longer as `present_…`. Plain
    recipes: `input_ids` and `attention_mask` int64 [batch, sequence], right padding.
    Output: `logits` float32 [batch, labels].

    A language model's graph with `recipe.state` continues texts: see `decoder`. max_tokens is the
    longest text then (default: what the checkpoint allows).

    statistics: by linear layer, of its input channels on calibration texts (int8 recipes). taps: also output these
    statistics, under `tap_name`. stage: only these layers; a stage that is not the first takes `hidden` float32 [batch,
    sequence, hidden] in place of the ids, one that is not the last returns `hidden_after`.
    """
    g = GraphBuilder(weights, recipe)
    config = LlamaConfig.read(checkpoint)
    linears = make_linears(g, statistics=statistics, taps=taps)
    _Llama(g, checkpoint, config, linears, stage or range(config.layers), max_tokens=max_tokens).build()
    return g.model(checkpoint.architecture)


def parts(checkpoint: Checkpoint) -> list[list[str]]:
    """See `layer_parts`."""
    return layer_parts(["self_attn"] * int(checkpoint.config["num_hidden_layers"]))


class _Llama(Decoder[LlamaConfig]):
    """The graph under construction."""

    attention: FusedAttention | PlainAttention

    def prepare(self) -> None:
        """See Decoder."""
        if self.g.recipe.contrib:
            self.attention = FusedAttention(self.g, self.config, self.rows, self.stage, self.max_tokens)
        else:
            self.attention = PlainAttention(self.g, self.config, self.rows)

    def mix(self, x: ir.Value, pending: ir.Value | None, index: int) -> tuple[ir.Value, ir.Value]:
        """See Decoder: attention."""
        prefix = f"model.layers.{index}.self_attn"
        out = self.matrix(f"{prefix}.o_proj.weight")
        tied = (self.config.heads // self.config.kv_heads, self.config.head_size)
        after_attention = self.linears.rescaling(f"{prefix}.o_proj", out, centred=False, tied=tied)
        context, x = self._attend(x, pending, index, after_attention)
        value = self.matrix(f"{prefix}.v_proj.weight")
        reach = self.values_reach(f"model.layers.{index}.input_layernorm", value)
        out, factors = self.output_with_room(out, reach)
        y = self.linears(context, f"{prefix}.o_proj", out, rescaled=after_attention)
        return self.widened(y, factors), x

    def _attend(
        self, x: ir.Value, pending: ir.Value | None, index: int, after: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """Context rows of attention, scaled as `after` says, and the residual rows that they belong to."""
        g, config, prefix = self.g, self.config, f"model.layers.{index}"
        query, key, value = (self.matrix(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv")
        site = f"{prefix}.self_attn.qkv"
        rescaled = self.linears.rescaling(site, np.concatenate([query, key, value], axis=1), centred=False)
        if after is not None:
            value = value / value_scale(config, after)
        normed, x = self.norm(x, pending, f"{prefix}.input_layernorm", rescaled)
        normed = g.cast(normed, np.float16)
        if not self.asks_last(index):
            packed = self.linears(normed, site, np.concatenate([query, key, value], axis=1), rescaled=rescaled)
            context = self.attention.all_tokens(packed, None, None, index)
            if not self.is_last(index):
                return context, x
            return self.rows.last_of(context, self.attention.width), self.rows.last_of(x, config.hidden)
        keys_values = self.linears(
            normed, site, np.concatenate([key, value], axis=1), name=f"{site}.kv", rescaled=rescaled
        )
        last = self.rows.last_of(normed, config.hidden)
        last_query = self.linears(last, site, query, name=f"{site}.q", rescaled=rescaled)
        keys, values = g.op_many("Split", keys_values, outputs=2, axis=-1, num_outputs=2)
        return self.attention.last_token(last_query, keys, values, index), self.rows.last_of(x, config.hidden)
