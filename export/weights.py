"""The external data file of a graph, written as a stream: one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# ONNX Runtime memory-maps external data only at page-aligned offsets.
ALIGNMENT = 4096


class WeightFile:
    """Appends tensors to one file and returns the references that a graph stores."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, array: npt.NDArray[Any]) -> ir.ExternalTensor:
        """Write one array; dtype and shape are the array's."""
        return self.add_chunks(name, [array], array.shape, array.dtype)

    def add_chunks(
        self, name: str, chunks: Iterable[npt.NDArray[Any]], shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> ir.ExternalTensor:
        """Write an array that arrives in blocks along its first axis."""
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        for chunk in chunks:
            self._file.write(np.ascontiguousarray(chunk, dtype=dtype).data)
        length = self._file.tell() - offset
        expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if length != expected:
            raise AssertionError(f"{name}: wrote {length} bytes for shape {shape}, expected {expected}")
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=length,
            dtype=ir.DataType.from_numpy(np.dtype(dtype)),
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.path.parent),
        )

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
