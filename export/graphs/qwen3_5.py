"""Qwen3.5's text model as a classifier (label tokens), from the config and the tensors alone.

    ids → embedding → layers × (RMS norm → Gated DeltaNet | gated attention → add → RMS norm → SwiGLU → add)
        → last real token → RMS norm → score → logits

    Gated DeltaNet   q, k, v = silu(causal convolution(x W));  q, k of unit length by head;  gated delta rule
                     (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2025);  RMS norm by head, times silu(z)
    gated attention  grouped queries, RMS norm of q and k by head, RoPE over a head's first channels, times sigmoid(gate)

Everything is causal, so that what lies in right padding cannot reach the last real token: no layer needs a mask. In the
last layer everything after attention's keys and values, or after the delta rule, is computed for that token alone.

The delta rule, its convolution and its gates are float32 in every recipe, and so are the two small projections that drive
the gates: what they decide is carried through the whole text. The exception is `recipe.chunked`: see ChunkedDeltaNet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from samescore.export.checkpoint import Checkpoint, FloatArray
from samescore.export.graphs.attention import FusedAttention, PlainAttention, value_scale
from samescore.export.graphs.blocks import GraphBuilder, rms_norm
from samescore.export.graphs.decoder import (
    Decoder,
    DecoderConfig,
    check_known,
    decoder_facts,
    layer_parts,
    layer_stages,
)
from samescore.export.graphs.delta_net import (
    CHUNKED_HEAD_SIZE,
    ChunkedDeltaNet,
    DeltaHeads,
    FusedDeltaNet,
    PlainDeltaNet,
)
from samescore.export.graphs.formats import make_linears
from samescore.export.graphs.headroom import reach_after_norm
from samescore.export.graphs.linears import silu
from samescore.export.graphs.rope import rope_parameters
from samescore.export.quantize import ChannelStatistics, Rescaling
from samescore.export.recipes import Recipe
from samescore.export.weights import WeightFile
from samescore.runtime.errors import CheckpointError

LANGUAGE_MODELS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM")
VARIANTS = (
    "cpu-int8",
    "cpu-fp32",
    "cpu-int4",
    "cuda-fp16",
    "cuda-int8",
    "cuda-fp16-chunked",
    "migraphx-fp16",
    "migraphx-int8",
)
LINEAR, FULL = "linear_attention", "full_attention"
# transformers' defaults, for what a config leaves out.
FULL_ATTENTION_INTERVAL = 4
ROTARY_FACTOR = 0.25
# Inside the root, as transformers and flash-linear-attention have it: a head of zeros stays zero.
L2_EPS = 1e-6
stages = layer_stages


@dataclass(frozen=True)
class Qwen35Config(DecoderConfig):
    """The facts of the text model's config that the graph needs.

    layer_types: `linear_attention` or `full_attention`, of each layer. delta: the shapes of linear attention.
    """

    layer_types: tuple[str, ...]
    delta: DeltaHeads

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Qwen35Config:
        """From a checkpoint's text config; CheckpointError for a model that this graph does not describe."""
        check_known(checkpoint, "qwen3_5", hidden_act="silu", attention_bias=False)
        config = checkpoint.config
        factor = rope_parameters(checkpoint).get(
            "partial_rotary_factor", config.get("partial_rotary_factor", ROTARY_FACTOR)
        )
        key_heads, value_heads = (int(config[f"linear_num_{part}_heads"]) for part in ("key", "value"))
        if value_heads % key_heads:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has {value_heads} value heads for {key_heads} key heads in its linear "
                "attention; the qwen3_5 graph knows multiples"
            )
        return cls(
            **decoder_facts(checkpoint, "qwen3_5", rotary_factor=float(factor)),
            layer_types=layer_types(checkpoint),
            delta=DeltaHeads(
                key_heads=key_heads,
                value_heads=value_heads,
                key_size=int(config["linear_key_head_dim"]),
                value_size=int(config["linear_value_head_dim"]),
                kernel=int(config["linear_conv_kernel_dim"]),
            ),
        )


def layer_types(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The kind of each layer; CheckpointError for kinds other than the two, or too few of them."""
    config = checkpoint.config
    layers = int(config["num_hidden_layers"])
    interval = int(config.get("full_attention_interval") or FULL_ATTENTION_INTERVAL)
    types = config.get("layer_types") or [LINEAR if (i + 1) % interval else FULL for i in range(layers)]
    if unknown := sorted(set(types) - {LINEAR, FULL}):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has layer_types {', '.join(map(repr, unknown))}; the qwen3_5 graph knows "
            f"{LINEAR!r} and {FULL!r}"
        )
    if len(types) != layers:
        raise CheckpointError(f"{checkpoint.folder}: config.json has {len(types)} layer_types for {layers} layers")
    return tuple(types)


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
    rest is right padding) and, with `recipe.state`, float32 of each layer i, which come back as `present_…` of the same
    name: `past_key.<i>` and `past_value.<i>` [batch, kv heads, past, head size] of full attention (longer when they come
    back; batch 1 where `past` is not 0); `past_conv.<i>` [batch, channels, kernel - 1] and `past_recurrent.<i>` [batch,
    value heads, key size, value size] of linear attention (zeros before the first token). Padding enters what comes back:
    states are for texts without it. Plain recipes: `input_ids` and `attention_mask` int64 [batch, sequence], right padding.
    Output: `logits` float32 [batch, labels].

    A language model's graph with `recipe.state` continues texts: see `decoder`. max_tokens is the longest text then too.

    statistics: by linear layer, of its input channels on calibration texts (recipes that smooth). taps: also output these
    statistics, under `tap_name`. stage: only these layers; a stage that is not the first takes `hidden` float32 [batch,
    sequence, hidden] in place of the ids, one that is not the last returns `hidden_after`. max_tokens: the longest text,
    which plain recipes must know (default: what the checkpoint allows).

    CheckpointError for a config that the graph does not describe.
    """
    g = GraphBuilder(weights, recipe)
    config = Qwen35Config.read(checkpoint)
    linears = make_linears(g, statistics=statistics, taps=taps)
    _Qwen35(g, checkpoint, config, linears, stage or range(config.layers), max_tokens=max_tokens).build()
    return g.model(checkpoint.architecture)


def parts(checkpoint: Checkpoint) -> list[list[str]]:
    """See `layer_parts`."""
    return layer_parts(["linear_attn" if kind == LINEAR else "self_attn" for kind in layer_types(checkpoint)])


class _Qwen35(Decoder[Qwen35Config]):
    """The graph under construction."""

    norm_offset = 1.0
    attention: FusedAttention | PlainAttention
    delta_net: FusedDeltaNet | PlainDeltaNet

    def prepare(self) -> None:
        """See Decoder."""
        g, config, rows = self.g, self.config, self.rows
        linear, full = ([i for i in self.stage if config.layer_types[i] == kind] for kind in (LINEAR, FULL))
        if g.recipe.contrib:
            self.attention = FusedAttention(g, config, rows, full, self.max_tokens)
            self.delta_net = self._chunked() if g.recipe.chunked else FusedDeltaNet(g, config.delta, linear)
            return
        self.attention = PlainAttention(g, config, rows)
        self.delta_net = PlainDeltaNet(g, config.delta, rows.sequence, self.max_tokens)

    def _chunked(self) -> ChunkedDeltaNet:
        """CheckpointError for heads that would make the operator fall back to going token by token."""
        delta = self.config.delta
        if {delta.key_size, delta.value_size} != {CHUNKED_HEAD_SIZE}:
            raise CheckpointError(
                f"{self.checkpoint.folder}: config.json has linear attention's heads of {delta.key_size} and "
                f"{delta.value_size} channels; GatedDeltaNet reads chunks of heads of {CHUNKED_HEAD_SIZE} only. Take a "
                "variant without it, cuda-fp16"
            )
        return ChunkedDeltaNet(self.g, delta, self.rows.batch)

    def mix(self, x: ir.Value, pending: ir.Value | None, index: int) -> tuple[ir.Value, ir.Value]:
        """See Decoder: Gated DeltaNet or gated attention."""
        linear = self.config.layer_types[index] == LINEAR
        site = f"model.layers.{index}." + ("linear_attn.out_proj" if linear else "self_attn.o_proj")
        out = self.matrix(f"{site}.weight")
        config = self.config
        # The norm's weight, or a KV head's values, serve several heads.
        repeats = config.delta.value_heads if linear else config.heads // config.kv_heads
        tied = (repeats, config.delta.value_size if linear else config.head_size)
        after = self.linears.rescaling(site, out, centred=False, tied=tied)
        context, x = (self._delta_net if linear else self._attend)(x, pending, index, after)
        out, factors = self.output_with_room(out, self._reach(index))
        return self.widened(self.linears(context, site, out, rescaled=after), factors), x

    def _reach(self, index: int) -> FloatArray:
        """The largest |input| of a token mixer's last matrix for any text, [heads * size]."""
        norm, prefix, config = f"model.layers.{index}.input_layernorm", f"model.layers.{index}", self.config
        if config.layer_types[index] == FULL:
            # The gate's sigmoid enlarges nothing.
            return self.values_reach(norm, self.matrix(f"{prefix}.self_attn.v_proj.weight"))
        size = config.delta.value_size
        normed = np.float32(math.sqrt(size)) * np.abs(self.tensor(f"{prefix}.linear_attn.norm.weight"))
        z = reach_after_norm(self.norm_weight(norm), self.matrix(f"{prefix}.linear_attn.in_proj_z.weight"))
        reach: FloatArray = np.tile(normed, config.delta.value_heads) * z
        return reach

    def _attend(
        self, x: ir.Value, pending: ir.Value | None, index: int, after: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """Gated context rows of attention, scaled as `after` says, and the residual rows that they belong to."""
        g, config, prefix = self.g, self.config, f"model.layers.{index}.self_attn"
        site = f"{prefix}.qkv"
        query, gate = self._query_and_gate(f"{prefix}.q_proj.weight")
        key, value = (self.matrix(f"{prefix}.{part}_proj.weight") for part in "kv")
        rescaled = self.linears.rescaling(site, np.concatenate([query, gate, key, value], axis=1), centred=False)
        if after is not None:
            value = value / value_scale(config, after)
        normed, x = self.norm(x, pending, f"model.layers.{index}.input_layernorm", rescaled)
        normed = g.cast(normed, np.float16)

        def project(rows: ir.Value, part: str, weight: FloatArray) -> ir.Value:
            return self.linears(rows, site, weight, name=f"{prefix}.{part}_proj", rescaled=rescaled)

        keys = self._head_norm(project(normed, "k", key), f"{prefix}.k_norm.weight", config.kv_heads)
        values = project(normed, "v", value)
        last = self.asks_last(index)
        if last:
            normed, x = (self.rows.last_of(rows, config.hidden) for rows in (normed, x))
        queries = self._head_norm(project(normed, "q", query), f"{prefix}.q_norm.weight", config.heads)
        attend = self.attention.last_token if last else self.attention.all_tokens
        context = attend(queries, keys, values, index)
        if self.is_last(index) and not last:
            normed, x = (self.rows.last_of(rows, config.hidden) for rows in (normed, x))
            context = self.rows.last_of(context, self.attention.width)
        return g.op("Mul", context, g.op("Sigmoid", project(normed, "gate", gate))), x

    def _query_and_gate(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Both [hidden, heads * head_size]; in the checkpoint they alternate by head."""
        config = self.config
        both = self.tensor(name).reshape(config.heads, 2, config.head_size, config.hidden)
        query, gate = (both[:, part].reshape(-1, config.hidden) for part in (0, 1))
        return np.ascontiguousarray(query.T), np.ascontiguousarray(gate.T)

    def _head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        """RMS norm of each head of rows [rows, heads * head_size], computed in float32."""
        g = self.g
        weight = g.weight(name, self.tensor(name) + np.float32(self.norm_offset))
        return g.cast(
            _norm_heads(g, g.cast(x, np.float32), heads, self.config.head_size, weight, self.config.eps), np.float16
        )

    def _delta_net(
        self, x: ir.Value, pending: ir.Value | None, index: int, after: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """Gated output rows of the delta rule, scaled as `after` says, and the residual rows that they belong to."""
        g, config, prefix = self.g, self.config, f"model.layers.{index}.linear_attn"
        site = f"{prefix}.in_proj"
        qkv, z = (self.matrix(f"{site}_{part}.weight") for part in ("qkv", "z"))
        rescaled = self.linears.rescaling(site, np.concatenate([qkv, z], axis=1), centred=False)
        normed, x = self.norm(x, pending, f"model.layers.{index}.input_layernorm", rescaled)
        decay, beta = self._gates(normed, prefix, rescaled)
        normed = g.cast(normed, np.float16)
        mixed = g.cast(self.linears(normed, site, qkv, name=f"{site}_qkv", rescaled=rescaled), np.float32)
        context = self._recall(mixed, decay, beta, prefix, index)
        if self.is_last(index):
            normed, x = (self.rows.last_of(rows, config.hidden) for rows in (normed, x))
            context = self.rows.last_of(context, config.delta.value_width)
        weight = self.tensor(f"{prefix}.norm.weight")
        if after is not None:
            weight = weight / after.scale[: config.delta.value_size]
        stored = g.weight(f"{prefix}.norm.weight", weight)
        context = _norm_heads(g, context, config.delta.value_heads, config.delta.value_size, stored, config.eps)
        z_rows = self.linears(normed, site, z, name=f"{site}_z", rescaled=rescaled)
        gated = g.op("Mul", context, silu(g, g.cast(z_rows, np.float32)))
        return g.cast(gated, np.float16), x

    def _gates(self, normed: ir.Value, prefix: str, rescaled: Rescaling | None) -> tuple[ir.Value, ir.Value]:
        """The delta rule's decay (logarithm) and beta, float32 [batch, sequence, value heads]."""
        g, config = self.g, self.config
        both = np.concatenate([self.matrix(f"{prefix}.in_proj_{part}.weight") for part in "ab"], axis=1)
        weight = g.weight(f"{prefix}.in_proj_ab.weight", both if rescaled is None else both * rescaled.scale[:, None])
        rows = self.rows.unflatten(g.op("MatMul", normed, weight), 2 * config.delta.value_heads)
        a, b = g.op_many("Split", rows, outputs=2, axis=-1, num_outputs=2)
        bias = g.weight(f"{prefix}.dt_bias", self.tensor(f"{prefix}.dt_bias"))
        rate = g.weight(f"{prefix}.A", -np.exp(self.tensor(f"{prefix}.A_log")))
        return self.delta_net.gates(a, bias, rate, b)

    def _recall(self, mixed: ir.Value, decay: ir.Value, beta: ir.Value, prefix: str, index: int) -> ir.Value:
        """What the delta rule reads for each token, float32 rows [batch * sequence, value heads * value size].

        mixed: float32 rows [batch * sequence, channels].
        """
        g, config, rows = self.g, self.config, self.rows
        kernel = g.weight(f"{prefix}.conv1d.weight", self.tensor(f"{prefix}.conv1d.weight"))
        convolved = silu(g, self.delta_net.convolve(rows.unflatten(mixed, config.delta.channels), kernel, index))
        widths = [config.delta.key_width, config.delta.key_width, config.delta.value_width]
        query, key, value = g.op_many("Split", convolved, g.ints(*widths), outputs=3, axis=-1)
        # x / sqrt(sum(x²) + eps) is an RMS norm with eps / size and the weight 1 / sqrt(size); queries are scaled by
        # another 1 / sqrt(size), as attention's are.
        unit = 1 / math.sqrt(config.delta.key_size)
        query, key = (
            rows.unflatten(self._unit_heads(x, scale), config.delta.key_width)
            for x, scale in ((query, unit), (key, 1.0))
        )
        context = self.delta_net.rule(query, key, value, decay, beta, index)
        return g.op("Reshape", context, g.ints(-1, config.delta.value_width))

    def _unit_heads(self, x: ir.Value, length: float) -> ir.Value:
        """Each head of the delta rule's queries or keys with this length; rows [batch * sequence, key width]."""
        size = self.config.delta.key_size
        weight = self.g.constant(np.full(size, length / math.sqrt(size)), np.float32)
        return _norm_heads(self.g, x, self.config.delta.key_heads, size, weight, L2_EPS / size)


def _norm_heads(g: GraphBuilder, x: ir.Value, heads: int, size: int, weight: ir.Value, eps: float) -> ir.Value:
    """RMS norm of each head of float32 [..., heads * size] with the weight [size]; rows [rows, heads * size]."""
    normed = rms_norm(g, g.op("Reshape", x, g.ints(-1, size)), weight, eps)
    return g.op("Reshape", normed, g.ints(-1, heads * size))
