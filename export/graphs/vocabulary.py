"""A table with a row for every token: the embedding, the head, or both at once where they are tied."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from samescore.export.graphs.blocks import FloatArray, GraphBuilder
from samescore.export.quantize import quantize_blocks8
from samescore.runtime.errors import UsageError


class VocabularyTable:
    """A table [vocabulary, hidden] that is stored once, read by rows (`rows`) and multiplied by (`logits`).

    Its format is the recipe's for the embedding: float32 or float16, which Gather and Gemm read as it lies; or
    `int8-blocks`, uint8 [vocabulary, blocks, size] with the zero point 128 and a scale per block, which is MatMulNBits' own
    layout: the embedding's rows are gathered from the same initializer and dequantized.
    """

    def __init__(self, g: GraphBuilder, name: str, chunks: Iterator[FloatArray], shape: tuple[int, int]):
        """chunks: the table as float32 blocks of rows. shape: of the table."""
        self.g = g
        self.vocabulary, self.hidden = shape
        self.format = g.recipe.format_of(name, g.recipe.embedding)
        if self.format == "int8-blocks":
            self._store_blocks(name, chunks)
        elif self.format in ("float32", "float16"):
            tensor = g.weights.add_chunks(name, chunks, shape, np.dtype(self.format))
            self.table = g.initializer(tensor, name)
        else:
            raise UsageError(
                f"a head of a whole vocabulary has no format {self.format!r}; it can be float32, float16 or int8-blocks"
            )

    def rows(self, ids: ir.Value) -> ir.Value:
        """The rows of ids int64 [batch, sequence], float32 [batch, sequence, hidden]."""
        g = self.g
        rows = g.op("Gather", self.table, ids)
        if self.format == "float32":
            return rows
        rows = g.op("Cast", rows, to=ir.DataType.FLOAT.value)
        if self.format == "float16":
            return rows
        steps = g.op("Sub", rows, g.constant(128, np.float32))
        scale = g.op("Unsqueeze", g.op("Gather", self.scale, ids), g.ints(-1))
        flat = g.op("Reshape", g.op("Mul", steps, scale), g.ints(0, 0, -1))
        if self.blocks * self.size == self.hidden:
            return flat
        return g.op("Slice", flat, g.ints(0), g.ints(self.hidden), g.ints(2))

    def logits(self, x: ir.Value) -> ir.Value:
        """`x @ tableᵀ`, float32 [batch, vocabulary]; x float32 [batch, hidden]."""
        g = self.g
        if self.format == "int8-blocks":
            sizes = {"K": self.hidden, "N": self.vocabulary, "block_size": self.size}
            rows = self._digits(x) if self.blocks * self.size == self.hidden else x
            y = g.contrib("MatMulNBits", rows, self.table, self.scale, bits=8, accuracy_level=4, **sizes)
            return y if rows is x else g.op("Add", *g.op_many("Split", y, outputs=2, axis=0, num_outputs=2))
        if self.format == "float32":
            # Gemm reads the table as it lies; a Transpose of it would be folded into a second copy.
            return g.op("Gemm", x, self.table, transB=1)
        half = g.op("Gemm", g.op("Cast", x, to=ir.DataType.FLOAT16.value), self.table, transB=1)
        return g.op("Cast", half, to=ir.DataType.FLOAT.value)

    def _digits(self, x: ir.Value) -> ir.Value:
        """x [batch, hidden] as it will be rounded to int8 blocks, and below it what that rounding leaves: [2 batch, hidden].

        The products of both add up to that of x with a rounding 254 times finer.
        """
        g = self.g
        grouped = g.op("Reshape", x, g.ints(0, self.blocks, self.size))
        largest = g.op("ReduceMax", g.op("Abs", grouped), g.ints(2), keepdims=1)
        step = g.op("Max", g.op("Mul", largest, g.constant(1 / 127, np.float32)), g.constant(1e-30, np.float32))
        high = g.op("Mul", g.op("Round", g.op("Div", grouped, step)), step)
        both = g.op("Concat", high, g.op("Sub", grouped, high), axis=0)
        return g.op("Reshape", both, g.ints(-1, self.hidden))

    def _store_blocks(self, name: str, chunks: Iterator[FloatArray]) -> None:
        """The table's rows are the columns of the weight that MatMulNBits stands for."""
        g, scales = self.g, list[FloatArray]()
        probe, _ = quantize_blocks8(np.zeros((self.hidden, 1), np.float32), g.recipe.block)
        _, self.blocks, self.size = probe.shape

        def quantized() -> Iterator[np.ndarray]:
            for chunk in chunks:
                packed, scale = quantize_blocks8(chunk.T, g.recipe.block)
                scales.append(scale)
                yield packed

        shape = (self.vocabulary, self.blocks, self.size)
        self.table = g.initializer(g.weights.add_chunks(name, quantized(), shape, np.uint8), name)
        self.scale = g.weight(f"{name}.scale", np.concatenate(scales))
