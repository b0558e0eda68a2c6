"""Rotary position embedding: the frequencies that a config asks for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from samescore.export.checkpoint import Checkpoint, FloatArray
from samescore.runtime.errors import CheckpointError


def rope_parameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config's facts about RoPE: transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling."""
    config = checkpoint.config
    return config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }


def inverse_frequencies(checkpoint: Checkpoint, graph: str, size: int) -> FloatArray:
    """RoPE's inverse frequencies float32 [size / 2] of `size` rotated channels: plain, `linear` or `llama3` scaled.

    The llama3 formula is Llama 3.1's: wavelengths beyond `original / low_freq_factor` are stretched by `factor`, those
    below `original / high_freq_factor` are kept, and between them the two are mixed linearly.
    """
    rope = rope_parameters(checkpoint)
    kind = rope.get("rope_type", rope.get("type", "default"))
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain: FloatArray = (1.0 / np.float32(rope.get("rope_theta", 10000.0)) ** exponents).astype(np.float32)
    if kind == "default":
        return plain
    if kind == "linear":
        return plain / np.float32(rope["factor"])
    if kind != "llama3":
        raise CheckpointError(
            f"{checkpoint.folder}: config.json has rope_type = {kind!r}; the {graph} graph knows 'default', "
            "'linear' and 'llama3'"
        )
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths = 2 * math.pi / plain
    original = float(rope["original_max_position_embeddings"])
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    mixed: FloatArray = ((1 - kept) * plain / float(rope["factor"]) + kept * plain).astype(np.float32)
    return mixed
