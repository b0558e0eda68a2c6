"""`scores.npz`: the very logits a certificate was made from, so that anyone can compute its numbers again.

One float32 array [texts, labels] per variant, in the golden set's order: raw logits, before any recalibration. And
`bfloat16`: the reference's own run, where it was measured. The reference's float32 logits are in the golden set.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import BundleError

SCORES_NAME = "scores.npz"
BFLOAT16 = "bfloat16"
SCORES_LIMIT = 200_000_000
# What zipfile and numpy raise for bytes that are no such archive: also a compression that zipfile does not know, and a header
# that asks for more memory than there is.
UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
Scores = dict[str, npt.NDArray[np.float32]]


def write_scores(scores: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """The same arrays always give the same bytes."""
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **scores)
    return stream.getvalue()


def read_scores(raw: bytes) -> Scores:
    """The arrays by name; BundleError for anything but float32 [texts, labels]."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > SCORES_LIMIT:
                raise BundleError(f"{SCORES_NAME} unpacks to more than {SCORES_LIMIT} bytes")
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            scores = {name: arrays[name] for name in arrays.files}
    except UNREADABLE as error:
        raise BundleError(f"{SCORES_NAME} cannot be read: {error}") from error
    for name, array in scores.items():
        if array.dtype != np.float32 or array.ndim != 2:
            raise BundleError(
                f"{SCORES_NAME}: {name} is {array.dtype} of shape {array.shape}, not float32 [texts, labels]"
            )
    return scores
