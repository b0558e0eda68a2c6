"""Convolution, gates and delta rule of Qwen3.5's linear attention: fused, fused for CUDA alone, and from plain operators.

float32, except that CUDA's chunked kernels read float16 queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from samescore.export.graphs.blocks import CONTRIB, GraphBuilder
from samescore.export.graphs.delta_rule import chunk_plan, plain_delta_rule, softplus

# The only heads that GatedDeltaNet's chunked kernels are compiled for; others fall back to a recurrence, in silence.
CHUNKED_HEAD_SIZE = 128


@dataclass(frozen=True)
class DeltaHeads:
    """The shapes of the delta rule.

    Value heads are a multiple of the key heads, which serve neighbours. kernel: the convolution's tokens.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def key_width(self) -> int:
        """Channels of all the delta rule's queries, and of its keys."""
        return self.key_heads * self.key_size

    @property
    def value_width(self) -> int:
        """Channels of all the delta rule's values."""
        return self.value_heads * self.value_size

    @property
    def channels(self) -> int:
        """What the convolution sees: queries, keys and values side by side."""
        return 2 * self.key_width + self.value_width


class FusedDeltaNet:
    """com.microsoft operators; float32 is all that their CPU kernels take.

    layers: those of the graph with linear attention. With `recipe.state` each of them takes and returns two states.
    """

    def __init__(self, g: GraphBuilder, heads: DeltaHeads, layers: Sequence[int]):
        self.g = g
        self.heads = heads
        self.conv_shape: list[str | int] = ["batch", heads.channels, heads.kernel - 1]
        self.recurrent_shape: list[str | int] = ["batch", heads.value_heads, heads.key_size, heads.value_size]
        self.pasts: dict[int, tuple[ir.Value, ir.Value]] = {}
        for index in layers if g.recipe.state else ():
            conv = g.input(f"past_conv.{index}", ir.DataType.FLOAT, self.conv_shape)
            recurrent = g.input(f"past_recurrent.{index}", ir.DataType.FLOAT, self.recurrent_shape)
            self.pasts[index] = (conv, recurrent)

    def convolve(self, x: ir.Value, kernel: ir.Value, index: int) -> ir.Value:
        """Each channel over its last tokens; x and the result [batch, sequence, channels], kernel [channels, 1, tokens]."""
        g = self.g
        past, _ = self.pasts.get(index, (None, None))
        if past is None:
            return _convolve(g, self.heads, x, kernel)
        # Channels last, and the activation fused, are both slower on the CPU.
        x = g.op("Transpose", x, perm=[0, 2, 1])
        y, present = g.op_many(
            "CausalConvWithState", x, kernel, None, past, outputs=2, domain=CONTRIB, activation="none", ndim=1
        )
        g.result(present, f"present_conv.{index}", ir.DataType.FLOAT, self.conv_shape)
        return g.op("Transpose", y, perm=[0, 2, 1])

    def gates(self, a: ir.Value, bias: ir.Value, rate: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
        """`rate * softplus(a + bias)`, the logarithm of the decay, and `sigmoid(b)`; a and b [batch, sequence, heads]."""
        decay, beta = self.g.op_many("LinearAttentionGate", a, bias, rate, b, outputs=2, domain=CONTRIB)
        return decay, beta

    def rule(
        self, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, beta: ir.Value, index: int
    ) -> ir.Value:
        """The gated delta rule, [batch, sequence, value heads * value size].

        S ← exp(decay_t) S;  S ← S + beta_t k_t (v_t - Sᵀ k_t)ᵀ;  o_t = Sᵀ q_t        S: [key size, value size] by head

        query, key: [batch, sequence, key heads * key size], by head of unit length, the query also scaled. value: [batch,
        sequence, value heads * value size]. decay, beta: [batch, sequence, value heads].
        """
        g, heads = self.g, self.heads
        _, past = self.pasts.get(index, (None, None))
        context, present = g.op_many(
            "LinearAttention",
            query,
            key,
            value,
            past,
            decay,
            beta,
            outputs=2,
            domain=CONTRIB,
            q_num_heads=heads.key_heads,
            kv_num_heads=heads.value_heads,
            scale=1.0,
            update_rule="gated_delta",
        )
        if past is not None:
            g.result(present, f"present_recurrent.{index}", ir.DataType.FLOAT, self.recurrent_shape)
        return context


class ChunkedDeltaNet(FusedDeltaNet):
    """The delta rule as GatedDeltaNet, which reads texts in chunks on tensor cores where LinearAttention goes token by token.

    Its chunked kernels take float16 queries, keys and values of heads of CHUNKED_HEAD_SIZE; decay, beta and the state that
    they carry are float32. There is no CPU kernel: what is known of the operator here is its schema (ONNX Runtime 1.31.1).
    batch: int64 [1]. No states.
    """

    def __init__(self, g: GraphBuilder, heads: DeltaHeads, batch: ir.Value):
        super().__init__(g, heads, ())
        # Explicit batch and sequence axes tell the kernel the batch; the schema asks for a state all the same.
        shape = g.ints(heads.value_heads, heads.value_size, heads.key_size)
        zero = ir.Tensor(np.zeros(1, np.float32), name="zero")
        self.initial_state = g.op("ConstantOfShape", g.op("Concat", batch, shape, axis=0), value=zero)

    def rule(
        self, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, beta: ir.Value, index: int
    ) -> ir.Value:
        """See FusedDeltaNet; float32 all the same."""
        g, heads = self.g, self.heads

        def by_head(x: ir.Value, count: int, size: int) -> ir.Value:
            return g.cast(g.op("Reshape", x, g.ints(0, 0, count, size)), np.float16)

        context = g.contrib(
            "GatedDeltaNet",
            by_head(query, heads.key_heads, heads.key_size),
            by_head(key, heads.key_heads, heads.key_size),
            by_head(value, heads.value_heads, heads.value_size),
            None,
            decay,
            beta,
            self.initial_state,
            update_rule="gated_delta",
            scale=1.0,
        )
        return g.op("Reshape", g.cast(context, np.float32), g.ints(0, 0, heads.value_width))


class PlainDeltaNet:
    """The same from standard operators, without states.

    sequence: int64 [1], the number of tokens of a row. max_tokens: of the longest text; a longer one fails to run.
    """

    def __init__(self, g: GraphBuilder, heads: DeltaHeads, sequence: ir.Value, max_tokens: int):
        self.g = g
        self.heads = heads
        self.plan = chunk_plan(g, sequence, max_tokens)

    def convolve(self, x: ir.Value, kernel: ir.Value, index: int) -> ir.Value:
        """See FusedDeltaNet."""
        return _convolve(self.g, self.heads, x, kernel)

    def gates(self, a: ir.Value, bias: ir.Value, rate: ir.Value, b: ir.Value) -> tuple[ir.Value, ir.Value]:
        """See FusedDeltaNet."""
        g = self.g
        return g.op("Mul", softplus(g, g.op("Add", a, bias)), rate), g.op("Sigmoid", b)

    def rule(
        self, query: ir.Value, key: ir.Value, value: ir.Value, decay: ir.Value, beta: ir.Value, index: int
    ) -> ir.Value:
        """See FusedDeltaNet."""
        heads = self.heads
        return plain_delta_rule(
            self.g,
            self.plan,
            query,
            key,
            value,
            decay,
            beta,
            key_heads=heads.key_heads,
            value_heads=heads.value_heads,
            key_size=heads.key_size,
            value_size=heads.value_size,
        )


def _convolve(g: GraphBuilder, heads: DeltaHeads, x: ir.Value, kernel: ir.Value) -> ir.Value:
    """Before the first token are zeros."""
    x = g.op("Transpose", x, perm=[0, 2, 1])
    y = g.op("Conv", x, kernel, group=heads.channels, kernel_shape=[heads.kernel], pads=[heads.kernel - 1, 0])
    return g.op("Transpose", y, perm=[0, 2, 1])
