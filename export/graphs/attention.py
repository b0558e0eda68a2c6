"""Grouped-query attention with RoPE and a KV cache, for all tokens or for the last one: fused, and from plain operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from samescore.export.graphs.blocks import CONTRIB, FloatArray, GraphBuilder
from samescore.export.graphs.decoder import DecoderConfig, TokenRows
from samescore.export.quantize import Rescaling

# Scores of keys that a query may not see.
HIDDEN_SCORE = -1e30
# Tokens from which reading the KV cache once for several queries pays. Shorter texts are computed as in a batch, to the bit.
GROUPED_FROM = 1024


class Attention:
    """What both forms share. Queries, keys and values are rows [batch * sequence, heads * head_size]."""

    def __init__(self, g: GraphBuilder, config: DecoderConfig, rows: TokenRows):
        self.g = g
        self.config = config
        self.rows = rows
        self.width = config.heads * config.head_size
        self.kv_width = config.kv_heads * config.head_size

    def scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        """`query keyᵀ / sqrt(size)`, float32 [..., rows, tokens], of [..., rows, size] and [..., tokens, size]."""
        g, size = self.g, self.config.head_size
        # In float16 the product is a mean over channels, which ends 16 times later than the scaled score of 256 channels.
        first = size if g.half else math.sqrt(size)
        scaled = g.op("Mul", query, g.constant(1 / first, g.float_dtype))
        scores = g.cast(g.op("MatMul", scaled, g.op("Transpose", key, perm=[0, 1, 3, 2])), np.float32)
        return g.op("Mul", scores, g.constant(math.sqrt(size), np.float32)) if g.half else scores

    def split(self, x: ir.Value, widths: list[int]) -> list[ir.Value]:
        """Channels side by side, apart."""
        return self.g.op_many("Split", x, self.g.ints(*widths), outputs=len(widths), axis=-1)

    def angles(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin of position × inverse frequency, float32 [..., rotated / 2]; positions float32 [...]."""
        g = self.g
        product = g.op("Mul", g.op("Unsqueeze", positions, g.ints(-1)), g.constant(self.config.rope, np.float32))
        return g.op("Cos", product), g.op("Sin", product)


def value_scale(config: DecoderConfig, after: Rescaling) -> FloatArray:
    """What divides the value projection's columns [kv heads * head_size], so that the context is `after`'s input.

    Attention takes weighted means of value rows, so a scale per channel passes through it; the query heads of one KV
    head share it (`tied` in Linears.rescaling).
    """
    repeats = config.heads // config.kv_heads
    scale: FloatArray = after.scale.reshape(-1, repeats, config.head_size)[:, 0].reshape(-1)
    return scale


class FusedAttention(Attention):
    """GroupQueryAttention, which rotates, masks, and appends to the KV cache; the last layer's one query in MatMuls.

    layers: those of the graph that attend. With `recipe.state` each of them takes `past_key.<i>` and `past_value.<i>`
    float32 [batch, kv heads, past, head size], and returns them longer as `present_…`. Where the rows continue texts, the
    third axis is a capacity that the caller fixes, the result may be written in place, and the type is the recipe's float
    type; max_tokens: the longest text, then.
    """

    def __init__(
        self, g: GraphBuilder, config: DecoderConfig, rows: TokenRows, layers: Sequence[int], max_tokens: int = 0
    ):
        super().__init__(g, config, rows)
        self.past: ir.Value | None = None
        self.pasts: dict[int, tuple[ir.Value, ir.Value]] = {}
        if not layers:
            return
        if rows.continued:
            self._continue(layers, max_tokens)
            return
        self.total = rows.sequence
        if g.recipe.state:
            for index in layers:
                key, value = (
                    g.input(f"past_{part}.{index}", self._cache, self._shape("past")) for part in ("key", "value")
                )
                self.pasts[index] = (key, value)
            self.past = g.op("Shape", self.pasts[layers[0]][0], start=2, end=3)
            self.total = g.op("Add", self.past, rows.sequence)
        self.total_int32 = g.op("Cast", self.total, to=ir.DataType.INT32.value)
        self.last_position = rows.last if self.past is None else g.op("Add", rows.last, self.past)
        self.seqlens = g.op("Cast", self.last_position, to=ir.DataType.INT32.value)
        self.positions = self._range(self.total)
        angles = self.angles(g.op("Cast", self.positions, to=ir.DataType.FLOAT.value))
        self.cos, self.sin = (g.cast(angle, np.float16) for angle in angles)

    def _continue(self, layers: Sequence[int], max_tokens: int) -> None:
        """Caches of a fixed capacity, and the angles of every place in a text as a table: nothing here grows with it."""
        g, lengths = self.g, self.rows.lengths
        assert lengths is not None
        for index in layers:
            key, value = (g.input(f"past_{part}.{index}", self._cache, self._shape()) for part in ("key", "value"))
            self.pasts[index] = (key, value)
        self.seqlens = g.op("Sub", lengths, g.constant([1], np.int32))
        self.total_int32 = g.op("ReduceMax", lengths, keepdims=0)
        if self.separate:
            self.starts = g.op("Sub", g.op("Cast", lengths, to=ir.DataType.INT64.value), self.rows.sequence)
            self.places = g.op("Add", g.op("Unsqueeze", self.starts, g.ints(1)), self._range(self.rows.sequence))
            long = g.op("GreaterOrEqual", self.total_int32, g.constant(GROUPED_FROM, np.int32))
            self.grouped = g.op("And", long, g.op("Equal", g.op("Size", self.places), g.constant(1, np.int64)))
        # In float32, as the reference computes them.
        angles = np.arange(max_tokens, dtype=np.float32)[:, None] * self.config.rope
        self.cos, self.sin = (g.float_weight(f"rope.{f.__name__}", f(angles)) for f in (np.cos, np.sin))

    @property
    def separate(self) -> bool:
        """Whether caches are written by an operator of their own."""
        return self.rows.continued and not self.g.half

    @property
    def _cache(self) -> ir.DataType:
        return ir.DataType.from_numpy(self.g.float_dtype) if self.rows.continued else ir.DataType.FLOAT

    def _shape(self, tokens: str = "capacity") -> list[str | int]:
        return ["batch", self.config.kv_heads, "capacity" if self.rows.continued else tokens, self.config.head_size]

    def all_tokens(self, query: ir.Value, key: ir.Value | None, value: ir.Value | None, index: int) -> ir.Value:
        """Every token's context, rows [batch * sequence, heads * head_size].

        Without key and value, query holds all three side by side.
        """
        g, config, rows = self.g, self.config, self.rows
        if self.separate:
            if key is None or value is None:
                query, key, value = self.split(query, [self.width, self.kv_width, self.kv_width])
            return self._cached(query, key, value, index)
        past_key, past_value = self.pasts.get(index, (None, None))
        widths = [self.width if key is not None else self.width + 2 * self.kv_width, self.kv_width, self.kv_width]
        inputs = [x if x is None else rows.unflatten(x, w) for x, w in zip((query, key, value), widths, strict=True)]
        context, present_key, present_value = g.op_many(
            "GroupQueryAttention",
            *inputs,
            past_key,
            past_value,
            self.seqlens,
            self.total_int32,
            self.cos,
            self.sin,
            outputs=3,
            domain=CONTRIB,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
        )
        self._present(index, present_key, present_value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def _cached(self, query: ir.Value, key: ir.Value, value: ir.Value, index: int) -> ir.Value:
        """As `all_tokens`: keys and values go into the caches first.

        A lone token behind a long text reads them once for each KV head, whose queries stand one below the other as if they were
        tokens that see all. The operator by itself reads them once for each query, also of several texts: it takes their
        tokens one at a time.
        """
        g, config, rows = self.g, self.config, self.rows
        size, repeats = config.head_size, config.heads // config.kv_heads
        query, key, value = (
            rows.unflatten(x, width) for x, width in ((query, self.width), (key, self.kv_width), (value, self.kv_width))
        )
        query, key = self._rotate(query, self.places, config.heads), self._rotate(key, self.places, config.kv_heads)
        caches = []
        for past, new in zip(self.pasts[index], (key, value), strict=True):
            by_head = g.op("Transpose", g.op("Reshape", new, g.ints(0, 0, config.kv_heads, size)), perm=[0, 2, 1, 3])
            caches.append(g.op("TensorScatter", past, by_head, self.starts, axis=2))
        self._present(index, *caches)
        nothing = g.op("Slice", key, g.ints(0), g.ints(0), g.ints(1))

        def attend(queries: ir.Value, heads: int, causal: int) -> ir.Value:
            return g.contrib(
                "GroupQueryAttention",
                queries,
                nothing,
                nothing,
                *caches,
                self.seqlens,
                self.total_int32,
                num_heads=heads,
                kv_num_heads=config.kv_heads,
                causal=causal,
            )

        def one_token() -> ir.Value:
            by_head = g.op("Reshape", query, g.ints(1, config.kv_heads, repeats, size))
            below = g.op("Reshape", g.op("Transpose", by_head, perm=[0, 2, 1, 3]), g.ints(1, repeats, -1))
            context = g.op("Reshape", attend(below, config.kv_heads, 0), g.ints(1, repeats, config.kv_heads, size))
            return g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.ints(1, self.width))

        def all_tokens() -> ir.Value:
            return g.op("Reshape", attend(query, config.heads, 1), g.ints(-1, self.width))

        return g.choose(self.grouped, one_token, all_tokens) if repeats > 1 else all_tokens()

    def last_token(self, query: ir.Value, key: ir.Value, value: ir.Value, index: int) -> ir.Value:
        """The last real token's context, rows [batch, heads * head_size]; query [batch, heads * head_size]."""
        g, config = self.g, self.config
        start = g.ints(0) if self.past is None else self.past
        key, value = (self.rows.unflatten(x, self.kv_width) for x in (key, value))
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
        scores = self.scores(grouped, key)
        seen = g.op("LessOrEqual", self.positions, g.op("Unsqueeze", self.last_position, g.ints(1)))
        scores = g.op("Where", g.op("Unsqueeze", seen, g.ints(1, 2)), scores, g.constant(HIDDEN_SCORE, np.float32))
        context = g.op("MatMul", g.cast(g.op("Softmax", scores, axis=-1), np.float16), value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def _rotate(self, x: ir.Value, positions: ir.Value, heads: int) -> ir.Value:
        config = self.config
        partial = {"rotary_embedding_dim": config.rotated} if config.rotated < config.head_size else {}
        return self.g.contrib(
            "RotaryEmbedding", x, positions, self.cos, self.sin, num_heads=heads, interleaved=0, **partial
        )

    def _present(self, index: int, key: ir.Value, value: ir.Value) -> None:
        """The longer KV cache, where the graph keeps one."""
        if index not in self.pasts:
            return
        for part, result in (("key", key), ("value", value)):
            self.g.result(result, f"present_{part}.{index}", self._cache, self._shape("total"))

    def _range(self, count: ir.Value) -> ir.Value:
        g = self.g
        return g.op("Range", g.constant(0, np.int64), g.op("Squeeze", count), g.constant(1, np.int64))


class PlainAttention(Attention):
    """The same from standard operators. Queries of one KV head are rows of one matrix, so keys are never repeated."""

    def __init__(self, g: GraphBuilder, config: DecoderConfig, rows: TokenRows):
        super().__init__(g, config, rows)
        mask = rows.mask
        assert mask is not None
        counted = g.op("CumSum", mask, g.constant(1, np.int64))
        positions = g.op("Cast", g.op("Sub", counted, g.ints(1)), to=ir.DataType.FLOAT.value)
        # One head axis, so that the angles spread over heads: [batch, 1, sequence, rotated / 2].
        self.cos, self.sin = (g.op("Unsqueeze", angle, g.ints(1)) for angle in self.angles(positions))
        real = g.op("Cast", mask, to=ir.DataType.BOOL.value)
        causal = g.op(
            "GreaterOrEqual", g.op("Unsqueeze", positions, g.ints(2)), g.op("Unsqueeze", positions, g.ints(1))
        )
        self.all_bias = g.op(
            "Unsqueeze", self._bias(g.op("And", causal, g.op("Unsqueeze", real, g.ints(1)))), g.ints(1, 2)
        )
        self.last_bias = g.op("Unsqueeze", self._bias(real), g.ints(1, 2))

    def all_tokens(self, query: ir.Value, key: ir.Value | None, value: ir.Value | None, index: int) -> ir.Value:
        """See FusedAttention."""
        g, config = self.g, self.config
        repeats, size = config.heads // config.kv_heads, config.head_size
        if key is None or value is None:
            query, key, value = self.split(query, [self.width, self.kv_width, self.kv_width])
        query, key, value = (
            self._heads(x, heads)
            for x, heads in zip((query, key, value), (config.heads, *[config.kv_heads] * 2), strict=True)
        )
        query, key = (self._rotate(x, self.cos, self.sin) for x in (query, key))
        grouped = g.op("Reshape", query, g.ints(0, config.kv_heads, -1, size))
        scores = self.scores(grouped, key)
        # [batch, kv heads, repeats, sequence, sequence] + [batch, 1, 1, sequence, sequence]
        shape = g.op(
            "Concat", self.rows.batch, g.ints(config.kv_heads, repeats), self.rows.sequence, self.rows.sequence, axis=0
        )
        scores = g.op("Add", g.op("Reshape", scores, shape), self.all_bias)
        probabilities = g.cast(g.op("Softmax", scores, axis=-1), np.float16)
        flat = g.op("Concat", self.rows.batch, g.ints(config.kv_heads, -1), self.rows.sequence, axis=0)
        context = g.op("MatMul", g.op("Reshape", probabilities, flat), value)
        by_head = g.op("Concat", self.rows.batch, g.ints(config.heads), self.rows.sequence, g.ints(size), axis=0)
        context = g.op("Transpose", g.op("Reshape", context, by_head), perm=[0, 2, 1, 3])
        return g.op("Reshape", context, g.ints(-1, self.width))

    def last_token(self, query: ir.Value, key: ir.Value, value: ir.Value, index: int) -> ir.Value:
        """See FusedAttention."""
        g, config = self.g, self.config
        size, repeats = config.head_size, config.heads // config.kv_heads
        key, value = (self._heads(x, config.kv_heads) for x in (key, value))
        key = self._rotate(key, self.cos, self.sin)
        one = g.op("Unsqueeze", g.op("Unsqueeze", self.rows.last, g.ints(1)), g.ints(1))
        cos, sin = (
            g.op("GatherND", g.op("Squeeze", angle, g.ints(1)), one, batch_dims=1) for angle in (self.cos, self.sin)
        )
        cos, sin = (g.op("Unsqueeze", angle, g.ints(1)) for angle in (cos, sin))
        query = self._rotate(g.op("Reshape", query, g.ints(0, config.heads, 1, size)), cos, sin)
        grouped = g.op("Reshape", query, g.ints(0, config.kv_heads, repeats, size))
        scores = g.op("Add", self.scores(grouped, key), self.last_bias)
        context = g.op("MatMul", g.cast(g.op("Softmax", scores, axis=-1), np.float16), value)
        return g.op("Reshape", context, g.ints(-1, self.width))

    def _bias(self, visible: ir.Value) -> ir.Value:
        g = self.g
        return g.op("Where", visible, g.constant(0.0, np.float32), g.constant(HIDDEN_SCORE, np.float32))

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[batch * sequence, heads * size] → [batch, heads, sequence, size]."""
        g, size = self.g, self.config.head_size
        split = g.op("Reshape", self.rows.unflatten(x, heads * size), g.ints(0, 0, heads, size))
        return g.op("Transpose", split, perm=[0, 2, 1, 3])

    def _rotate(self, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        """RoPE on [batch, heads, tokens, size]: halves (a, b) → (a cos - b sin, b cos + a sin), in float32.

        Channels behind the rotated ones stay as they are.
        """
        g, half = self.g, self.config.rotated // 2
        widths = [half, half] + [self.config.head_size - 2 * half] * (self.config.rotated < self.config.head_size)
        first, second, *kept = self.split(g.cast(x, np.float32), widths)
        rotated = (
            g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
            g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
        )
        return g.cast(g.op("Concat", *rotated, *kept, axis=-1), np.float16)
