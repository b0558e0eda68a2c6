"""What decoder-only models share: embedding, residual stream, feed-forward, last real token, head.

    ids → embedding → layers × (norm → token mixer → add → norm → SwiGLU → add) → last real token → norm → score → logits

A language model that generates has another head (all rows of its vocabulary, see `vocabulary`), and with states it takes
the next tokens of texts in place of whole, padded ones: the last token of each call is then the last real one.

An architecture's file adds the token mixer. Only the last real token is read at the end, so in the last layer everything
after what the mixer keeps of all tokens is computed for that token alone; its place comes from `lengths` (or the mask),
never from a comparison with a pad id. Rows are kept flat [batch * sequence, hidden]; only a mixer sees the batch. The
residual stream is float32 in every recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import onnx_ir as ir

from samescore.export.checkpoint import Checkpoint, FloatArray
from samescore.export.generator import Generator
from samescore.export.graphs.blocks import GraphBuilder, add_rms_norm, embedding, rms_norm
from samescore.export.graphs.headroom import divisors, gated_with_room, reach_after_norm
from samescore.export.graphs.linears import GatedWeights, Linears
from samescore.export.graphs.rope import inverse_frequencies
from samescore.export.graphs.vocabulary import VocabularyTable
from samescore.export.intermediate import hidden_name, mixed_name
from samescore.export.language_model import EMBEDDING
from samescore.export.quantize import Rescaling
from samescore.runtime.errors import CheckpointError

# GroupQueryAttention takes no other head sizes, and rotates no other numbers of channels.
HEAD_SIZE_STEP = 16


@dataclass(frozen=True)
class DecoderConfig:
    """The facts of `config.json` that every decoder's graph needs.

    rope: inverse frequencies float32 [rotated channels / 2]; the channels of a head behind those are not rotated. head: the
    tensor that gives every token of the vocabulary a logit, or None for a classifier with `labels`.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    vocabulary: int
    eps: float
    rope: FloatArray
    labels: int
    head: str | None

    @property
    def rotated(self) -> int:
        """How many channels of a head are rotated."""
        return 2 * len(self.rope)


def check_known(checkpoint: Checkpoint, graph: str, **known: object) -> None:
    """CheckpointError when the config has another value of a key than the one that the graph describes."""
    for key, value in known.items():
        if checkpoint.config.get(key, value) != value:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has {key} = {checkpoint.config[key]!r}; the {graph} graph knows {value!r}"
            )


def decoder_facts(checkpoint: Checkpoint, graph: str, *, rotary_factor: float = 1.0) -> dict[str, Any]:
    """The fields of DecoderConfig; CheckpointError for heads that attention's operators do not take."""
    config = checkpoint.config
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head_size = int(config.get("head_dim") or hidden // heads)
    rotated = int(head_size * rotary_factor)
    for channels, what in ((head_size, "heads of {} channels"), (rotated, "RoPE over {} channels of a head")):
        if channels % HEAD_SIZE_STEP or not channels:
            raise CheckpointError(
                f"{checkpoint.folder}: config.json has {what.format(channels)}; the {graph} graph knows multiples of "
                f"{HEAD_SIZE_STEP} (GroupQueryAttention takes no others)"
            )
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_size": head_size,
        "layers": int(config["num_hidden_layers"]),
        "vocabulary": int(config["vocab_size"]),
        "eps": float(config.get("rms_norm_eps", 1e-6)),
        "rope": inverse_frequencies(checkpoint, graph, rotated),
        "labels": len(checkpoint.labels),
        "head": checkpoint.head if isinstance(checkpoint, Generator) else None,
    }


def layer_stages(checkpoint: Checkpoint) -> list[range]:
    """The layers, one stage each."""
    return [range(index, index + 1) for index in range(int(checkpoint.config["num_hidden_layers"]))]


def layer_parts(mixers: Sequence[str]) -> list[list[str]]:
    """What a recipe may choose a format for, by stage: the embedding, each layer's token mixer and its feed-forward."""
    parts = [[f"model.layers.{i}.{mixer}", f"model.layers.{i}.mlp"] for i, mixer in enumerate(mixers)]
    return [["model.embed_tokens", *parts[0]], *parts[1:]]


class TokenRows:
    """The texts of a graph as flat rows: their batch and sequence, and which row is each text's last real token.

    Fused recipes take `lengths` int32 [batch], plain ones `attention_mask` int64 [batch, sequence]; both pad on the right.
    Those that continue texts take `total_lengths` int32 [batch], with the tokens before these, and no padding: `last` is
    then the place in the text, and the last row is the last token's.
    """

    def __init__(self, g: GraphBuilder, source: ir.Value, *, continued: bool = False):
        """source: [batch, sequence, …]. continued: whether these are the next tokens of texts."""
        self.g = g
        self.continued = continued
        self.batch = g.op("Shape", source, start=0, end=1)
        self.sequence = g.op("Shape", source, start=1, end=2)
        self.mask: ir.Value | None = None
        self.lengths: ir.Value | None = None
        if g.recipe.contrib:
            self.lengths = lengths = g.input("total_lengths" if continued else "lengths", ir.DataType.INT32, ["batch"])
            self.last = g.op("Cast", g.op("Sub", lengths, g.constant([1], np.int32)), to=ir.DataType.INT64.value)
        else:
            self.mask = g.input("attention_mask", ir.DataType.INT64, ["batch", "sequence"])
            self.last = g.op("Sub", g.op("ReduceSum", self.mask, g.ints(1), keepdims=0), g.ints(1))
        self._shapes: dict[int, ir.Value] = {}

    def unflatten(self, rows: ir.Value, width: int) -> ir.Value:
        """[batch * sequence, width] → [batch, sequence, width]."""
        if width not in self._shapes:
            self._shapes[width] = self.g.op("Concat", self.batch, self.sequence, self.g.ints(width), axis=0)
        return self.g.op("Reshape", rows, self._shapes[width])

    def last_of(self, rows: ir.Value, width: int) -> ir.Value:
        """The last real token's row of each text, [batch, width]."""
        if self.continued:
            return self.g.op("Gather", self.unflatten(rows, width), self.g.constant(-1, np.int64), axis=1)
        places = self.g.op("Unsqueeze", self.last, self.g.ints(1))
        return self.g.op("GatherND", self.unflatten(rows, width), places, batch_dims=1)


C = TypeVar("C", bound=DecoderConfig)


class Decoder(ABC, Generic[C]):
    """A decoder's graph under construction."""

    # What is added to the stored weights of the norms over the hidden states.
    norm_offset: ClassVar[float] = 0.0
    rows: TokenRows

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        config: C,
        linears: Linears,
        stage: range,
        *,
        max_tokens: int | None = None,
    ):
        """max_tokens: the longest text, where the graph must know it (default: what the checkpoint allows)."""
        self.max_tokens = max_tokens or checkpoint.max_tokens
        self.g = g
        self.checkpoint = checkpoint
        self.config = config
        self.linears = linears
        self.stage = stage
        # Whether the graph takes the next tokens of texts, whose states come back in place.
        self.continued = config.head is not None and g.recipe.state
        self._tables: dict[str, VocabularyTable] = {}

    @abstractmethod
    def prepare(self) -> None:
        """Inputs and values that all token mixers read; `rows` is there already."""

    @abstractmethod
    def mix(self, x: ir.Value, pending: ir.Value | None, index: int) -> tuple[ir.Value, ir.Value]:
        """What a layer's token mixer adds to the residual stream, and that stream (`x + pending`); both float32 rows.

        In the last layer, rows [batch, hidden] of the last real token alone.
        """

    def build(self) -> None:
        """Emit every node."""
        g, config = self.g, self.config
        shape = ["batch", "sequence"]
        if self.stage.start == 0:
            source = g.input("input_ids", ir.DataType.INT64, shape)
            x = self._embed(source)
        else:
            source = x = g.input("hidden", ir.DataType.FLOAT, [*shape, config.hidden])
        self.rows = TokenRows(g, source, continued=self.continued)
        self.prepare()
        x = g.op("Reshape", x, g.ints(-1, config.hidden))
        # What the block before has computed is added to the residual stream by the next norm.
        pending: ir.Value | None = None
        for index in self.stage:
            mixed, x = self.mix(x, pending, index)
            x.name = hidden_name(index)
            pending, x = self._feed_forward(x, mixed, index)
            x.name = mixed_name(index)
        assert pending is not None
        if self.stage.stop < config.layers:
            hidden = self.rows.unflatten(g.op("Add", x, pending), config.hidden)
            g.output(hidden, "hidden_after", ir.DataType.FLOAT, [*shape, config.hidden])
            return
        normed, x = self.norm(x, pending, "model.norm", None)
        x.name = hidden_name(config.layers)
        if config.head is not None:
            logits = self._table(config.head).logits(normed)
            g.output(logits, "logits", ir.DataType.FLOAT, ["batch", config.vocabulary])
            return
        score = g.weight("score.weight", self.matrix("score.weight"))
        g.output(g.op("MatMul", normed, score), "logits", ir.DataType.FLOAT, ["batch", config.labels])

    def _embed(self, ids: ir.Value) -> ir.Value:
        """The tokens' rows of the embedding, float32 [batch, sequence, hidden]."""
        if self.config.head is not None:
            return self._table(EMBEDDING).rows(ids)
        shape = (self.config.vocabulary, self.config.hidden)
        return embedding(self.g, EMBEDDING, lambda: self.checkpoint.row_chunks(EMBEDDING), shape, ids)

    def _table(self, name: str) -> VocabularyTable:
        """The embedding or the head; the same one where they are tied."""
        if name not in self._tables:
            shape = (self.config.vocabulary, self.config.hidden)
            self._tables[name] = VocabularyTable(self.g, name, self.checkpoint.row_chunks(name), shape)
        return self._tables[name]

    def is_last(self, index: int) -> bool:
        """Whether only the last real token is needed behind this layer's mixer."""
        return index == self.config.layers - 1

    def asks_last(self, index: int) -> bool:
        """Whether this layer's attention has one query, the last real token's.

        Where texts are continued in place, the one operator that keeps their cache asks for all tokens.
        """
        return self.is_last(index) and not self.continued

    def norm(
        self, x: ir.Value, addend: ir.Value | None, name: str, rescaled: Rescaling | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of `x + addend`, smoothed for the linear layers that read it; and the sum. Both float32."""
        g = self.g
        weight = self.norm_weight(name)
        stored = g.weight(f"{name}.weight", weight if rescaled is None else weight / rescaled.scale)
        if addend is None:
            return rms_norm(g, x, stored, self.config.eps), x
        return add_rms_norm(g, x, addend, stored, self.config.eps)

    def norm_weight(self, name: str) -> FloatArray:
        """What a norm over the hidden states multiplies by, [hidden]."""
        return self.tensor(f"{name}.weight") + np.float32(self.norm_offset)

    def output_with_room(self, weight: FloatArray, reach: FloatArray) -> tuple[FloatArray, FloatArray]:
        """A matrix [K, hidden] that writes to the residual stream with room for its result, and what `widened` takes.

        reach: the largest |input| [K] for any text. Nothing changes in float32 recipes.
        """
        if not self.g.half:
            return weight, np.ones(weight.shape[1], np.float32)
        factors = divisors(weight, reach)
        return weight / factors, factors

    def widened(self, y: ir.Value, factors: FloatArray) -> ir.Value:
        """Rows in float32, times the powers of two [hidden] that their matrix was divided by."""
        g = self.g
        y = g.cast(y, np.float32)
        return y if (factors == 1).all() else g.op("Mul", y, g.constant(factors, np.float32))

    def values_reach(self, norm: str, value: FloatArray) -> FloatArray:
        """The largest |context| of attention for any text, [heads * head_size]: means of value rows reach no further."""
        config = self.config
        reach = reach_after_norm(self.norm_weight(norm), value).reshape(config.kv_heads, 1, config.head_size)
        return np.repeat(reach, config.heads // config.kv_heads, axis=1).reshape(-1)

    def tensor(self, name: str) -> FloatArray:
        """A tensor of the checkpoint, float32."""
        return self.checkpoint.tensor(name)

    def matrix(self, name: str) -> FloatArray:
        """A torch Linear's [out, in] weight as [in, out]."""
        return np.ascontiguousarray(self.checkpoint.tensor(name).T)

    def _feed_forward(self, x: ir.Value, pending: ir.Value, index: int) -> tuple[ir.Value, ir.Value]:
        """What the feed-forward adds to the residual stream, and that stream."""
        g, prefix = self.g, f"model.layers.{index}"
        weights = GatedWeights(*(self.matrix(f"{prefix}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")))
        both = np.concatenate([weights.gate, weights.up], axis=1)
        rescaled = self.linears.rescaling(f"{prefix}.mlp.gate_up", both, centred=False)
        normed, x = self.norm(x, pending, f"{prefix}.post_attention_layernorm", rescaled)
        factors = np.ones(self.config.hidden, np.float32)
        if g.half:
            weights, factors = gated_with_room(self.norm_weight(f"{prefix}.post_attention_layernorm"), weights)
        y = self.linears.gated(g.cast(normed, np.float16), f"{prefix}.mlp", weights, rescaled)
        return self.widened(y, factors), x
