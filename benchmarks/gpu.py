"""Parity, placement and speed on an NVIDIA GPU: samescore's CUDA files against PyTorch, in one interleaved run.

    python benchmarks/gpu.py [--models NAME,…] [--batches 1,8,32] [--lengths 512,2048] [--rounds N]
    python benchmarks/gpu.py --device cpu --tiny      # the same path over tiny shapes on the CPU; its times mean nothing

    realigned, e5, qwen-0.8b, political-leaning    Llama-3.2-1B, e5-small, Qwen3.5-0.8B and 4B (`synthesize.py`'s shapes)
    ours-<variant>                                 every CUDA variant that the architecture has (else migraphx-fp16, which is
                                                   plain ONNX), uncalibrated, on ONNX Runtime's CUDA provider
    torch-bf16, torch-fp16                         transformers with scaled dot-product attention
    compiled-bf16                                  the same through torch.compile; where that fails, the reason is the row

    parity      probabilities against PyTorch float32 (no TF32) on the same GPU, texts of many lengths, each alone
    placement   where the live session has its nodes; and where the CUDA provider with stand-ins for its libraries
                (tests/placement) says they would be, if `make assets` has fetched the wheel
    speed       batches of equally long texts, random ids: nothing is padded. Every round asks each contender once, and each
                is warmed up before; a time ends when the logits are on the host

Weights are random, so parity says that the arithmetic is right, and nothing about a trained model. All contenders of a model
are in the GPU's memory at once. Without a GPU or a CUDA build of ONNX Runtime: a sentence, and exit code 4. Prints a table for
people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from llama import environment, numbers, random_texts
from processes import chosen
from synthesize import ASSETS, MODELS, QWEN_4B, QwenShape, Shape, copy_tokenizer
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SIMULATION = HERE.parent / "tests" / "placement" / "providers.py"
TORCH = ("torch-bf16", "torch-fp16", "compiled-bf16")
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
PARITY_LENGTHS = (1, 2, 7, 33, 64, 65, 128, 200, 257, 500)
TINY_LENGTHS = (1, 2, 7, 33)
E5_TOKENIZER = "e5-refusal"
E5 = {"layers": 12, "hidden": 384, "vocabulary": 250037}
TINY_DECODER = {"layers": 2, "hidden": 128}
TINY_QWEN = {
    "layers": 4,
    "hidden": 128,
    "ffn": 256,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 64,
    "linear_key_heads": 2,
    "linear_value_heads": 2,
    "linear_head_dim": 128,  # GatedDeltaNet takes no other
}


@dataclass(frozen=True)
class Subject:
    """A model's name, shape, longest text, and whether label tokens make a classifier of it."""

    name: str
    shape: Any
    limit: int = 1 << 17
    scored: bool = False

    def tiny(self, vocabulary: int) -> Subject:
        """The same in small."""
        if self.name == "e5":
            return replace(self, shape={"layers": 2, "hidden": 64, "vocabulary": vocabulary})
        return replace(
            self, shape=replace(self.shape, vocabulary=vocabulary, **(TINY_QWEN if self.scored else TINY_DECODER))
        )

    def write(self, folder: Path, tokenizer: Path) -> None:
        """Its checkpoint, unless it is there."""
        if (folder / "complete").is_file():
            return
        if self.name == "e5":
            copy_tokenizer(tokenizer, folder)
            write_bert(folder, **self.shape)
        else:
            MODELS[self.name][2](folder, self.shape, 0, tokenizer)
        (folder / "complete").touch()


SUBJECTS = {
    one.name: one
    for one in (
        Subject("realigned", Shape()),
        Subject("e5", E5, limit=512),
        Subject("qwen-0.8b", QwenShape(), scored=True),
        Subject("political-leaning", QWEN_4B, scored=True),
    )
}


def write_bert(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A random BERT classifier of e5-small's proportions."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        intermediate_size=4 * hidden,
        max_position_embeddings=512,
        type_vocab_size=2,
        id2label={0: "Non-refusal", 1: "Refusal"},
        label2id={"Non-refusal": 0, "Refusal": 1},
    )
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.normal_(0, 0.5)  # else all texts score alike
    model.save_pretrained(folder)


class Torch:
    """A transformers model on the device."""

    def __init__(self, checkpoint: Any, device: str, dtype: str, *, compiled: bool = False):
        import torch

        from samescore.calibrate.reference import load_reference

        self.torch, self.device = torch, device
        self.labels = list(checkpoint.label_ids) if hasattr(checkpoint, "label_ids") else None
        self.model = load_reference(checkpoint, dtype=dtype).to(device)  # type: ignore[arg-type]
        self.options = {"logits_to_keep": 1} if self.labels else {}
        if self.model.config.model_type != "bert":
            self.options["use_cache"] = False
        self.call = torch.compile(self.model) if compiled else self.model

    def logits(self, ids: Any) -> Any:
        """float32 [batch, labels] on the host, of ids int64 [batch, tokens]."""
        with self.torch.inference_mode():
            found = self.call(input_ids=self.torch.from_numpy(ids).to(self.device), **self.options).logits
        return (found if self.labels is None else found[:, -1, self.labels]).float().cpu().numpy()


class Ours:
    """A variant's graph on ONNX Runtime."""

    def __init__(self, checkpoint: Any, device: str, variant: str, folder: Path, max_tokens: int):
        from samescore.calibrate.stages import read_model
        from samescore.export.build import MODEL_NAME, build_graph
        from samescore.export.recipes import variant_spec
        from samescore.runtime.prefill import feeds_for
        from samescore.runtime.session import Session
        from samescore.runtime.threads import available_threads

        self.path, self.feeds_for = folder / MODEL_NAME, feeds_for
        folder.mkdir(parents=True, exist_ok=True)
        build_graph(checkpoint, variant_spec(variant).recipe, folder, max_tokens=max_tokens)
        self.session = Session(read_model(folder), device, intra_op_threads=available_threads())  # type: ignore[arg-type]

    def logits(self, ids: Any) -> Any:
        """float32 [batch, labels] on the host, of ids int64 [batch, tokens]."""
        return self.session.run(self.feeds_for(self.session.inputs, ids))


def missing(device: str) -> str | None:
    """Why nothing can run on the device, in a sentence."""
    import onnxruntime
    import torch

    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no CUDA device; --device cpu --tiny tries the script without one"
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        return f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider: pip install 'samescore[cuda]'"
    return None


def variants_of(checkpoint: Any, device: str) -> list[str]:
    """The architecture's CUDA variants, or the plain one; none with an operator that the device has no kernel of."""
    from samescore.export.build import architecture_of
    from samescore.export.recipes import variant_spec

    architecture = architecture_of(checkpoint)
    assert architecture is not None
    specs = [spec for spec in map(variant_spec, architecture.variants) if spec.target == "cuda"]
    return [spec.name for spec in specs if device == "cuda" or not spec.recipe.chunked] or ["migraphx-fp16"]


def measured_parity(ours: Ours, reference: Torch, texts: list[Any]) -> dict[str, float]:
    """Largest and mean |Δp| over texts, each alone."""
    from samescore.runtime.prediction import probabilities_of

    rows = [np.concatenate([one.logits(ids[None]) for ids in texts]) for one in (ours, reference)]
    got, expected = (np.array([probabilities_of(row, "softmax") for row in part]) for part in rows)
    moved = np.abs(got - expected).max(axis=1)
    return {"texts": len(texts), "max_dp": float(moved.max()), "mean_dp": float(moved.mean())}


def placement(model: Path, device: str) -> dict[str, Any]:
    """Operators by provider of a live session, and as simulated; `same` is None where there is no simulation."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(model, options, providers=[PROVIDERS[device]])
    live: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        live.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    found = {name: dict(operators) for name, operators in live.items()}
    simulated = simulation(model) if device == "cuda" else None
    return {"live": found, "simulated": simulated, "same": None if simulated is None else simulated == found}


def simulation(model: Path) -> dict[str, Any] | None:
    """What the provider of the wheel says with stand-ins for its libraries; None without the wheel."""
    wheels = sorted((ASSETS / "wheels").glob("onnxruntime_gpu-*.whl"))
    spec = importlib.util.spec_from_file_location("providers", SIMULATION)
    if not wheels or spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    provider = module.Provider(wheels[-1], ASSETS / "placement" / "onnxruntime_gpu")
    nodes: dict[str, Any] = provider.assign(model, PROVIDERS["cuda"], plain=False)["nodes"]
    return nodes


class Benchmark:
    """One model after the other."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.models: dict[str, Any] = {}

    def run(self) -> None:
        """Measure every model."""
        for name in self.arguments.models:
            print(f"{name} …", file=sys.stderr, flush=True)
            self.measure(name)
            gc.collect()
            if self.arguments.device == "cuda":
                import torch

                torch.cuda.empty_cache()

    def measure(self, name: str) -> None:
        """Parity, placement and speed of one model."""
        arguments = self.arguments
        subject, checkpoint = self.opened(name)
        lengths = [length for length in arguments.lengths if length <= subject.limit]
        longest = max([*lengths, 512])
        ours = {
            f"ours-{v}": Ours(checkpoint, arguments.device, v, arguments.work / f"{name}-{v}", longest)
            for v in variants_of(checkpoint, arguments.device)
        }
        reference = Torch(checkpoint, arguments.device, "float32")
        texts = [np.asarray(ids) for ids in random_texts(checkpoint.config, list(arguments.parity), arguments.seed)]
        self.models[name] = {
            "checkpoint_mib": sum(f.stat().st_size for f in checkpoint.folder.glob("*.safetensors")) / 2**20,
            "parity": {key: measured_parity(one, reference, texts) for key, one in ours.items()},
            "placement": {key: placement(one.path, arguments.device) for key, one in ours.items()},
        }
        del reference
        contenders: dict[str, Any] = {**ours}
        for key in arguments.contenders:
            kind, _, precision = key.partition("-")
            contenders[key] = Torch(checkpoint, arguments.device, DTYPES[precision], compiled=kind == "compiled")
        for length in lengths:
            for batch in arguments.batches:
                self.timed(name, contenders, batch, length, checkpoint.config)

    def opened(self, name: str) -> tuple[Subject, Any]:
        """The model's subject, in small where asked, and its checkpoint."""
        from samescore.export.checkpoint import Checkpoint
        from samescore.export.scorer import TokenScorer

        subject, arguments = SUBJECTS[name], self.arguments
        tokenizer = arguments.tokenizer or ASSETS / (MODELS[name][1] if name in MODELS else E5_TOKENIZER)
        if arguments.tiny:
            size = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
            subject = subject.tiny(max(size, 512))
        folder = arguments.work / (f"{name}-tiny" if arguments.tiny else name)
        folder.mkdir(parents=True, exist_ok=True)
        subject.write(folder, tokenizer)
        checkpoint = Checkpoint(folder)
        return subject, TokenScorer(checkpoint, arguments.label_tokens) if subject.scored else checkpoint

    def timed(self, name: str, contenders: dict[str, Any], batch: int, length: int, config: dict[str, Any]) -> None:
        """Rows of one shape: every contender once per round."""
        ids = np.asarray(random_texts(config, [length] * batch, self.arguments.seed))
        times: dict[str, list[float]] = {}
        for key, one in contenders.items():
            try:
                one.logits(ids)
            except Exception as error:  # out of memory, or what torch.compile cannot do: the others go on
                said = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                self.failures.append({"model": name, "contender": key, "shape": f"{batch} x {length}", "error": said})
            else:
                times[key] = []
        for _ in range(self.arguments.rounds):
            for key, values in times.items():
                values.append(seconds(lambda one=contenders[key]: one.logits(ids)))
        medians = {key: float(np.median(values)) for key, values in times.items()}
        for key, median in medians.items():
            ratios = {f"x_{peer}": medians[peer] / median for peer in TORCH if peer in medians}
            row = {"model": name, "contender": key, "batch": batch, "tokens": length, "seconds": median}
            self.rows.append({**row, "tokens_per_s": batch * length / median, "times": times[key], **ratios})

    def document(self) -> dict[str, Any]:
        """Everything measured."""
        arguments = self.arguments
        return {
            "benchmark": "gpu",
            "device": arguments.device,
            "tiny": arguments.tiny,
            "rounds": arguments.rounds,
            "environment": versions(arguments.device),
            "models": self.models,
            "rows": self.rows,
            "failures": self.failures,
        }


def seconds(task: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def versions(device: str) -> dict[str, Any]:
    """Packages, and the GPU with its driver."""
    import torch
    import transformers

    from samescore.runtime.threads import available_threads

    found = environment(available_threads()) | {"torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        found["torch_cuda"] = torch.version.cuda
    return found


def report(document: dict[str, Any]) -> None:
    """The tables."""
    for name, model in document["models"].items():
        for key, parity in model["parity"].items():
            same = {None: "not simulated", True: "as simulated", False: "NOT as simulated"}[
                model["placement"][key]["same"]
            ]
            print(f"{name:<19}{key:<20}max |Δp| {parity['max_dp']:.1e} over {parity['texts']} texts   placement {same}")
    for row in document["rows"]:
        ratios = "".join(f"  x{row[f'x_{peer}']:.2f} {peer}" for peer in TORCH if f"x_{peer}" in row)
        head = f"{row['model']:<19}{row['contender']:<20}{row['batch']:>3} x {row['tokens']:<6}"
        print(f"{head}{row['seconds'] * 1e3:>10.2f} ms{ratios}")
    for failure in document["failures"]:
        print(f"{failure['model']:<19}{failure['contender']:<20}{failure['shape']}: {failure['error']}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--models", type=chosen(tuple(SUBJECTS)), default=list(SUBJECTS))
    parser.add_argument(
        "--contenders", type=chosen(TORCH), default=list(TORCH), help="of PyTorch; ours are always there"
    )
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--lengths", type=numbers, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--tokenizer", type=Path, help="in place of the ones that `make assets` builds")
    parser.add_argument("--label-tokens", type=lambda text: text.split(","), default=list("01234"))
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "gpu", help="where models are kept")
    arguments = parser.parse_args(argv)
    arguments.parity = TINY_LENGTHS if arguments.tiny else PARITY_LENGTHS
    return arguments


def main() -> int:
    """0; 4 without the device."""
    arguments = parse()
    if reason := missing(arguments.device):
        print(reason, file=sys.stderr)
        return 4
    needed = [ASSETS / (MODELS[name][1] if name in MODELS else E5_TOKENIZER) for name in arguments.models]
    if absent := [
        folder for folder in needed if not (arguments.tokenizer or folder).joinpath("tokenizer.json").is_file()
    ]:
        print(f"{absent[0]} holds no tokenizer: run `make assets` or name one by --tokenizer", file=sys.stderr)
        return 2
    benchmark = Benchmark(arguments)
    benchmark.run()
    document = benchmark.document()
    report(document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
