"""One contender of `generator.py` in a process of its own: a model that reads prompts and goes on, greedily.

Startup:  → {"load_s", "memory", "details"}
Request:  {"prompt": [id, …], "decode": n, "keep": false}  →  {"read_s", "write_s", "tokens": [id, …]}
          {"prompt": [id, …], "logits": FILE}              →  {}; float32 [vocabulary] behind the prompt, as a .npy file
          {"rss": true}                                    →  {"rss_anon_mib", "rss_file_mib", "peak_rss_mib"}

read_s ends when the first token is chosen, write_s when n more are; end tokens do not stop it. keep (ours): the state
behind the prompt is kept, and asked again it is copied and not computed. A request that fails is answered with {"error"}. Between
requests the process waits in a read. As `llama_worker.py`, it needs nothing but numpy and what its own contender runs on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from llama_worker import memory, serve, verified_bytes

# Enough for the states behind all contexts.
KEPT_BYTES = 1 << 33


def versions(*names: str) -> dict[str, str]:
    """Those of installed packages."""
    return {name: metadata.version(name) for name in names}


class Ours:
    """A generator's graph of samescore's in a folder, through the engine that generates text; no manifest needed."""

    def __init__(self, arguments: argparse.Namespace):
        from samescore.runtime.generation.engine import Engine
        from samescore.runtime.session import Session

        model, verified = verified_bytes(arguments.model)
        session = Session(model, "cpu", intra_op_threads=arguments.threads)
        limits = {"context": arguments.context, "vocabulary": arguments.vocabulary}
        self.engine = Engine(session, **limits, cache_bytes=0)
        self.keeping = Engine(session, **limits, cache_bytes=KEPT_BYTES)
        self.state: Any = None
        self.details = versions("samescore", "onnxruntime", "numpy") | {"verify_s": verified}

    def read(self, ids: Any, more: int, keep: bool) -> int:
        """The first token behind a prompt."""
        self.state = None  # the buffers of the text before
        self.state = (self.keeping if keep else self.engine).start(ids)
        return int(self.state.logits[0].argmax())

    def write(self, token: int) -> int:
        """The token behind one more."""
        return int(self.engine.step(self.state, [token]).argmax())

    def logits(self, ids: Any) -> Any:
        """float32 [vocabulary] behind a prompt."""
        return self.engine.start(ids).logits[0]


class Torch:
    """The transformers model with its cache; logits of the last position alone."""

    def __init__(self, arguments: argparse.Namespace):
        import torch

        from samescore.calibrate.reference import load_reference
        from samescore.export.checkpoint import Checkpoint
        from samescore.export.generator import Generator

        torch.set_num_threads(arguments.threads)
        self.torch, self.cache = torch, None
        self.model = load_reference(Generator(Checkpoint(arguments.model)), dtype=arguments.precision)
        attention = str(self.model.config._attn_implementation)
        wait = os.environ.get("OMP_WAIT_POLICY", "default")
        self.details = {**versions("torch", "transformers"), "attention": attention, "omp_wait_policy": wait}

    def run(self, ids: Any) -> Any:
        """Logits [vocabulary] behind more tokens."""
        with self.torch.inference_mode():
            tokens = self.torch.from_numpy(np.asarray(ids, np.int64)[None, :])
            found = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = found.past_key_values
            return found.logits[0, -1]

    def read(self, ids: Any, more: int, keep: bool) -> int:
        """The first token behind a prompt."""
        self.cache = None
        return int(self.run(ids).argmax())

    def write(self, token: int) -> int:
        """The token behind one more."""
        return int(self.run([token]).argmax())

    def logits(self, ids: Any) -> Any:
        """float32 [vocabulary] behind a prompt."""
        self.cache = None
        return self.run(ids).float().numpy()


class Genai:
    """A model of onnxruntime-genai's builder in its engine, which chooses the tokens itself."""

    def __init__(self, arguments: argparse.Namespace):
        import onnxruntime_genai

        self.api = onnxruntime_genai
        config = onnxruntime_genai.Config(str(arguments.model))
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": arguments.threads}}}})
        )
        self.model = onnxruntime_genai.Model(config)
        self.generator: Any = None
        self.details: dict[str, Any] = versions("onnxruntime-genai", "onnxruntime")

    def begin(self, ids: Any, more: int) -> None:
        """Read a prompt, with room for the tokens to come."""
        self.generator = None
        length = len(ids) + more + 1
        options = self.api.GeneratorParams(self.model)
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        self.generator = self.api.Generator(self.model, options)
        self.generator.append_tokens(ids.astype(np.int32)[None, :])

    def read(self, ids: Any, more: int, keep: bool) -> int:
        """The first token behind a prompt."""
        self.begin(ids, more)
        return self.write(0)

    def write(self, token: int) -> int:
        """The token behind one more: its own."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def logits(self, ids: Any) -> Any:
        """float32 [vocabulary] behind a prompt."""
        self.begin(ids, 1)
        return np.asarray(self.generator.get_logits(), np.float32).reshape(-1, self.generator.get_logits().shape[-1])[
            -1
        ]


class LlamaCpp:
    """A GGUF file in llama.cpp, through its C interface."""

    def __init__(self, arguments: argparse.Namespace):
        import llama_cpp

        self.api, self.vocabulary = llama_cpp, arguments.vocabulary
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(arguments.model / "model.gguf").encode(), options)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = arguments.context
        settings.n_outputs_max = 1  # else it reserves logits for every token of a batch
        settings.n_threads = settings.n_threads_batch = arguments.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp opens no context for this model; its log says why")
        features = llama_cpp.llama_print_system_info().decode()
        self.details = {**versions("llama-cpp-python"), "features": features}

    def run(self, ids: Any) -> Any:
        """Logits float32 [vocabulary] behind more tokens, in llama.cpp's own buffer."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        if code := self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode says {code}")
        found = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, (self.vocabulary,))

    def read(self, ids: Any, more: int, keep: bool) -> int:
        """The first token behind a prompt."""
        return int(self.logits(ids).argmax())

    def write(self, token: int) -> int:
        """The token behind one more."""
        return int(self.run([token]).argmax())

    def logits(self, ids: Any) -> Any:
        """float32 [vocabulary] behind a prompt."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        return self.run(ids.tolist())


WORKERS = {"ours": Ours, "torch": Torch, "genai": Genai, "llama.cpp": LlamaCpp}


def answer(worker: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    if request.get("rss"):
        return memory()
    ids = np.asarray(request["prompt"], np.int64)
    try:
        if "logits" in request:
            np.save(request["logits"], np.asarray(worker.logits(ids), np.float32))
            return {}
        count = int(request["decode"])
        started = time.perf_counter()
        tokens = [worker.read(ids, count, bool(request.get("keep")))]
        read = time.perf_counter()
        for _ in range(count):
            tokens.append(worker.write(tokens[-1]))
        written = time.perf_counter()
    except Exception as error:  # whatever a contender raises belongs in its row
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"read_s": read - started, "write_s": written - read, "tokens": tokens}


def main() -> None:
    """Load, then answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=WORKERS)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder, or one with a model file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="the most tokens of a prompt and what follows")
    parser.add_argument("--vocabulary", type=int, required=True)
    parser.add_argument("--precision", default="float32", help="torch: the dtype")
    arguments = parser.parse_args()
    serve(lambda: WORKERS[arguments.contender](arguments), answer)


if __name__ == "__main__":
    main()
