"""What this box lacks for tests on an NVIDIA GPU."""

from __future__ import annotations

import ctypes


def missing_cuda() -> str | None:
    """Why nothing can run on CUDA here, in a sentence; None where it can."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return (
            f"this ONNX Runtime {onnxruntime.__version__} has no CUDAExecutionProvider: pip install 'samescore[cuda]'"
        )
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver lists no device"
    return None
