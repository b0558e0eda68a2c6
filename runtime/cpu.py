"""What this CPU is, and whether its uint8 × int8 products are exact."""

from __future__ import annotations

import base64
import functools
import platform
from pathlib import Path

import numpy as np

from samescore.runtime.providers import import_onnxruntime

# Instruction sets that change which int8 kernel runs.
INT8_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")

# One MatMulIntegerToFloat node: `a` uint8, `b` int8, `s` float32 scalar scale of both → `y` float32. A test builds it again.
PROBE = base64.b64decode(
    "CAo6fAo3CgFhCgFiCgFzCgFzEgF5GgFuIhRNYXRNdWxJbnRlZ2VyVG9GbG9hdDoNY29tLm1pY3Jvc29mdBIBZ1oPCgFhEgoKCAgCEgQKAAoAWg8KAWISCgoI"
    "CAMSBAoACgBaCwoBcxIGCgQIARIAYg8KAXkSCgoICAESBAoACgBCBAoAEBVCEQoNY29tLm1pY3Jvc29mdBAB"
)


@functools.cache
def cpu_model() -> str:
    """The CPU's name as the operating system gives it."""
    return _cpu_field("model name") or platform.processor()


@functools.cache
def int8_flags() -> tuple[str, ...]:
    """Those of INT8_FLAGS that the operating system lists for this CPU."""
    return tuple(flag for flag in INT8_FLAGS if flag in (_cpu_field("flags") or "").split())


@functools.cache
def u8s8_saturates() -> bool:
    """Whether ONNX Runtime's uint8 × int8 products clip here: it is asked, in some milliseconds, once per process.

    Its kernels for AVX2 and AVX-512 without VNNI add pairs of products in int16 (vpmaddubsw): 2 · 255 · 127 is clipped to 32767.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(PROBE, options, providers=["CPUExecutionProvider"])
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    product = session.run(None, {"a": a, "b": b, "s": np.ones((), np.float32)})[0]
    return not np.array_equal(product, np.full((2, 32), 64 * 255 * 127, np.float32))


def _cpu_field(name: str) -> str | None:
    try:
        # Only as far as the first CPU: there may be hundreds.
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return None
