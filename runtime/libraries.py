"""The vendor libraries that GPU providers are linked to: loaded before a session, named when one is missing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import re
from pathlib import Path
from types import ModuleType

log = logging.getLogger(__name__)

# The provider's own library in onnxruntime/capi, and what to install when one that it needs is absent.
PROVIDER_LIBRARIES = {
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "MIGraphXExecutionProvider": "libonnxruntime_providers_migraphx.so",
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
}
REMEDIES = {
    "CUDAExecutionProvider": "Install the CUDA 13 libraries (pip install 'samescore[cuda]') and an NVIDIA driver of the 580 "
    "series or newer",
    "MIGraphXExecutionProvider": "Install ROCm with MIGraphX of the version that this ONNX Runtime was built for (apt install "
    "migraphx; its lib folder must be known to the loader)",
}
_ABSENT = re.compile(r"([\w+.-]+\.so[.\d]*): cannot open shared object file")
_WRONG_VERSION = re.compile(r"version `[^']+' not found")


def missing_library(ort: ModuleType, provider: str) -> str | None:
    """The loader's message where a library that a provider (ONNX Runtime's name) needs cannot be loaded, else None.

    None too for a provider whose library is not known or not a file of this build.
    """
    name = PROVIDER_LIBRARIES.get(provider)
    path = Path(str(ort.__file__)).parent / "capi" / name if name else None
    if path is None or not path.is_file():
        return None
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        # Outside ONNX Runtime the provider lacks ONNX Runtime's own symbols; that message says nothing about this box.
        if _ABSENT.search(str(error)) or _WRONG_VERSION.search(str(error)):
            return str(error)
    return None


def remedy(provider: str) -> str:
    """What to install for a provider, a sentence without its full stop."""
    return REMEDIES.get(provider, f"Install what {provider} needs on this box")


@functools.cache
def preload(ort: ModuleType) -> None:
    """Load the CUDA and cuDNN libraries that pip installed, which the loader does not find by itself; once per process.

    ONNX Runtime prints what it could not load. Whether that matters shows when the session is made, so it goes to the log.
    """
    load = getattr(ort, "preload_dlls", None)
    if load is None:
        return
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        load()
    if said.getvalue():
        log.debug("preloading CUDA libraries: %s", said.getvalue().strip())
