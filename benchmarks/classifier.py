"""Speed and memory of the refusal classifier: PyTorch against samescore bundles, on this machine.

    python benchmarks/classifier.py [--checkpoint FOLDER] [--rounds N]

One text is dominated by matrix multiplication (int8 against float32), many short ones by what surrounds it: padding, and
how texts are spread over threads. Timings are interleaved round by round in one process, so that a slow phase of the
machine hits every row; read them as ratios. Memory and load time are taken in one fresh process per row.

Prints a table for people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ASSETS = Path(__file__).parent.parent / ".cache" / "assets"
LENGTHS = (32, 128, 512)
MIXED_TEXTS = 64
TORCH_BATCH = 16
SEED = 11


def mixed_lengths(count: int) -> list[int]:
    """Lengths of short chat answers: median about 30 tokens, a tail to 150."""
    draws = np.random.default_rng(SEED).lognormal(mean=3.4, sigma=0.6, size=count)
    return [int(x) for x in np.clip(draws, 5, 150)]


def random_ids(lengths: list[int], vocabulary: int) -> list[Any]:
    """Random token ids int64 [length] for each length."""
    random = np.random.default_rng(SEED)
    return [random.integers(5, vocabulary, size=length) for length in lengths]


class TorchScorer:
    """The transformers model: one text at a time, or padded batches in input order as a stock pipeline runs them."""

    def __init__(self, checkpoint: Path, dtype: str):
        import torch

        from samescore.calibrate.reference import load_reference
        from samescore.export.checkpoint import Checkpoint

        self.torch = torch
        self.model = load_reference(Checkpoint(checkpoint), dtype=dtype)

    def one(self, ids: Any) -> None:
        """One text."""
        with self.torch.inference_mode():
            self.model(self.torch.from_numpy(ids[None]))

    def many(self, sequences: list[Any]) -> None:
        """Padded batches."""
        with self.torch.inference_mode():
            for start in range(0, len(sequences), TORCH_BATCH):
                batch = sequences[start : start + TORCH_BATCH]
                width = max(map(len, batch))
                ids = self.torch.zeros((len(batch), width), dtype=self.torch.int64)
                mask = self.torch.zeros_like(ids)
                for row, sequence in enumerate(batch):
                    ids[row, : len(sequence)] = self.torch.from_numpy(sequence)
                    mask[row, : len(sequence)] = 1
                self.model(ids, attention_mask=mask)


class BundleScorer:
    """A bundle's variant through the public Classifier."""

    def __init__(self, bundle: Path, variant: str):
        from samescore import load

        self.classifier = load(bundle, variant=variant)

    def one(self, ids: Any) -> None:
        """One text."""
        self.classifier.logits([ids])

    def many(self, sequences: list[Any]) -> None:
        """No padding, longest first, one single-threaded worker per core."""
        self.classifier.logits(sequences)


def scorers(checkpoint: Path, bundle: Path) -> dict[str, Callable[[], Any]]:
    """What is compared, by row name; the first is the unit of the ratios."""
    return {
        "torch fp32": lambda: TorchScorer(checkpoint, "float32"),
        "torch bf16": lambda: TorchScorer(checkpoint, "bfloat16"),
        "cpu-fp32": lambda: BundleScorer(bundle, "cpu-fp32"),
        "cpu-int8": lambda: BundleScorer(bundle, "cpu-int8"),
    }


def interleaved(tasks: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each task over rounds in which every task runs once."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in times.items()}


def speed(checkpoint: Path, bundle: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by workload and row."""
    vocabulary = int(json.loads((checkpoint / "config.json").read_text())["vocab_size"])
    loaded = {name: make() for name, make in scorers(checkpoint, bundle).items()}
    results = {}
    for length in LENGTHS:
        (ids,) = random_ids([length], vocabulary)
        tasks = {name: (lambda s=scorer, x=ids: s.one(x)) for name, scorer in loaded.items()}
        results[f"1 x {length} tokens"] = interleaved(tasks, rounds)
    sequences = random_ids(mixed_lengths(MIXED_TEXTS), vocabulary)
    tasks = {name: (lambda s=scorer: s.many(sequences)) for name, scorer in loaded.items()}
    results[f"{MIXED_TEXTS} mixed texts"] = interleaved(tasks, max(3, rounds // 3))
    return results


def measure_process(row: str, checkpoint: Path, bundle: Path) -> dict[str, float]:
    """Load time, seconds from process start to the first score, and peak memory of one row, in this process."""
    import resource

    import psutil

    started = time.perf_counter()
    scorer = scorers(checkpoint, bundle)[row]()
    load_seconds = time.perf_counter() - started
    (ids,) = random_ids([512], 250_000 if "e5" in checkpoint.name else 1000)
    scorer.one(ids)
    first = time.time() - psutil.Process().create_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"load_s": load_seconds, "first_score_s": first, "peak_rss_mib": peak}


def memory(checkpoint: Path, bundle: Path) -> dict[str, dict[str, float]]:
    """`measure_process` of every row, each in a process of its own."""
    results = {}
    for row in scorers(checkpoint, bundle):
        command = [sys.executable, __file__, "--process", row, "--checkpoint", str(checkpoint), "--bundle", str(bundle)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[row] = json.loads(done.stdout.splitlines()[-1])
    return results


def report(document: dict[str, Any]) -> None:
    """The table."""
    rows = list(document["memory"])
    print(f"{'':<20}" + "".join(f"{row:>16}" for row in rows))
    for workload, seconds in document["speed"].items():
        base = seconds[rows[0]]
        cells = [f"{seconds[row] * 1e3:.1f} ms x{base / seconds[row]:.2f}" for row in rows]
        print(f"{workload:<20}" + "".join(f"{cell:>16}" for cell in cells))
    for key in ("load_s", "first_score_s", "peak_rss_mib"):
        print(f"{key:<20}" + "".join(f"{document['memory'][row][key]:>16.2f}" for row in rows))


def environment() -> dict[str, object]:
    """Versions and CPU."""
    import torch
    import transformers

    from samescore.calibrate.certificate import environment as certificate_environment
    from samescore.runtime.threads import available_threads

    found = certificate_environment(available_threads())
    return found | {"torch": torch.__version__, "transformers": transformers.__version__, "host": platform.machine()}


def main() -> None:
    """Export the two bundles, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "e5-refusal")
    parser.add_argument("--bundle", type=Path, help="reuse a bundle that holds cpu-fp32 and cpu-int8")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", default="none", help="as of `samescore export`; default: the recipe as it is")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        print(json.dumps(measure_process(arguments.process, arguments.checkpoint, arguments.bundle)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        bundle = arguments.bundle or Path(temporary) / "bundle"
        if arguments.bundle is None:
            from samescore import export_bundle

            variants = ["cpu-int8", "cpu-fp32"]
            export_bundle(
                arguments.checkpoint,
                bundle,
                profile="refusal",
                variants=variants,
                golden_limit=40,
                budget=arguments.budget,
                allow_drift=True,
            )
        document = {
            "benchmark": "classifier",
            "checkpoint": arguments.checkpoint.name,
            "rounds": arguments.rounds,
            "environment": environment(),
            "memory": memory(arguments.checkpoint, bundle),
            "speed": speed(arguments.checkpoint, bundle, arguments.rounds),
        }
    report(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
