"""One contender of `llama.py` or `scorer.py` in a process of its own: a model that answers JSON lines.

Startup:  → {"load_s", "memory", "details"}
Request:  {"texts": [[id, …], …], "mode": MODE, "prefix": n}  →  {"seconds", "logits": [[…], …]}
          {"rss": true}                                       →  {"rss_anon_mib", "rss_file_mib", "peak_rss_mib"}
          {"release": true}                                   →  the same, after freeing what only some modes need

MODE is `one_by_one`; `padded` (one batch); `streams` (OpenVINO, one by one over as many streams as threads); `workers`
(ours, one by one on that many single-threaded workers); `group` (ours, the first n tokens are the same in all texts and
are read once); `prefixed` (ours, those were read before, outside the timing). A request that fails is answered with
{"error"}. Between requests the process waits in a read.

It needs nothing but numpy and what its own contender runs on, so that it starts in another environment than samescore's.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np


class OursWorker:
    """A graph of samescore's in a folder, through the runtime's own calls; no tokenizer and no manifest needed."""

    def __init__(self, model: Path, threads: int, precision: str, pad: int):
        self.threads = threads
        self.bytes, verified = verified_bytes(model)
        self.sessions: dict[int, Any] = {}
        self.states: dict[bytes, Any] = {}
        state = self.session(threads).has_state
        versions = {name: metadata.version(name) for name in ("samescore", "onnxruntime", "numpy")}
        self.details = {**versions, "variant": model.name, "verify_s": verified, "state": state}

    def session(self, intra_op_threads: int) -> Any:
        """The session with that many threads per call, made on first use."""
        from samescore.runtime.session import Session

        if intra_op_threads not in self.sessions:
            self.sessions[intra_op_threads] = Session(self.bytes, "cpu", intra_op_threads=intra_op_threads)
        return self.sessions[intra_op_threads]

    def prepare(self, texts: list[Any], mode: str, prefix: int) -> None:
        """Make what the mode needs, outside the timing."""
        from samescore.runtime.prefill import state_after

        session = self.session(1 if mode == "workers" else self.threads)
        if mode == "prefixed" and (key := texts[0][:prefix].tobytes()) not in self.states:
            self.states[key] = state_after(session, texts[0][:prefix])

    def release(self) -> None:
        """Drop the session that only several workers need."""
        self.sessions = {self.threads: self.session(self.threads)}

    def run(self, texts: list[Any], mode: str, prefix: int) -> list[Any]:
        """Logits of each text."""
        from samescore.runtime.prefill import logits_of, state_after
        from samescore.runtime.scheduler import run_longest_first

        workers = self.threads if mode == "workers" else 1
        session = self.session(self.threads // workers)
        state = None
        if mode == "group":
            state = state_after(session, texts[0][:prefix])
            texts = [ids[prefix:] for ids in texts]
        elif mode == "prefixed":
            state = self.states[texts[0][:prefix].tobytes()]
            texts = [ids[prefix:] for ids in texts]
        elif mode not in ("one_by_one", "workers"):
            raise ValueError(f"no mode {mode!r} here")
        return run_longest_first(texts, len, lambda ids: logits_of(session, ids, state), workers=workers)


class TorchWorker:
    """The transformers model on the checkpoint itself, with scaled dot-product attention and no KV cache."""

    def __init__(self, model: Path, threads: int, precision: str, pad: int):
        import torch

        from samescore.calibrate.reference import load_reference
        from samescore.export.checkpoint import Checkpoint

        torch.set_num_threads(threads)
        self.torch, self.pad = torch, pad
        self.model = load_reference(Checkpoint(model), dtype=precision)  # type: ignore[arg-type]
        versions = {name: metadata.version(name) for name in ("torch", "transformers")}
        attention = str(self.model.config._attn_implementation)
        wait = os.environ.get("OMP_WAIT_POLICY", "default")
        self.details = {**versions, "precision": precision, "attention": attention, "omp_wait_policy": wait}

    def prepare(self, texts: list[Any], mode: str, prefix: int) -> None:
        """Nothing to do."""

    def run(self, texts: list[Any], mode: str, prefix: int) -> list[Any]:
        """Logits of each text."""
        with self.torch.inference_mode():
            if mode == "one_by_one":
                return [self.logits(ids[None, :], None)[0] for ids in texts]
            if mode == "padded":
                return list(self.logits(*padded(texts, self.pad)))
        raise ValueError(f"no mode {mode!r} here")

    def logits(self, ids: Any, mask: Any | None) -> Any:
        """Logits float32 [batch, labels]; without a mask transformers takes its fast causal path."""
        tensors = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
        inputs = {name: self.torch.from_numpy(value) for name, value in tensors.items()}
        return self.model(**inputs, use_cache=False).logits.float().numpy()


class TorchScorerWorker(TorchWorker):
    """The transformers language model: the label tokens' logits at the last position, the only one whose logits are made."""

    def __init__(self, model: Path, threads: int, precision: str, labels: list[int]):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.pad, self.labels = torch, 0, labels
        name = json.loads((model / "config.json").read_text())["architectures"][0]
        self.model = getattr(transformers, name).from_pretrained(model, dtype=getattr(torch, precision)).eval()
        versions = {package: metadata.version(package) for package in ("torch", "transformers")}
        attention = str(self.model.config._attn_implementation)
        wait = os.environ.get("OMP_WAIT_POLICY", "default")
        self.details = {**versions, "precision": precision, "attention": attention, "omp_wait_policy": wait}

    def logits(self, ids: Any, mask: Any | None) -> Any:
        """Logits float32 [batch, labels] of texts of one length."""
        found = self.model(input_ids=self.torch.from_numpy(ids), use_cache=False, logits_to_keep=1).logits
        return found[:, -1, self.labels].float().numpy()


class OpenVinoWorker:
    """An OpenVINO model file (`model.xml`) or ONNX graph (`model.onnx`) on OpenVINO's CPU plugin."""

    def __init__(self, model: Path, threads: int, precision: str, pad: int):
        import openvino

        self.openvino, self.pad = openvino, pad
        self.core = openvino.Core()
        self.path = next(path for path in (model / "model.xml", model / "model.onnx") if path.exists())
        self.threads = threads
        self.options = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
        self.compiled: Any = self.compile(1)
        self.request: Any = self.compiled.create_infer_request()
        self.queue: Any = None
        used = self.compiled.get_property("INFERENCE_PRECISION_HINT")
        name = used.get_type_name() if hasattr(used, "get_type_name") else str(used)
        self.details = {
            "openvino": openvino.get_version(),
            "precision": name,
            "dynamic_quantization_group": str(self.compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")),
            "fused_attentions": self.fused_attentions(),
        }

    def fused_attentions(self) -> int:
        """How many layers' attention the plugin recognized and runs without a matrix of all scores."""
        nodes = self.compiled.get_runtime_model().get_ordered_ops()
        return sum("ScaledDotProduct" in str(node.get_rt_info()["layerType"].value) for node in nodes)

    def release(self) -> None:
        """Compile anew: what long texts and streams have grown to is otherwise kept."""
        # Not release_memory(): in OpenVINO 2026.4 the next request after it crashes.
        self.queue = self.request = self.compiled = None
        gc.collect()
        self.compiled = self.compile(1)
        self.request = self.compiled.create_infer_request()

    def compile(self, streams: int) -> Any:
        """The model for that many concurrent requests, on all threads together."""
        hint = "LATENCY" if streams == 1 else "THROUGHPUT"
        options = {"INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": streams, "PERFORMANCE_HINT": hint}
        return self.core.compile_model(self.path, "CPU", {**options, **self.options})

    def prepare(self, texts: list[Any], mode: str, prefix: int) -> None:
        """Compile for streams, outside the timing."""
        if mode == "streams" and self.queue is None:
            self.queue = self.openvino.AsyncInferQueue(self.compile(self.threads), self.threads)

    def run(self, texts: list[Any], mode: str, prefix: int) -> list[Any]:
        """Logits of each text."""
        if mode == "one_by_one":
            return [self.request.infer(feeds(*padded([ids], self.pad)))[0][0].copy() for ids in texts]
        if mode == "padded":
            return list(self.request.infer(feeds(*padded(texts, self.pad)))[0].copy())
        if mode != "streams":
            raise ValueError(f"no mode {mode!r} here")
        rows: dict[int, Any] = {}
        self.queue.set_callback(
            lambda request, index: rows.__setitem__(index, request.get_output_tensor(0).data[0].copy())
        )
        for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
            self.queue.start_async(feeds(*padded([texts[index]], self.pad)), index)
        self.queue.wait_all()
        return [rows[index] for index in range(len(texts))]


WORKERS = {"ours": OursWorker, "torch": TorchWorker, "openvino": OpenVinoWorker}


def verified_bytes(model: Path) -> tuple[Any, float]:
    """A graph of samescore's with its data, and the seconds that hashing took.

    A bundle is hashed before it is used; what that costs in time and mapped pages belongs to loading.
    """
    from samescore.runtime.bundle import ModelBytes

    with (model / "model.onnx.data").open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    seconds = time.perf_counter() - started
    return ModelBytes(graph=(model / "model.onnx").read_bytes(), data={"model.onnx.data": data}), seconds


def padded(texts: Sequence[Any], pad: int) -> tuple[Any, Any]:
    """Ids, padded on the right, and mask int64 [texts, longest]."""
    ids = np.full((len(texts), max(map(len, texts))), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def feeds(ids: Any, mask: Any) -> dict[str, Any]:
    """The plain graph's inputs."""
    return {"input_ids": ids, "attention_mask": mask}


def memory() -> dict[str, float]:
    """Resident memory of this process, private and file-backed, and its peak, in MiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"rss_anon_mib": "RssAnon", "rss_file_mib": "RssFile", "peak_rss_mib": "VmHWM"}
    return {name: int(fields[field].split()[0]) / 1024 for name, field in names.items()}


def answer(worker: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    if request.get("release") and hasattr(worker, "release"):
        worker.release()
    if request.get("rss") or request.get("release"):
        return memory()
    texts = [np.asarray(ids, dtype=np.int64) for ids in request["texts"]]
    mode, prefix = request["mode"], int(request.get("prefix", 0))
    try:
        worker.prepare(texts, mode, prefix)
        started = time.perf_counter()
        rows = worker.run(texts, mode, prefix)
        seconds = time.perf_counter() - started
    except Exception as error:  # whatever a contender raises belongs in its row
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"seconds": seconds, "logits": [[float(value) for value in row] for row in rows]}


def serve(load: Callable[[], Any], answer: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Load a contender and say how it went; then answer each line of stdin until it ends."""
    # Libraries that print must not disturb the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    worker = load()
    seconds = time.perf_counter() - started
    print(json.dumps({"load_s": seconds, "memory": memory(), "details": worker.details}), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(worker, json.loads(line))), file=replies)


def main() -> None:
    """Load, then answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=WORKERS)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder, or one with a model file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--precision", default="default", help="torch: the dtype; OpenVINO: the inference precision")
    parser.add_argument("--pad", type=int, default=0, help="the token that pads batches")
    parser.add_argument("--label-ids", type=int, nargs="+", help="score these tokens of a language model")
    arguments = parser.parse_args()
    settings = (arguments.model, arguments.threads, arguments.precision)
    if arguments.contender == "torch" and arguments.label_ids:
        serve(lambda: TorchScorerWorker(*settings, arguments.label_ids), answer)
    else:
        serve(lambda: WORKERS[arguments.contender](*settings, arguments.pad), answer)


if __name__ == "__main__":
    main()
