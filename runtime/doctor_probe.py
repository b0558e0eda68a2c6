"""The doctor's questions that load ONNX Runtime or vendor libraries, answered in a process of their own.

A vendor library may crash, hang or print; none of that reaches the doctor. The child is `python -m
samescore.runtime.doctor_probe QUESTION …`; it answers with JSON objects, a line each, as soon as it knows them, so that what it
said before it died is kept.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samescore.runtime.bundle import Bundle, ModelBytes
from samescore.runtime.canary import here, read_canary
from samescore.runtime.classifier import Classifier
from samescore.runtime.cpu import u8s8_saturates
from samescore.runtime.elf import read_shared_library
from samescore.runtime.errors import ProviderError, SamescoreError
from samescore.runtime.libraries import preload
from samescore.runtime.loading import load
from samescore.runtime.opening import hand_over_weights, options_for
from samescore.runtime.placement import RECORD_ENTRY, placement_of, strays
from samescore.runtime.providers import candidates, plugin_devices, provider_name

# float32 [2, 2] `a` and `b` → `y` = a b: one MatMul. A test builds it again. Byte 1 is the IR version, the last one the opset.
PRODUCT = base64.b64decode(
    "CAg6WAoUCgFhCgFiEgF5GgFuIgZNYXRNdWwSAWdaEwoBYRIOCgwIARIICgIIAgoCCAJaEwoBYhIOCgwIARIICgIIAgoCCAJiEwoBeRIOCgwIARIICgIIAgoC"
    "CAJCBAoAEA0="
)
LEAST_IR, LEAST_OPSET = PRODUCT[1], PRODUCT[-1]
LOAD_SECONDS, BUNDLE_SECONDS = 120.0, 600.0

Answer = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a child said. facts: its answers, merged. died: how it ended where it did not end well. errors: its stderr."""

    facts: Mapping[str, Any]
    died: str | None
    errors: str
    seconds: float


def ask(question: str, *arguments: str, timeout: float = LOAD_SECONDS) -> Asked:
    """Ask one question (a key of QUESTIONS) in a child with this process's import path."""
    command = [sys.executable, "-P", "-m", __name__, question, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    started, died = time.monotonic(), None
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=timeout, check=False)
        output, errors = done.stdout, done.stderr
        if done.returncode < 0:
            died = f"crashed ({signal.Signals(-done.returncode).name})"
        elif done.returncode:
            died = f"ended with exit code {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        output, errors = expired.stdout or b"", expired.stderr or b""
        died = f"did not answer in {timeout:.0f} s"
    facts: Answer = {}
    for line in output.decode(errors="replace").splitlines():
        try:
            facts.update(json.loads(line))
        except ValueError:
            continue
    return Asked(facts, died, errors.decode(errors="replace"), time.monotonic() - started)


def describe_build() -> Iterator[Answer]:
    """What this ONNX Runtime is: version, folder, providers, the newest format it reads, whether uint8 × int8 clips."""
    ort = importlib.import_module("onnxruntime")
    yield {"version": str(ort.__version__), "folder": str(Path(str(ort.__file__)).parent)}
    plugged = [device.ep_name for device in plugin_devices(ort)]
    yield {"providers": list(dict.fromkeys([*ort.get_available_providers(), *plugged]))}
    yield {"ir": _newest(ort, 1, LEAST_IR), "opset": _newest(ort, -1, LEAST_OPSET)}
    try:
        yield {"saturates": u8s8_saturates()}
    except SamescoreError:  # two builds at once: the runtime refuses, and the doctor says so elsewhere
        yield {"saturates": None}


def load_provider(target: str) -> Iterator[Answer]:
    """A session of one product on a provider: `first`, the provider that it really has; then whether the `product` is right."""
    ort = _onnxruntime_for(target)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = _session(ort, PRODUCT, options, provider_name(target))
    yield {"first": session.get_providers()[0]}
    # Small integers are exact in every number format that a provider may round to.
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 6], [7, 8]], np.float32)
    product = session.run(["y"], {"a": a, "b": b})[0]
    yield {"product": bool(np.array_equal(product, a @ b))}


def find_libraries(library: str, target: str) -> Iterator[Answer]:
    """Which libraries that `library` is linked against cannot be loaded, each with the loader's own words."""
    _onnxruntime_for(target)
    linked = read_shared_library(Path(library))
    missing: dict[str, str] = {}
    for name in linked.needed:
        folders = [path for folder in linked.search if (path := Path(folder) / name).exists()]
        try:
            ctypes.CDLL(str(folders[0]) if folders else name)
        except OSError as error:
            # "libcublasLt.so.13: cannot open …": the library itself, or one that it needs in turn.
            missing.setdefault(str(error).partition(":")[0], str(error))
    yield {"needed": list(linked.needed), "missing": missing}


def place(path: str, variant: str, target: str) -> Iterator[Answer]:
    """Where a provider would run each node of a variant; nothing is run."""
    ort = _onnxruntime_for(target)
    provider = provider_name(target)
    with Bundle(path) as bundle:
        model = bundle.model(bundle.manifest.variant(variant))
    session = _session(ort, model.graph, _options(ort, target, model), provider)
    placed = placement_of(session)
    if placed is None:
        yield {"first": session.get_providers()[0], "nodes": None}
        return
    yield {
        "first": placed.first,
        "nodes": {name: sum(operators.values()) for name, operators in placed.nodes.items()},
        "subgraphs": dict(placed.subgraphs),
        "strays": strays(placed, provider),
    }


def start(path: str, provider: str, variant: str, memory: str) -> Iterator[Answer]:
    """What `load` would choose, whether the environment is the certified one, and what the canary says, if `memory` suffices."""
    with Bundle(path) as bundle:
        chosen, target = candidates(bundle.manifest, provider=provider, variant=variant or None)[0]
        # What is tried first; said now, in case that it ends this process.
        yield {"tried": [chosen.name, target]}
    size = sum(bundle.manifest.files[name].size for name in chosen.data)
    if 0 < int(memory) < size:
        raise ProviderError(
            f"not tried: {chosen.name} holds {size / 1e9:.1f} GB, {int(memory) / 1e9:.1f} GB of memory are left"
        )
    opened = load(path, provider=provider, variant=variant or None, low_memory=True)
    chosen, target = opened.variant, opened.target
    yield {"variant": chosen.name, "target": target, "rejected": opened.rejected}
    if not isinstance(opened, Classifier):
        yield {"canary": None}
        return
    with Bundle(path) as bundle:
        certified = read_canary(bundle, chosen.name).variants[chosen.name].environment
    yield {"certified": dataclasses.asdict(certified), "here": dataclasses.asdict(here(target))}
    yield {"canary": dataclasses.asdict(opened.canary)}


QUESTIONS: dict[str, Callable[..., Iterator[Answer]]] = {
    "build": describe_build,
    "load": load_provider,
    "libraries": find_libraries,
    "place": place,
    "start": start,
}


def main(arguments: list[str]) -> int:
    """Answer one question on the real stdout; whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for answer in QUESTIONS[arguments[0]](*arguments[1:]):
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types
        code = error.exit_code if isinstance(error, SamescoreError) else None
        answers.write(json.dumps({"error": str(error), "code": code}) + "\n")
    return 0


def _newest(ort: Any, place: int, least: int) -> int:
    """The largest IR version (place 1) or opset (place -1) that this build accepts: it is asked with one after the other."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    graph = bytearray(PRODUCT)
    for number in range(least, 127):
        graph[place] = number
        try:
            ort.InferenceSession(bytes(graph), options, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's own exception types share no base
            return number - 1
    return 126


def _onnxruntime_for(target: str) -> Any:
    ort = importlib.import_module("onnxruntime")
    if target == "cuda":
        preload(ort)
    return ort


def _options(ort: Any, target: str, model: ModelBytes) -> Any:
    """As the runtime opens such files; nothing is run, so weights need not be repacked."""
    options = options_for(ort, target, intra_op_threads=1, low_memory=True)
    if target == "cpu":
        options.add_session_config_entry(RECORD_ENTRY, "1")
    hand_over_weights(options, model, target)
    return options


def _session(ort: Any, graph: bytes, options: Any, provider: str) -> Any:
    """A session on a provider of this build, or of a registered plugin, without samescore's own checks."""
    if provider in ort.get_available_providers():
        return ort.InferenceSession(graph, options, providers=[provider], enable_fallback=0)
    options.add_provider_for_devices(plugin_devices(ort, provider)[:1], {})
    return ort.InferenceSession(graph, options, enable_fallback=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
