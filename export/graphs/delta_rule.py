"""The gated delta rule of Qwen3.5's linear attention from standard operators, for any number of tokens up to a limit.

    S ← exp(g_t) S;  S ← S + beta_t k_t (v_t - Sᵀ k_t)ᵀ;  o_t = Sᵀ q_t            S: [key size, value size] of each head

(Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2025.) MIGraphX runs no control flow, so nothing here loops:

    within a chunk    the WY form (Yang et al.: Parallelizing Linear Transformers with the Delta Rule over Sequence Length,
                      2024): what C tokens write is (I + L)⁻¹ of what they would write alone, a few matrix products
    between chunks    a chunk maps the state before it to the state after it, S → A S + B. Pairs of neighbours are composed
                      until one pair is left, then states come back down that tree (Blelloch's scan, 1990)

The tree has a fixed depth, chosen by the limit on tokens. A level's odd chunk is paired with an empty one, so that levels
beyond the text's real number of chunks compute on one pair and change nothing. Texts beyond the limit fail to reshape at
the top of the tree; they never get a wrong answer.

Composing is what the tree costs: one product with a [key size, key size] matrix per chunk, where a scan of log-many steps
over all chunks (Hillis and Steele, 1986) would need one per chunk and step.

float32 suffices: only sums of negative numbers are exponentiated, A never enlarges a state (keys of length 1, beta from 0
to 1), and the inverse keeps its digits for repeated tokens. Everything is causal: right padding needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from samescore.export.graphs.blocks import GraphBuilder

# Tokens of a chunk, a power of two. Heads of 128 channels cost 0.58, 0.50 and 0.82 million operations per token with 32
# (more states), 64 and 128 (larger inverses).
CHUNK = 64


@dataclass(frozen=True)
class Level:
    """One level of the tree over chunks. count: int64 [1], how many maps it has.

    pads: `Pad`'s second input, which makes [batch, count, heads, rows, columns] even.
    """

    count: ir.Value
    pads: ir.Value


@dataclass(frozen=True)
class ChunkPlan:
    """Shape values that all layers of a graph share.

    sequence: int64 [1]. pads: `Pad`'s second input, which makes [batch, sequence, width] whole chunks. levels: of the
    tree over chunks, finest first; none where the limit is one chunk.
    """

    sequence: ir.Value
    pads: ir.Value
    levels: tuple[Level, ...]


def chunk_plan(g: GraphBuilder, sequence: ir.Value, max_tokens: int) -> ChunkPlan:
    """How `sequence` tokens (int64 [1], at most `max_tokens` rounded up to CHUNK times a power of two) become chunks."""
    count, pads = _whole(g, sequence, CHUNK, rank=3)
    levels = []
    for _ in range((-(-max_tokens // CHUNK) - 1).bit_length()):
        pairs, pair_pads = _whole(g, count, 2, rank=5)
        levels.append(Level(count, pair_pads))
        count = pairs
    return ChunkPlan(sequence, pads, tuple(levels))


def _whole(g: GraphBuilder, count: ir.Value, size: int, rank: int) -> tuple[ir.Value, ir.Value]:
    """How many groups of `size` hold `count` things, and the `pads` that fill the last one along axis 1."""
    groups = g.op("Div", g.op("Add", count, g.ints(size - 1)), g.ints(size))
    missing = g.op("Sub", g.op("Mul", groups, g.ints(size)), count)
    return groups, g.op("Concat", g.ints(*[0] * (rank + 1)), missing, g.ints(*[0] * (rank - 2)), axis=0)


def plain_delta_rule(
    g: GraphBuilder,
    plan: ChunkPlan,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    decay: ir.Value,
    beta: ir.Value,
    *,
    key_heads: int,
    value_heads: int,
    key_size: int,
    value_size: int,
) -> ir.Value:
    """What every token reads, float32 [batch, sequence, value heads * value size].

    query, key: float32 [batch, sequence, key heads * key size], of length 1 by head; query also scaled. value: float32
    [batch, sequence, value heads * value size]. decay (logarithm, at most 0) and beta (0 to 1): float32 [batch, sequence,
    value heads]. Value heads are a multiple of the key heads, which serve neighbours.
    """
    query, key = (_chunks(g, plan, x, key_heads, key_size) for x in (query, key))
    if key_heads != value_heads:
        served = g.ints(*np.repeat(np.arange(key_heads), value_heads // key_heads).tolist())
        query, key = (g.op("Gather", x, served, axis=2) for x in (query, key))
    value = _chunks(g, plan, value, value_heads, value_size)
    decay, beta = (_chunks(g, plan, x, value_heads, 1) for x in (decay, beta))
    from_start, between, to_end, whole = _decays(g, decay)

    columns = g.op("Transpose", key, perm=[0, 1, 2, 4, 3])
    writing = g.op("Mul", key, beta)
    inverse = _unit_lower_inverse(g, g.op("Mul", g.op("MatMul", writing, columns), between))
    values = g.op("Mul", value, beta)
    seen = g.op("Mul", between, g.constant(np.tril(np.ones((CHUNK, CHUNK))), np.float32))
    attention = g.op("Mul", g.op("MatMul", query, columns), seen)
    if not plan.levels:
        return _tokens(g, plan, g.op("MatMul", attention, g.op("MatMul", inverse, values)), value_heads * value_size)

    # [-W | U]: with the state S before the chunk, its tokens write U - W S.
    forgetting = g.op("Mul", writing, g.op("Neg", from_start))
    written = g.op("MatMul", inverse, g.op("Concat", forgetting, values, axis=-1))
    kept = g.op("Mul", whole, g.constant(np.eye(key_size, key_size + value_size), np.float32))
    maps = g.op("Add", g.op("MatMul", g.op("Mul", columns, to_end), written), kept)
    states = _states_before(g, plan.levels, maps, value_heads, key_size, value_size)
    minus_w, u = g.op_many("Split", written, g.ints(key_size, value_size), outputs=2, axis=-1)
    written = g.op("Add", g.op("MatMul", minus_w, states), u)
    old = g.op("MatMul", g.op("Mul", query, from_start), states)
    return _tokens(g, plan, g.op("Add", g.op("MatMul", attention, written), old), value_heads * value_size)


def _chunks(g: GraphBuilder, plan: ChunkPlan, x: ir.Value, heads: int, size: int) -> ir.Value:
    """[batch, sequence, heads * size] → [batch, chunks, heads, CHUNK, size]. Tokens of zeros change no state."""
    shape = g.ints(0, -1 if plan.levels else 1, CHUNK, heads, size)
    return g.op("Transpose", g.op("Reshape", g.op("Pad", x, plan.pads), shape), perm=[0, 1, 3, 2, 4])


def _tokens(g: GraphBuilder, plan: ChunkPlan, x: ir.Value, width: int) -> ir.Value:
    """[batch, chunks, heads, CHUNK, size] → [batch, sequence, heads * size]."""
    rows = g.op("Reshape", g.op("Transpose", x, perm=[0, 1, 3, 2, 4]), g.ints(0, -1, width))
    return g.op("Slice", rows, g.ints(0), plan.sequence, g.ints(1))


def _decays(g: GraphBuilder, decay: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """exp of sums of `decay` [..., CHUNK, 1] over runs of tokens of a chunk.

    Up to each token [..., CHUNK, 1]; after token j up to token i [..., CHUNK (i), CHUNK (j)], 1 where i < j; after each
    token up to the last [..., 1, CHUNK]; over the whole chunk [..., 1, 1].

    Every run is added up by itself. The difference of two sums from the chunk's start would lose the small decays behind a
    large one.
    """
    # Column 0 counts all tokens, column j + 1 those after token j.
    after = g.constant(np.tril(np.ones((CHUNK, CHUNK + 1))), np.float32)
    until = g.constant(np.tril(np.ones((CHUNK, CHUNK))), np.float32)
    runs = g.op("Exp", g.op("MatMul", until, g.op("Mul", decay, after)))
    from_start, between = g.op_many("Split", runs, g.ints(1, CHUNK), outputs=2, axis=-1)
    last = g.op("Slice", runs, g.ints(CHUNK - 1), g.ints(CHUNK), g.ints(3))
    whole, to_end = g.op_many("Split", last, g.ints(1, CHUNK), outputs=2, axis=-1)
    return from_start, between, to_end, whole


def _unit_lower_inverse(g: GraphBuilder, lower: ir.Value) -> ir.Value:
    """(I + strictly lower part of `lower`)⁻¹, [..., CHUNK, CHUNK], by doubling the size of inverted diagonal blocks.

    X ← X - X L' X, where L' are the blocks below the diagonal that join two inverted ones. The shorter product
    (I - L)(I + L²)(I + L⁴)… has terms that cancel: for repeated tokens nothing is left of it in float32.
    """
    place = np.arange(CHUNK)
    inverse = g.constant(np.eye(CHUNK), np.float32)
    size = 1
    while size < CHUNK:
        block = place // size
        joins = (block[:, None] % 2 == 1) & (block[None] == block[:, None] - 1)
        below = g.op("Mul", lower, g.constant(joins, np.float32))
        change = below if size == 1 else g.op("MatMul", g.op("MatMul", inverse, below), inverse)
        inverse = g.op("Sub", inverse, change)
        size *= 2
    return inverse


def _states_before(
    g: GraphBuilder, levels: tuple[Level, ...], maps: ir.Value, heads: int, key_size: int, value_size: int
) -> ir.Value:
    """The state before each chunk, [batch, chunks, heads, key size, value size]; zero before the first.

    maps: [A | B] of each chunk, [batch, chunks, heads, key size, key size + value size].
    """
    width = key_size + value_size
    shift = g.constant(np.arange(width) >= key_size, np.float32)
    firsts = []
    for level in levels:
        # Exactly one pair at the top: a text beyond the limit has more and stops here.
        pairs = 1 if level is levels[-1] else -1
        shape = g.ints(0, pairs, 2 * heads, key_size, width)
        both = g.op("Reshape", g.op("Pad", maps, level.pads), shape)
        first, second = g.op_many("Split", both, g.ints(heads, heads), outputs=2, axis=2)
        firsts.append(first)
        if level is not levels[-1]:
            linear = g.op("Slice", second, g.ints(0), g.ints(key_size), g.ints(4))
            maps = g.op("Add", g.op("MatMul", linear, first), g.op("Mul", second, shift))

    states: ir.Value | None = None
    for level, first in zip(reversed(levels), reversed(firsts), strict=True):
        linear, offset = g.op_many("Split", first, g.ints(key_size, value_size), outputs=2, axis=-1)
        if states is None:
            both = g.op("Pad", offset, g.ints(0, 0, heads, *[0] * 7))
        else:
            both = g.op("Concat", states, g.op("Add", g.op("MatMul", linear, states), offset), axis=2)
        flat = g.op("Reshape", both, g.ints(0, -1, heads, key_size, value_size))
        states = g.op("Slice", flat, g.ints(0), level.count, g.ints(1))
    assert states is not None
    return states


def softplus(g: GraphBuilder, x: ir.Value) -> ir.Value:
    """`log(1 + exp(x))` as `max(x, 0) + 2 atanh(e / (2 + e))` with `e = exp(-|x|)`, float32.

    MIGraphX computes the Softplus operator as it is written here first: infinite from x = 89, and without the digits of
    small results, which thousands of tokens add up.
    """
    e = g.op("Exp", g.op("Neg", g.op("Abs", x)))
    two = g.constant(2.0, np.float32)
    rest = g.op("Mul", g.op("Atanh", g.op("Div", e, g.op("Add", e, two))), two)
    return g.op("Add", g.op("Relu", x), rest)
