"""BERT sequence classification (`BertForSequenceClassification`), from the config and the tensors alone.

    ids → word + position + segment-0 embeddings → LayerNorm
        → layers × (self-attention → add → LayerNorm → feed-forward → add → LayerNorm)
        → first token → pooler (tanh) → classifier → logits

Only the first token is read at the end, so in the last layer everything after its keys and values is computed for that
token alone. Rows are kept flat [batch * sequence, hidden]; only attention sees the batch. The residual stream and the norms
are float32 in every recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs.blocks import GraphBuilder, embedding, layer_norm
from samescore.export.graphs.formats import make_linears
from samescore.export.graphs.headroom import divisors, reach_after_norm
from samescore.export.graphs.linears import Linears
from samescore.export.intermediate import hidden_name, mixed_name
from samescore.export.quantize import ChannelStatistics, Rescaling
from samescore.export.recipes import Recipe
from samescore.export.weights import WeightFile
from samescore.runtime.errors import CheckpointError

FloatArray = npt.NDArray[np.float32]

ARCHITECTURE = "BertForSequenceClassification"
VARIANTS = ("cpu-int8", "cpu-fp32", "cpu-int4", "cuda-fp16", "cuda-int8", "migraphx-fp16", "migraphx-int8")
# ONNX Gelu's `approximate` for each activation that transformers calls a GELU.
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Heads whose size this divides, up to the largest, have a memory-efficient attention kernel on CUDA.
EFFICIENT_HEAD_STEP, EFFICIENT_HEAD_MAXIMUM = 8, 1024


@dataclass(frozen=True)
class BertConfig:
    """The facts of `config.json` that the graph needs."""

    hidden: int
    heads: int
    layers: int
    vocabulary: int
    positions: int
    eps: float
    activation: str
    labels: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> BertConfig:
        """From a checkpoint; CheckpointError for a BERT that this graph does not describe."""
        config = checkpoint.config
        _refuse(checkpoint, "position_embedding_type", config.get("position_embedding_type", "absolute"), {"absolute"})
        _refuse(checkpoint, "is_decoder", bool(config.get("is_decoder", False)), {False})
        _refuse(checkpoint, "hidden_act", config.get("hidden_act", "gelu"), set(GELUS))
        return cls(
            hidden=int(config["hidden_size"]),
            heads=int(config["num_attention_heads"]),
            layers=int(config["num_hidden_layers"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(config["max_position_embeddings"]),
            eps=float(config.get("layer_norm_eps", 1e-12)),
            activation=GELUS[config.get("hidden_act", "gelu")],
            labels=len(checkpoint.labels),
        )


def _refuse(checkpoint: Checkpoint, key: str, value: Any, known: set[Any]) -> None:
    if value not in known:
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has {key} = {value!r}; the bert graph knows {', '.join(sorted(map(repr, known)))}"
        )


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

    Inputs: `input_ids` int64 [batch, sequence]; plain recipes add `attention_mask` int64 of the same shape, fused ones
    with `recipe.padding` add `lengths` int32 [batch] (real tokens of each row, at least 1); padding is on the right. The
    other fused ones expect texts of equal length without padding. Output: `logits` float32 [batch, labels].
    statistics: by linear layer, of its input channels on calibration texts (int8 recipes).
    taps: also output these statistics, under `tap_name`. stage: only these layers; a stage that is not the first takes
    `hidden` float32 [batch, sequence, hidden] in place of the ids, one that is not the last returns `hidden_after`.
    """
    g = GraphBuilder(weights, recipe)
    config = BertConfig.read(checkpoint)
    linears = make_linears(g, statistics=statistics, taps=taps)
    _Bert(g, checkpoint, config, linears, stage or range(config.layers)).build()
    return g.model(checkpoint.architecture)


def stages(checkpoint: Checkpoint) -> list[range]:
    """The layers, one stage each."""
    return [range(index, index + 1) for index in range(int(checkpoint.config["num_hidden_layers"]))]


def parts(checkpoint: Checkpoint) -> list[list[str]]:
    """What a recipe may choose a format for, by stage: the embedding, and each layer's attention and feed-forward halves."""
    names = ("attention.self", "attention.output", "intermediate", "output")
    layers = [
        [f"bert.encoder.layer.{i}.{name}" for name in names] for i in range(int(checkpoint.config["num_hidden_layers"]))
    ]
    return [["bert.embeddings", *layers[0]], *layers[1:]]


class _Bert:
    """The graph under construction."""

    def __init__(self, g: GraphBuilder, checkpoint: Checkpoint, config: BertConfig, linears: Linears, stage: range):
        self.g = g
        self.checkpoint = checkpoint
        self.config = config
        self.linears = linears
        self.stage = stage
        shape = ["batch", "sequence"]
        if stage.start == 0:
            self.source = g.input("input_ids", ir.DataType.INT64, shape)
        else:
            self.source = g.input("hidden", ir.DataType.FLOAT, [*shape, config.hidden])
        self.mask_bias = None if g.recipe.contrib else self._mask_bias()
        self.lengths = g.input("lengths", ir.DataType.INT32, ["batch"]) if g.recipe.padding else None
        self._key_masks: dict[bool, ir.Value | None] = {}

    def build(self) -> None:
        """Emit every node."""
        g, config = self.g, self.config
        first = self.stage.start == 0
        x = self._embeddings() if first else g.op("Reshape", self.source, g.ints(-1, config.hidden))
        x.name = hidden_name(self.stage.start)
        for index in self.stage:
            x = self._layer(x, index, last=index == config.layers - 1)
            x.name = hidden_name(index + 1)
        if self.stage.stop == config.layers:
            self._head(x)
            return
        hidden = self._unflatten(x, 1)
        g.output(hidden, "hidden_after", ir.DataType.FLOAT, ["batch", "sequence", config.hidden])

    def _embeddings(self) -> ir.Value:
        g, prefix = self.g, "bert.embeddings"
        word = f"{prefix}.word_embeddings.weight"
        shape = (self.config.vocabulary, self.config.hidden)
        x = embedding(g, word, lambda: self.checkpoint.row_chunks(word), shape, self.source)
        segment = self._tensor(f"{prefix}.token_type_embeddings.weight")[0]
        positions = g.weight(
            f"{prefix}.position_embeddings.weight", self._tensor(f"{prefix}.position_embeddings.weight") + segment
        )
        length = g.op("Shape", self.source, start=1, end=2)
        x = g.op("Add", x, g.op("Slice", positions, g.ints(0), length, g.ints(0)))
        rows = g.op("Reshape", x, g.ints(-1, self.config.hidden))
        return self._norm(rows, f"{prefix}.LayerNorm")

    def _layer(self, x: ir.Value, index: int, *, last: bool) -> ir.Value:
        """One encoder layer on float32 rows [rows, hidden]; in the last one, first-token rows [batch, hidden] come out."""
        g, prefix = self.g, f"bert.encoder.layer.{index}"
        attention = f"{prefix}.attention"
        out_weight = self._matrix(f"{attention}.output.dense.weight")
        rescaled = self.linears.rescaling(f"{attention}.output.dense", out_weight)
        context, x = self._attention(x, f"{attention}.self", rescaled, last=last)
        reach = self._reach(self._norm_before(index), f"{attention}.self.value")
        x = self._add_linear(x, context, f"{attention}.output", reach, rescaled=rescaled)
        x.name = mixed_name(index)
        inner = self._linear(g.cast(x, np.float16), f"{prefix}.intermediate.dense")
        inner = self._gelu(inner)
        reach = self._reach(f"{attention}.output.LayerNorm", f"{prefix}.intermediate.dense")
        return self._add_linear(x, inner, f"{prefix}.output", reach, after_gelu=True)

    def _add_linear(self, x: ir.Value, y: ir.Value, name: str, reach: FloatArray, **options: Any) -> ir.Value:
        """LayerNorm of `x` plus a linear layer's rows of `y`; in half precision with room for its result.

        reach: the largest |y| [K] for any text. The sum is float32: either of the two may be large.
        """
        g = self.g
        weight, bias = self._matrix(f"{name}.dense.weight"), self._tensor(f"{name}.dense.bias")
        factors = divisors(weight, reach) if g.half else np.ones(len(bias), np.float32)
        rows = g.cast(self.linears(y, f"{name}.dense", weight / factors, bias / factors, **options), np.float32)
        if (factors != 1).any():
            rows = g.op("Mul", rows, g.constant(factors, np.float32))
        return self._norm(g.op("Add", rows, x), f"{name}.LayerNorm")

    def _norm_before(self, index: int) -> str:
        """The norm whose rows a layer reads."""
        return f"bert.encoder.layer.{index - 1}.output.LayerNorm" if index else "bert.embeddings.LayerNorm"

    def _reach(self, norm: str, linear: str) -> FloatArray:
        """The largest |linear(norm(x))| [N] for any text; a GELU enlarges nothing."""
        weight, bias = self._matrix(f"{linear}.weight"), self._tensor(f"{linear}.bias")
        offset = np.abs(self._tensor(f"{norm}.bias") @ weight + bias)
        reach: FloatArray = reach_after_norm(self._tensor(f"{norm}.weight"), weight) + offset
        return reach

    def _attention(
        self, x: ir.Value, prefix: str, rescaled: Rescaling | None, *, last: bool
    ) -> tuple[ir.Value, ir.Value]:
        """Context rows and the residual rows they belong to.

        What rescales the output projection's input is applied to the value projection: attention takes weighted means
        of value rows, so a shift and a scale per channel pass through it.
        """
        weights = {part: self._matrix(f"{prefix}.{part}.weight") for part in ("query", "key", "value")}
        biases = {part: self._tensor(f"{prefix}.{part}.bias") for part in ("query", "key", "value")}
        if rescaled is not None:
            weights["value"] = weights["value"] / rescaled.scale
            biases["value"] = (biases["value"] - rescaled.shift) / rescaled.scale

        halved = self.g.cast(x, np.float16)

        def project(rows: ir.Value, *parts: str) -> list[ir.Value]:
            weight = np.concatenate([weights[part] for part in parts], axis=1)
            bias = np.concatenate([biases[part] for part in parts])
            rows = halved if rows is x else self.g.cast(rows, np.float16)
            packed = self._unflatten(self.linears(rows, f"{prefix}.{'_'.join(parts)}", weight, bias), len(parts))
            if len(parts) == 1:
                return [packed]
            return self.g.op_many("Split", packed, outputs=len(parts), axis=-1, num_outputs=len(parts))

        if not last:
            query, key, value = project(x, "query", "key", "value")
            return self._attend(query, key, value, x), x
        key, value = project(x, "key", "value")
        first = self._first_rows(x)
        (query,) = project(first, "query")
        # `query` came out as [batch, 1, hidden]: _unflatten divides the rows evenly over the batch.
        return self._attend(query, key, value, x, one_query=True), first

    def _attend(
        self, query: ir.Value, key: ir.Value, value: ir.Value, rows: ir.Value, *, one_query: bool = False
    ) -> ir.Value:
        """Multi-head attention of [batch, q, hidden] on [batch, k, hidden]; rows [batch * q, hidden].

        rows, one_query: see `_key_mask`.
        """
        g, heads = self.g, self.config.heads
        if self.mask_bias is None:
            mask = self._key_mask(rows, one_query=one_query)
            context = g.contrib("MultiHeadAttention", query, key, value, None, mask, num_heads=heads)
        else:
            context = self._attend_plain(query, key, value)
        return g.op("Reshape", context, g.ints(-1, self.config.hidden))

    def _attend_plain(self, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """The same from standard operators; scores and softmax in float32."""
        g, size = self.g, self.config.hidden // self.config.heads

        def split_heads(x: ir.Value, order: list[int]) -> ir.Value:
            return g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, self.config.heads, size)), perm=order)

        scaled = g.op("Mul", query, g.constant(1 / math.sqrt(size), g.float_dtype))
        scores = g.op("MatMul", split_heads(scaled, [0, 2, 1, 3]), split_heads(key, [0, 2, 3, 1]))
        scores = g.op("Add", g.cast(scores, np.float32), self.mask_bias)
        probabilities = g.cast(g.op("Softmax", scores, axis=-1), g.float_dtype)
        context = g.op("MatMul", probabilities, split_heads(value, [0, 2, 1, 3]))
        return g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.ints(0, 0, self.config.hidden))

    def _head(self, first: ir.Value) -> None:
        """Pooler and classifier, always in float32."""
        g = self.g
        pooled = self._gemm(first, "bert.pooler.dense")
        logits = self._gemm(g.op("Tanh", pooled), "classifier")
        g.output(logits, "logits", ir.DataType.FLOAT, ["batch", self.config.labels])

    def _mask_bias(self) -> ir.Value:
        """0 on real keys and float32's lowest value on padded ones, float32 [batch, 1, 1, sequence]."""
        g = self.g
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", "sequence"])
        real = g.op("Cast", mask, to=ir.DataType.BOOL.value)
        lowest = float(np.finfo(np.float32).min)
        bias = g.op("Where", real, g.constant(0.0, np.float32), g.constant(lowest, np.float32))
        return g.op("Unsqueeze", bias, g.ints(1, 2))

    def _key_mask(self, rows: ir.Value, *, one_query: bool) -> ir.Value | None:
        """MultiHeadAttention's mask of padded keys, None where texts are never padded.

        rows: of all tokens [batch * sequence, …]. one_query: of each text, not all.

        Of the forms that the operator takes, only lengths with offsets, int32 [3 * batch + 2], reach CUDA's memory-efficient
        kernel, which keeps scores and softmax in float32 and never stores the whole matrix of scores: real keys of each
        text, then where each text's queries begin and the last ones end, then the same of the keys. The kernels for other
        head sizes would misread the offsets; they get the lengths alone.
        """
        if self.lengths is None:
            return None
        size = self.config.hidden // self.config.heads
        if size % EFFICIENT_HEAD_STEP or size > EFFICIENT_HEAD_MAXIMUM:
            return self.lengths
        if one_query not in self._key_masks:
            g = self.g
            batch, sequence, tokens = (
                g.op("Cast", g.op("Shape", x, start=axis, end=axis + 1), to=ir.DataType.INT32.value)
                for x, axis in ((self.source, 0), (self.source, 1), (rows, 0))
            )
            zero, one = g.constant(0, np.int32), g.constant([1], np.int32)

            def starts(total: ir.Value, step: ir.Value) -> ir.Value:
                """0, step, 2 step, …, total."""
                limit = g.op("Add", total, one)
                return g.op("Range", zero, *(g.op("Squeeze", x, g.ints(0)) for x in (limit, step)))

            queries, keys = starts(batch, one) if one_query else None, starts(tokens, sequence)
            self._key_masks[one_query] = g.op("Concat", self.lengths, queries or keys, keys, axis=0)
        return self._key_masks[one_query]

    def _gelu(self, x: ir.Value) -> ir.Value:
        return self.g.op("Gelu", x, approximate=self.config.activation)

    def _first_rows(self, rows: ir.Value) -> ir.Value:
        """The first token's row of each text, [batch, hidden]."""
        x = self._unflatten(rows, 1)
        return self.g.op("Gather", x, self.g.constant(0, np.int64), axis=1)

    def _unflatten(self, rows: ir.Value, width: int) -> ir.Value:
        """[batch * n, width * hidden] → [batch, n, width * hidden]."""
        g = self.g
        batch = g.op("Shape", self.source, start=0, end=1)
        shape = g.op("Concat", batch, g.ints(-1, width * self.config.hidden), axis=0)
        return g.op("Reshape", rows, shape)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        """LayerNorm of float32 rows."""
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return layer_norm(self.g, x, name, weight, bias, self.config.eps)

    def _linear(
        self,
        x: ir.Value,
        name: str,
        weight: FloatArray | None = None,
        *,
        after_gelu: bool = False,
        rescaled: Rescaling | None = None,
    ) -> ir.Value:
        matrix = self._matrix(f"{name}.weight") if weight is None else weight
        return self.linears(x, name, matrix, self._tensor(f"{name}.bias"), after_gelu=after_gelu, rescaled=rescaled)

    def _gemm(self, x: ir.Value, name: str) -> ir.Value:
        g = self.g
        weight = g.weight(f"{name}.weight", self._matrix(f"{name}.weight"))
        return g.op("Gemm", x, weight, g.weight(f"{name}.bias", self._tensor(f"{name}.bias")))

    def _tensor(self, name: str) -> FloatArray:
        return self.checkpoint.tensor(name)

    def _matrix(self, name: str) -> FloatArray:
        """A torch Linear's [out, in] weight as [in, out]."""
        return np.ascontiguousarray(self.checkpoint.tensor(name).T)
