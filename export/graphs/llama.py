"""Llama sequence classification (`LlamaForSequenceClassification`), from the config and the tensors alone.

    ids → embedding → layers × (RMS norm → grouped-query attention with RoPE → add → RMS norm → SwiGLU → add)
        → last real token → RMS norm → score → logits

Only the last real token is read at the end, so in the last layer everything after its keys and values is computed for
that token alone; its place comes from `lengths` (or the mask), never from a comparison with a pad id. Rows are kept flat
[batch * sequence, hidden]; only attention sees the batch. The residual stream is float32 in every recipe.

The graph can be cut into stages of consecutive layers, so that calibration needs one stage's weights at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs.blocks import GraphBuilder, add_rms_norm, embedding, rms_norm
from samescore.export.graphs.linears import GatedWeights, Linears, make_linears
from samescore.export.quantize import ChannelStatistics, Rescaling
from samescore.export.recipes import Recipe
from samescore.export.weights import WeightFile
from samescore.runtime.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]

ARCHITECTURE = "LlamaForSequenceClassification"
VARIANTS = ("cpu-int8", "cpu-fp32", "cpu-int4", "cuda-fp16", "migraphx-fp16", "migraphx-int8")
HEAD_SIZE_STEP = 16
# Scores of keys that a query may not see.
HIDDEN_SCORE = -1e30


@dataclass(frozen=True)
class LlamaConfig:
    """The facts of `config.json` that the graph needs. rope: inverse frequencies float32 [head_size / 2]."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    inner: int
    vocabulary: int
    eps: float
    rope: FloatArray
    labels: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> LlamaConfig:
        """From a checkpoint; CheckpointError for a Llama that this graph does not describe."""
        config = checkpoint.config
        for key, known in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if config.get(key, known) != known:
                raise CheckpointError(
                    f"{checkpoint.folder}: config.json has {key} = {config[key]!r}; the llama graph knows {known!r}"
                )
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or hidden // heads)
        if head_size % HEAD_SIZE_STEP:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has heads of {head_size} channels; the llama graph knows multiples of "
                f"{HEAD_SIZE_STEP} (GroupQueryAttention takes no others)"
            )
        return cls(
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=head_size,
            layers=int(config["num_hidden_layers"]),
            inner=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=inverse_frequencies(checkpoint, head_size),
            labels=len(checkpoint.labels),
        )


def inverse_frequencies(checkpoint: Checkpoint, head_size: int) -> FloatArray:
    """RoPE's inverse frequencies float32 [head_size / 2]: plain, `linear` or `llama3` scaled.

    The llama3 formula is Llama 3.1's: wavelengths beyond `original / low_freq_factor` are stretched by `factor`, those
    below `original / high_freq_factor` are kept, and between them the two are mixed linearly.
    """
    config = checkpoint.config
    # transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    plain: FloatArray = (1.0 / np.float32(rope.get("rope_theta", 10000.0)) ** exponents).astype(np.float32)
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(rope["factor"])
    if kind != "llama3":
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has rope_type = {kind!r}; the llama graph knows 'default', 'linear' and "
            "'llama3'"
        )
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths = 2 * math.pi / plain
    original = float(rope["original_max_position_embeddings"])
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    mixed: FloatArray = ((1 - kept) * plain / float(rope["factor"]) + kept * plain).astype(np.float32)
    return mixed


def stages(checkpoint: Checkpoint) -> list[range]:
    """The layers, one stage each."""
    return [range(index, index + 1) for index in range(int(checkpoint.config["num_hidden_layers"]))]


def build(
    checkpoint: Checkpoint,
    weights: WeightFile,
    recipe: Recipe,
    *,
    statistics: Mapping[str, ChannelStatistics] | None = None,
    taps: bool = False,
    stage: range | None = None,
) -> ir.Model:
    """The classifier's graph in one recipe.

    Inputs of fused recipes: `input_ids` int64 [batch, sequence], `lengths` int32 [batch] (real tokens of each row; the
    rest is right padding) and, with `recipe.state`, `past_key.<i>` and `past_value.<i>` float32 [batch, kv heads, past,
    head size] of each layer (`past` may be 0; batch 1 where it is not), which come back longer as `present_…`. Plain
    recipes: `input_ids` and `attention_mask` int64 [batch, sequence], right padding.
    Output: `logits` float32 [batch, labels].

    statistics: by linear layer, of its input channels on calibration texts (int8 recipes). taps: also output these
    statistics, under `tap_name`. stage: only these layers; a stage that is not the first takes `hidden` float32 [batch,
    sequence, hidden] in place of the ids, one that is not the last returns `hidden_after`.
    """
    g = GraphBuilder(weights, recipe)
    config = LlamaConfig.read(checkpoint)
    linears = make_linears(g, statistics=statistics, taps=taps)
    _Llama(g, checkpoint, config, linears, stage or range(config.layers)).build()
    return g.model(checkpoint.architecture)


class _Llama:
    """The graph under construction."""

    def __init__(self, g: GraphBuilder, checkpoint: Checkpoint, config: LlamaConfig, linears: Linears, stage: range):
        self.g = g
        self.checkpoint = checkpoint
        self.config = config
        self.linears = linears
        self.stage = stage
        self.attention = _FusedAttention(g, config) if g.recipe.contrib else _PlainAttention(g, config)

    def build(self) -> None:
        """Emit every node."""
        g, config = self.g, self.config
        shape = ["batch", "sequence"]
        if self.stage.start == 0:
            source = g.input("input_ids", ir.DataType.INT64, shape)
            name = "model.embed_tokens.weight"
            table = (config.vocabulary, config.hidden)
            x = embedding(g, name, lambda: self.checkpoint.row_chunks(name), table, source)
        else:
            source = x = g.input("hidden", ir.DataType.FLOAT, [*shape, config.hidden])
        self.attention.prepare(source, self.stage)
        x = g.op("Reshape", x, g.ints(-1, config.hidden))
        # What the block before has computed is added to the residual stream by the next norm.
        pending: ir.Value | None = None
        for index in self.stage:
            x, pending = self._layer(x, pending, index)
        assert pending is not None
        if self.stage.stop < config.layers:
            hidden = g.op("Reshape", g.op("Add", x, pending), self.attention.batch_shape(config.hidden))
            g.output(hidden, "hidden_after", ir.DataType.FLOAT, [*shape, config.hidden])
            return
        norm = g.weight("model.norm.weight", self._tensor("model.norm.weight"))
        normed, _ = add_rms_norm(g, x, pending, norm, config.eps)
        score = g.weight("score.weight", self._matrix("score.weight"))
        g.output(g.op("MatMul", normed, score), "logits", ir.DataType.FLOAT, ["batch", config.labels])

    def _layer(self, x: ir.Value, pending: ir.Value | None, index: int) -> tuple[ir.Value, ir.Value]:
        """The residual stream and what is to be added to it; in the last layer, rows [batch, hidden] of the last token."""
        g, prefix = self.g, f"model.layers.{index}"
        out = self._matrix(f"{prefix}.self_attn.o_proj.weight")
        repeats = self.config.heads // self.config.kv_heads
        tied = (repeats, self.config.head_size)
        after_attention = self.linears.rescaling(f"{prefix}.self_attn.o_proj", out, centred=False, tied=tied)
        context, x = self._attend(x, pending, index, after_attention)
        y = g.cast(self.linears(context, f"{prefix}.self_attn.o_proj", out, rescaled=after_attention), np.float32)
        del out
        weights = GatedWeights(*(self._matrix(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")))
        both = np.concatenate([weights.gate, weights.up], axis=1)
        rescaled = self.linears.rescaling(f"{prefix}.mlp.gate_up", both, centred=False)
        normed, x = self._norm(x, y, f"{prefix}.post_attention_layernorm", rescaled)
        return x, g.cast(self.linears.gated(normed, f"{prefix}.mlp", weights, rescaled), np.float32)

    def _attend(
        self, x: ir.Value, pending: ir.Value | None, index: int, after: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """Context rows of attention, and the residual rows that they belong to.

        What smooths the output projection's input is folded into the value projection: attention takes weighted means
        of value rows, so a scale per channel passes through it.
        """
        prefix, size = f"model.layers.{index}", self.config.head_size
        query, key, value = (self._matrix(f"{prefix}.self_attn.{part}_proj.weight") for part in "qkv")
        site = f"{prefix}.self_attn.qkv"
        rescaled = self.linears.rescaling(site, np.concatenate([query, key, value], axis=1), centred=False)
        if after is not None:
            repeats = self.config.heads // self.config.kv_heads
            value = value / after.scale.reshape(-1, repeats, size)[:, 0].reshape(-1)
        normed, x = self._norm(x, pending, f"{prefix}.input_layernorm", rescaled)
        if index < self.config.layers - 1:
            packed = self.linears(normed, site, np.concatenate([query, key, value], axis=1), rescaled=rescaled)
            return self.attention.all_tokens(packed, index), x
        keys_values = self.linears(
            normed, site, np.concatenate([key, value], axis=1), name=f"{site}.kv", rescaled=rescaled
        )
        last = self.linears(self.attention.last_rows(normed), site, query, name=f"{site}.q", rescaled=rescaled)
        return self.attention.last_token(last, keys_values, index), self.attention.last_rows(x)

    def _norm(
        self, x: ir.Value, addend: ir.Value | None, name: str, rescaled: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of `x + addend`, in the linear layers' type and smoothed for them; and the sum, float32."""
        g = self.g
        weight = self._tensor(f"{name}.weight")
        stored = g.weight(f"{name}.weight", weight if rescaled is None else weight / rescaled.scale)
        if addend is None:
            return g.cast(rms_norm(g, x, stored, self.config.eps), np.float16), x
        normed, total = add_rms_norm(g, x, addend, stored, self.config.eps)
        return g.cast(normed, np.float16), total

    def _tensor(self, name: str) -> FloatArray:
        return self.checkpoint.tensor(name)

    def _matrix(self, name: str) -> FloatArray:
        """A torch Linear's [out, in] weight as [in, out]."""
        return np.ascontiguousarray(self.checkpoint.tensor(name).T)


class _Attention:
    """What both forms of attention share: the batch's shape, the last real token, the rotation angles."""

    def __init__(self, g: GraphBuilder, config: LlamaConfig):
        self.g = g
        self.config = config
        self.width = config.heads * config.head_size
        self.kv_width = config.kv_heads * config.head_size

    def prepare(self, source: ir.Value, stage: range) -> None:
        """Inputs and values that all layers read. source: [batch, sequence, …]."""
        self.batch = self.g.op("Shape", source, start=0, end=1)
        self.sequence = self.g.op("Shape", source, start=1, end=2)

    def batch_shape(self, width: int) -> ir.Value:
        """The shape [batch, sequence, width]."""
        return self.g.op("Concat", self.batch, self.sequence, self.g.ints(width), axis=0)

    def unflatten(self, rows: ir.Value, width: int) -> ir.Value:
        """[batch * sequence, width] → [batch, sequence, width]."""
        return self.g.op("Reshape", rows, self.batch_shape(width))

    def rows_of(self, rows: ir.Value, places: ir.Value, width: int) -> ir.Value:
        """One row of each text, [batch, width]; places int64 [batch]."""
        return self.g.op(
            "GatherND", self.unflatten(rows, width), self.g.op("Unsqueeze", places, self.g.ints(1)), batch_dims=1
        )

    def last_rows(self, rows: ir.Value) -> ir.Value:
        """The last real token's row of each text, [batch, hidden]."""
        return self.rows_of(rows, self.last, self.config.hidden)

    def angles(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin of position × inverse frequency, float32 [..., head_size / 2]; positions float32 [...]."""
        g = self.g
        product = g.op("Mul", g.op("Unsqueeze", positions, g.ints(-1)), g.constant(self.config.rope, np.float32))
        return g.op("Cos", product), g.op("Sin", product)

    last: ir.Value


class _FusedAttention(_Attention):
    """GroupQueryAttention, which rotates, masks, and appends to the KV cache; the last layer's one query in MatMuls."""

    def prepare(self, source: ir.Value, stage: range) -> None:
        """See _Attention. `lengths` counts the real new tokens of each row."""
        super().prepare(source, stage)
        g, config = self.g, self.config
        lengths = g.input("lengths", ir.DataType.INT32, ["batch"])
        one = g.constant([1], np.int32)
        self.total, self.past = self.sequence, None
        self.pasts: dict[int, tuple[ir.Value, ir.Value]] = {}
        if g.recipe.state:
            shape: list[str | int] = ["batch", config.kv_heads, "past", config.head_size]
            for index in stage:
                key, value = (g.input(f"past_{part}.{index}", ir.DataType.FLOAT, shape) for part in ("key", "value"))
                self.pasts[index] = (key, value)
            self.past = g.op("Shape", self.pasts[stage.start][0], start=2, end=3)
            self.total = g.op("Add", self.past, self.sequence)
        self.total_int32 = g.op("Cast", self.total, to=ir.DataType.INT32.value)
        self.last = g.op("Cast", g.op("Sub", lengths, one), to=ir.DataType.INT64.value)
        self.last_position = self.last if self.past is None else g.op("Add", self.last, self.past)
        self.seqlens = g.op("Cast", self.last_position, to=ir.DataType.INT32.value)
        self.positions = self._range(self.total)
        angles = self.angles(g.op("Cast", self.positions, to=ir.DataType.FLOAT.value))
        self.cos, self.sin = (g.cast(angle, np.float16) for angle in angles)

    def all_tokens(self, packed: ir.Value, index: int) -> ir.Value:
        """Every token's context, rows [batch * sequence, heads * head_size]; packed: q, k and v side by side."""
        g, config = self.g, self.config
        key, value = self.pasts.get(index, (None, None))
        context, present_key, present_value = g.op_many(
            "GroupQueryAttention",
            self.unflatten(packed, self.width + 2 * self.kv_width),
            None,
            None,
            key,
            value,
            self.seqlens,
            self.total_int32,
            self.cos,
            self.sin,
            outputs=3,
            domain="com.microsoft",
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
        )
        self._present(index, present_key, present_value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def last_token(self, query: ir.Value, keys_values: ir.Value, index: int) -> ir.Value:
        """The last real token's context, rows [batch, heads * head_size]; query [batch, heads * head_size]."""
        g, config = self.g, self.config
        start = g.ints(0) if self.past is None else self.past
        packed = self.unflatten(keys_values, 2 * self.kv_width)
        key, value = g.op_many("Split", packed, outputs=2, axis=-1, num_outputs=2)
        key = self._rotate(key, start, config.kv_heads)
        position = g.op("Unsqueeze", self.last_position, g.ints(1))
        query = self._rotate(g.op("Unsqueeze", query, g.ints(1)), position, config.heads)
        size, repeats = config.head_size, config.heads // config.kv_heads
        key, value = (
            g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, config.kv_heads, size)), perm=[0, 2, 1, 3])
            for x in (key, value)
        )
        if index in self.pasts:
            key, value = (
                g.op("Concat", past, new, axis=2) for past, new in zip(self.pasts[index], (key, value), strict=True)
            )
        self._present(index, key, value)
        grouped = g.op("Reshape", query, g.ints(0, config.kv_heads, repeats, size))
        scores = g.op("MatMul", grouped, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = g.op("Mul", g.cast(scores, np.float32), g.constant(1 / math.sqrt(size), np.float32))
        seen = g.op("LessOrEqual", self.positions, g.op("Unsqueeze", self.last_position, g.ints(1)))
        scores = g.op("Where", g.op("Unsqueeze", seen, g.ints(1, 2)), scores, g.constant(HIDDEN_SCORE, np.float32))
        context = g.op("MatMul", g.cast(g.op("Softmax", scores, axis=-1), np.float16), value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def _rotate(self, x: ir.Value, positions: ir.Value, heads: int) -> ir.Value:
        return self.g.contrib("RotaryEmbedding", x, positions, self.cos, self.sin, num_heads=heads, interleaved=0)

    def _present(self, index: int, key: ir.Value, value: ir.Value) -> None:
        """The longer KV cache, where the graph keeps one."""
        if index not in self.pasts:
            return
        shape: list[str | int] = ["batch", self.config.kv_heads, "total", self.config.head_size]
        for part, result in (("key", key), ("value", value)):
            result.name, result.type = f"present_{part}.{index}", ir.TensorType(ir.DataType.FLOAT)
            result.shape = ir.Shape(shape)
            self.g.outputs.append(result)

    def _range(self, count: ir.Value) -> ir.Value:
        g = self.g
        return g.op("Range", g.constant(0, np.int64), g.op("Squeeze", count), g.constant(1, np.int64))


class _PlainAttention(_Attention):
    """The same from standard operators. Queries of one KV head are rows of one matrix, so keys are never repeated."""

    def prepare(self, source: ir.Value, stage: range) -> None:
        """See _Attention. `attention_mask` says which tokens are real."""
        super().prepare(source, stage)
        g = self.g
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", "sequence"])
        counted = g.op("CumSum", mask, g.constant(1, np.int64))
        self.last = g.op("Sub", g.op("ReduceSum", mask, g.ints(1), keepdims=0), g.ints(1))
        positions = g.op("Cast", g.op("Sub", counted, g.ints(1)), to=ir.DataType.FLOAT.value)
        # One head axis, so that the angles spread over heads: [batch, 1, sequence, head_size / 2].
        self.cos, self.sin = (g.op("Unsqueeze", angle, g.ints(1)) for angle in self.angles(positions))
        real = g.op("Cast", mask, to=ir.DataType.BOOL.value)
        causal = g.op(
            "GreaterOrEqual", g.op("Unsqueeze", positions, g.ints(2)), g.op("Unsqueeze", positions, g.ints(1))
        )
        self.all_bias = g.op(
            "Unsqueeze", self._bias(g.op("And", causal, g.op("Unsqueeze", real, g.ints(1)))), g.ints(1, 2)
        )
        self.last_bias = g.op("Unsqueeze", self._bias(real), g.ints(1, 2))

    def all_tokens(self, packed: ir.Value, index: int) -> ir.Value:
        """See _FusedAttention."""
        g, config = self.g, self.config
        repeats, size = config.heads // config.kv_heads, config.head_size
        parts = self._split(
            self.unflatten(packed, self.width + 2 * self.kv_width), [self.width, self.kv_width, self.kv_width]
        )
        query, key, value = (
            self._heads(part, heads) for part, heads in zip(parts, (config.heads, *[config.kv_heads] * 2), strict=True)
        )
        query, key = (self._rotate(x, self.cos, self.sin) for x in (query, key))
        grouped = g.op("Reshape", query, g.ints(0, config.kv_heads, -1, size))
        scores = self._scores(grouped, key)
        # [batch, kv heads, repeats, sequence, sequence] + [batch, 1, 1, sequence, sequence]
        shape = g.op("Concat", self.batch, g.ints(config.kv_heads, repeats), self.sequence, self.sequence, axis=0)
        scores = g.op("Add", g.op("Reshape", scores, shape), self.all_bias)
        probabilities = g.cast(g.op("Softmax", scores, axis=-1), np.float16)
        flat = g.op("Concat", self.batch, g.ints(config.kv_heads, -1), self.sequence, axis=0)
        context = g.op("MatMul", g.op("Reshape", probabilities, flat), value)
        by_head = g.op("Concat", self.batch, g.ints(config.heads), self.sequence, g.ints(size), axis=0)
        context = g.op("Transpose", g.op("Reshape", context, by_head), perm=[0, 2, 1, 3])
        return g.op("Reshape", context, g.ints(-1, self.width))

    def last_token(self, query: ir.Value, keys_values: ir.Value, index: int) -> ir.Value:
        """See _FusedAttention."""
        g, config = self.g, self.config
        size, repeats = config.head_size, config.heads // config.kv_heads
        parts = self._split(self.unflatten(keys_values, 2 * self.kv_width), [self.kv_width, self.kv_width])
        key, value = (self._heads(part, config.kv_heads) for part in parts)
        key = self._rotate(key, self.cos, self.sin)
        one = g.op("Unsqueeze", g.op("Unsqueeze", self.last, g.ints(1)), g.ints(1))
        cos, sin = (
            g.op("GatherND", g.op("Squeeze", angle, g.ints(1)), one, batch_dims=1) for angle in (self.cos, self.sin)
        )
        cos, sin = (g.op("Unsqueeze", angle, g.ints(1)) for angle in (cos, sin))
        query = self._rotate(g.op("Reshape", query, g.ints(0, config.heads, 1, size)), cos, sin)
        grouped = g.op("Reshape", query, g.ints(0, config.kv_heads, repeats, size))
        scores = g.op("Add", self._scores(grouped, key), self.last_bias)
        context = g.op("MatMul", g.cast(g.op("Softmax", scores, axis=-1), np.float16), value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def _scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """Scaled scores, float32 [batch, kv heads, rows, sequence]."""
        g = self.g
        scaled = g.op("Mul", query, g.constant(1 / math.sqrt(self.config.head_size), g.float_dtype))
        return g.cast(g.op("MatMul", scaled, g.op("Transpose", key, perm=[0, 1, 3, 2])), np.float32)

    def _bias(self, visible: ir.Value) -> ir.Value:
        g = self.g
        return g.op("Where", visible, g.constant(0.0, np.float32), g.constant(HIDDEN_SCORE, np.float32))

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[batch, sequence, heads * size] → [batch, heads, sequence, size]."""
        g = self.g
        split = g.op("Reshape", x, g.ints(0, 0, heads, self.config.head_size))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def _split(self, x: ir.Value, widths: list[int]) -> list[ir.Value]:
        return self.g.op_many("Split", x, self.g.ints(*widths), outputs=len(widths), axis=-1)

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """RoPE on [batch, heads, tokens, size]: halves (a, b) → (a cos - b sin, b cos + a sin), in float32."""
        g, half = self.g, self.config.head_size // 2
        first, second = g.op_many("Split", g.cast(x, np.float32), g.ints(half, half), outputs=2, axis=-1)
        rotated = (
            g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
            g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
        )
        return g.cast(g.op("Concat", *rotated, axis=-1), np.float16)
