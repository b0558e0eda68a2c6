"""Speed and memory of text generation on the CPU: samescore against its peers, in one interleaved run.

    python benchmarks/synthesize.py .cache/synthetic/qwen-0.8b --model qwen-0.8b
    python benchmarks/generator.py --checkpoint .cache/synthetic/qwen-0.8b [--contenders NAME,…] [--rounds N] [--prepare]

A language model of Qwen3.5-0.8B's shape reads random ids and goes on greedily, past end tokens, on `--threads` threads. As in
`llama.py`, every contender is a process of its own (`generator_worker.py`), all are loaded at once, wait, and are asked in turn,
round by round. Read times as ratios. Models are made once and kept in the work folder (`generator_prepare.py`).

    ours-int8, ours-int4, ours-fp32  samescore's variants cpu-int8, …, calibrated on random token sequences, in its engine;
                                     no snapshots of states are kept
    ours-int8+a16                    cpu-int8 with activations of two digits in every layer (int8-row-a16), which is about what
                                     its gate asks of the smallest trained models (only on request)
    torch-bf16, torch-fp32           transformers with its cache, logits of the last position alone (fp32 only on request)
    genai-int8                       onnxruntime-genai, the int8 model of its own builder
    llama.cpp-q8_0                   llama.cpp compiled for this CPU, Q8_0 of its own converter, key-value cache in float16,
                                     driven through its C interface (`llama-cpp-python`'s bindings, no sampler)

    read N         time to first token: N ids in, the first token chosen
    write N        N tokens more, one at a time, behind a prompt of `--prompt` ids; `seconds` are those of one token
    write N at C   the same behind C ids, by the first of ours alone (`over_shortest`: against the shortest context). The
                   state behind them is read once and copied for every round, outside the timing

Peers that need it have environments of their own (`peers/`), installed on first use. One that cannot be had is a row with the
reason. Before the rounds, every workload runs once in a fresh process: its peak of resident memory (VmHWM), and how long it
took to load.
With torch-fp32 among the contenders, everybody's logits behind each prompt that is read are compared with its own: largest
difference, Kullback-Leibler divergence, the same likeliest token; and how many of the written tokens are the same from the
first. The weights are random, so this says whether everybody runs the same model, and nothing about accuracy.

Prints a table for people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from llama import (
    CALIBRATION_LENGTHS,
    CALIBRATION_SEQUENCES,
    IDLE_SECONDS,
    environment,
    kind,
    numbers,
    random_texts,
)
from processes import PEERS, Worker, Workshop, checkpoint_key, chosen, peer_python, say

from samescore.export.generation import DEFAULT_CONTEXT

HERE = Path(__file__).resolve().parent
WORKER, PREPARE = HERE / "generator_worker.py", HERE / "generator_prepare.py"
DEFAULT = ("ours-int8", "ours-int4", "ours-fp32", "torch-bf16", "genai-int8", "llama.cpp-q8_0")
KNOWN = (*DEFAULT, "ours-int8+a16", "torch-fp32")
# Layers in another number format than the variant's: what stands behind the `+` of a contender of ours.
LAYERS = {"a16": "int8-row-a16"}
REFERENCE = "torch-fp32"
# Of contenders with environments of their own (`peers/<name>.txt`): the one that runs the model, and the one that makes it,
# which is also the step of `generator_prepare.py`.
PEER_ENVIRONMENTS = {"genai": ("genai", "genai"), "llama.cpp": ("llama-cpp", "gguf")}
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
MODEL_SUFFIXES = (".safetensors", ".onnx", ".data", ".gguf")
# What goes wrong with one contender is its row and not the end.
FAILURES = (RuntimeError, OSError)


@dataclass(frozen=True)
class Workload:
    """A prompt, and how many tokens are written behind it; 0: only reading is timed."""

    name: str
    prompt: list[int]
    write: int = 0
    kept: bool = False

    def seconds(self, reply: dict[str, Any]) -> float:
        """What is timed: reading, or one token."""
        return float(reply["write_s"]) / self.write if self.write else float(reply["read_s"])

    @property
    def request(self) -> dict[str, Any]:
        """What a worker is asked."""
        return {"prompt": self.prompt, "decode": self.write, "keep": self.kept}


@dataclass
class Row:
    """One contender's times in one workload."""

    workload: Workload
    contender: str
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median."""
        return float(np.median(self.times))


def workloads(arguments: argparse.Namespace, config: dict[str, Any]) -> list[Workload]:
    """Reading, writing, and writing behind long texts."""
    seed, count = arguments.seed, arguments.decode
    found = []
    for number, length in enumerate(arguments.lengths):
        found.append(Workload(f"read {length}", random_texts(config, [length], seed + number)[0]))
    found.append(Workload(f"write {count}", random_texts(config, [arguments.prompt], seed + 100)[0], count))
    for number, length in enumerate(arguments.contexts):
        prompt = random_texts(config, [length], seed + 200 + number)[0]
        found.append(Workload(f"write {count} at {length}", prompt, count, kept=True))
    return found


class Models:
    """Where a contender's model lies and what runs it; made now if need be."""

    def __init__(self, arguments: argparse.Namespace, config: dict[str, Any], longest: int):
        self.arguments = arguments
        self.workshop = Workshop(arguments.work)
        random = np.random.default_rng(arguments.seed)
        lengths = random.integers(*CALIBRATION_LENGTHS, size=CALIBRATION_SEQUENCES).tolist()
        calibration = random_texts(config, lengths, arguments.seed + 400)
        self.calibration: Path = arguments.work / "calibration.json"
        self.calibration.write_text(json.dumps(calibration))
        self.key = checkpoint_key(arguments.checkpoint, calibration)
        # An export's own, and more only when it must be, so that other lengths seldom need another model.
        self.context = max(DEFAULT_CONTEXT, 1 << (longest - 1).bit_length())

    def of(self, name: str) -> tuple[Path, Path]:
        """The interpreter and the model's folder."""
        family, _, precision = name.rpartition("-")
        ours = Path(sys.executable)
        source = ["--checkpoint", str(self.arguments.checkpoint)]
        if family == "torch":
            return ours, Path(self.arguments.checkpoint)
        if family == "ours":
            variant, _, layers = precision.partition("+")
            options = ["ours", "--variant", f"cpu-{variant}", "--max-tokens", str(self.context), *source]
            options += ["--layers", LAYERS[layers]] if layers else []
            command = [str(ours), str(PREPARE), *options, "--calibration", str(self.calibration)]
            return ours, self.workshop.made(f"cpu-{precision}", f"{self.key} {self.context}", command)
        runs, makes = PEER_ENVIRONMENTS[family]
        key = f"{self.key} {(PEERS / f'{makes}.txt').read_text()}"
        command = [str(peer_python(makes)), str(PREPARE), makes, *source]
        return peer_python(runs), self.workshop.made(name, key, command)


class Benchmark:
    """The contenders that run, and what they did. One that fails is left out from then on, and its rows say why."""

    def __init__(self, arguments: argparse.Namespace, config: dict[str, Any]):
        self.arguments, self.config = arguments, config
        self.workloads = workloads(arguments, config)
        longest = max(len(w.prompt) + w.write for w in self.workloads)
        self.models = Models(arguments, config, longest + 1)
        self.places: dict[str, tuple[Path, Path]] = {}
        self.workers: dict[str, Worker] = {}
        self.contenders: dict[str, dict[str, Any]] = {name: {} for name in arguments.contenders}
        self.rows: list[Row] = []
        self.logits = arguments.work / "logits"

    def prepare(self) -> None:
        """Make everybody's environment and model."""
        for name in self.contenders:
            try:
                self.places[name] = self.models.of(name)
            except FAILURES as error:
                self._fail(name, error)

    def run(self) -> None:
        """Everything: fresh processes first, then all of them in turn."""
        self.prepare()
        for name in list(self.places):
            self._try(name, self._fresh)
        try:
            for name in list(self.places):
                self._try(name, self._start)
            self._idle()
            for shared in (w for w in self.workloads if not w.kept):
                self._time([Row(shared, name) for name in self.workers])
            self._time([Row(w, name) for name in self.workers for w in self._asked(name) if w.kept])
        finally:
            for worker in self.workers.values():
                worker.close()

    def _asked(self, name: str) -> list[Workload]:
        """The workloads of a contender: long contexts are for the first of ours."""
        first = next((other for other in self.contenders if kind(other) == "ours"), None)
        return [workload for workload in self.workloads if not workload.kept or name == first]

    def _worker(self, name: str) -> Worker:
        """A fresh process."""
        arguments, (python, folder) = self.arguments, self.places[name]
        family, _, precision = name.rpartition("-")
        longest = max(len(w.prompt) + w.write for w in self._asked(name))
        options = ["--model", str(folder), "--threads", str(arguments.threads), "--context", str(longest + 1)]
        options += ["--vocabulary", str(self.config["vocab_size"])]
        environment = {}
        if family == "torch":
            options += ["--precision", PRECISIONS[precision]]
            environment = {"OMP_NUM_THREADS": str(arguments.threads)}
            if arguments.torch_wait == "passive":
                environment["OMP_WAIT_POLICY"] = "PASSIVE"
        return Worker(python, WORKER, [family, *options], environment, arguments.work / f"worker-{name}.log")

    def _fresh(self, name: str) -> None:
        """Every workload in a process of its own: the peak of its memory, the time to load, and the logits."""
        entry = self.contenders[name]
        entry.update(memory={}, loads=[])
        folder = self.places[name][1]
        entry["file_mib"] = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in MODEL_SUFFIXES) / 2**20
        for workload in self._asked(name):
            say(f"{name}: {workload.name} in a fresh process")
            worker = self._worker(name)
            try:
                entry["loads"].append(worker.startup["load_s"])
                entry["details"] = worker.startup["details"]
                entry["memory"].setdefault("load", worker.startup["memory"])
                worker.ask(**{**workload.request, "keep": False})
                entry["memory"][workload.name] = worker.ask(rss=True)
                if not workload.write and REFERENCE in self.contenders:
                    self.logits.mkdir(exist_ok=True)
                    worker.ask(prompt=workload.prompt, logits=str(self._file(name, workload)))
            finally:
                worker.close()
        entry["load_s"] = float(np.median(entry["loads"]))

    def _file(self, name: str, workload: Workload) -> Path:
        return self.logits / f"{name} {workload.name}.npy"

    def _start(self, name: str) -> None:
        say(f"starting {name}")
        self.workers[name] = self._worker(name)

    def _try(self, name: str, step: Any) -> None:
        try:
            step(name)
        except FAILURES as error:
            self._fail(name, error)

    def _fail(self, name: str, error: Exception) -> None:
        say(f"{name} is out: {error}")
        self.contenders[name]["error"] = str(error)
        self.places.pop(name, None)
        if (worker := self.workers.pop(name, None)) is not None:
            worker.close()

    def _time(self, rows: list[Row]) -> None:
        """Everybody once to warm up, then the rounds; nobody always follows the same neighbour."""
        say(", ".join(dict.fromkeys(row.workload.name for row in rows)))
        for row in rows:
            self._ask(row, timed=False)
        for number in range(self.arguments.rounds):
            shift = number % max(1, len(rows))
            for row in rows[shift:] + rows[:shift]:
                self._ask(row, timed=True)
        self.rows += [row for row in rows if row.times]

    def _ask(self, row: Row, *, timed: bool) -> None:
        worker = self.workers.get(row.contender)
        if worker is None:
            return
        try:
            reply = worker.ask(**row.workload.request)
        except RuntimeError as error:
            self._fail(row.contender, error)
            return
        row.tokens = reply["tokens"]
        if timed:
            row.times.append(row.workload.seconds(reply))

    def _idle(self) -> None:
        """CPU seconds per second of each contender while nobody asks anything; should be 0."""
        time.sleep(0.5)
        before = {name: worker.cpu_seconds() for name, worker in self.workers.items()}
        time.sleep(IDLE_SECONDS)
        for name, worker in self.workers.items():
            self.contenders[name]["idle_cpu"] = (worker.cpu_seconds() - before[name]) / IDLE_SECONDS

    def document(self) -> dict[str, Any]:
        """The result."""
        arguments = self.arguments
        sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
        return {
            "benchmark": "generator",
            "checkpoint": arguments.checkpoint.name,
            "config": {key: self.config.get(key) for key in sizes},
            "prompt": arguments.prompt,
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "seed": arguments.seed,
            "workloads": {w.name: {"prompt": len(w.prompt), "write": w.write} for w in self.workloads},
            "environment": environment(arguments.threads),
            "built": self.models.workshop.built,
            "contenders": self.contenders,
            "rows": self.results(),
        }

    def results(self) -> list[dict[str, Any]]:
        """A row for each contender and workload; of a contender that failed before, the reason."""
        measured = {(row.workload.name, row.contender): row for row in self.rows}
        found: list[dict[str, Any]] = []
        for workload in self.workloads:
            for name, contender in self.contenders.items():
                entry = {"workload": workload.name, "contender": name}
                if (row := measured.get((workload.name, name))) is not None:
                    found.append({**entry, **self._result(row, measured)})
                elif "error" in contender and workload in self._asked(name):
                    found.append({**entry, "error": contender["error"]})
        return found

    def _result(self, row: Row, measured: dict[tuple[str, str], Row]) -> dict[str, Any]:
        """Seconds; of ours also how many times faster than each peer (`ratios`)."""
        workload = row.workload
        peak = self.contenders[row.contender]["memory"].get(workload.name, {}).get("peak_rss_mib")
        found = {"seconds": row.seconds, "times": row.times, "peak_rss_mib": peak}
        found["tokens_per_s"] = (1 if workload.write else len(workload.prompt)) / row.seconds
        if kind(row.contender) == "ours":
            others = {name: o for (work, name), o in measured.items() if work == workload.name and kind(name) != "ours"}
            found["ratios"] = {name: other.seconds / row.seconds for name, other in others.items()}
        if workload.kept:
            shortest = min((o for o in self.rows if o.workload.kept), key=lambda other: len(other.workload.prompt))
            found["over_shortest"] = row.seconds / shortest.seconds
        elif workload.write and (reference := measured.get((workload.name, REFERENCE))) is not None:
            found["same_tokens"] = same_from_the_first(row.tokens, reference.tokens)
        elif self._file(REFERENCE, workload).is_file() and REFERENCE in self.contenders:
            found |= compared(np.load(self._file(row.contender, workload)), np.load(self._file(REFERENCE, workload)))
        return found


def same_from_the_first(tokens: list[int], reference: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    same = [one == other for one, other in zip(tokens, reference, strict=True)]
    return same.index(False) if False in same else len(same)


def compared(logits: Any, reference: Any) -> dict[str, Any]:
    """Logits [vocabulary] against the reference's: largest difference, divergence from its distribution, likeliest token."""
    logits, reference = logits.astype(np.float64), reference.astype(np.float64)
    logs, wanted = (row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in (logits, reference))
    return {
        "max_logit_difference": float(np.abs(logits - reference).max()),
        "kld": float((np.exp(wanted) * (wanted - logs)).sum()),
        "same_top": bool(logits.argmax() == reference.argmax()),
    }


def report(document: dict[str, Any]) -> None:
    """The tables."""
    peers = [name for name in document["contenders"] if kind(name) != "ours"]
    print(f"{'':<18}{'':<16}{'seconds':>9}{'tokens/s':>10}{'peak MiB':>10}" + "".join(f"{p:>17}" for p in peers))
    for row in document["rows"]:
        head = f"{row['workload']:<18}{row['contender']:<16}"
        if "error" in row:
            print(f"{head}{row['error']}")
            continue
        head += f"{row['seconds']:>9.4f}{row['tokens_per_s']:>10.1f}{row['peak_rss_mib']:>10.0f}"
        ratios = row.get("ratios", {})
        head += "".join(f"{f'x{ratios[p]:.2f}' if p in ratios else '':>17}" for p in peers)
        if "over_shortest" in row:
            head += f"  x{row['over_shortest']:.2f} of the shortest context's time"
        if "kld" in row:
            head += f"  max |Δlogit| {row['max_logit_difference']:.1e}, KLD {row['kld']:.1e}"
            head += "" if row["same_top"] else ", another likeliest token"
        if "same_tokens" in row:
            head += f"  {row['same_tokens']} tokens as {REFERENCE}"
        print(head)
    print(f"\n{'':<16}{'load s':>8}{'files MiB':>11}{'loaded MiB':>12}{'idle CPU':>10}")
    for name, entry in document["contenders"].items():
        if "load_s" in entry:
            head = f"{name:<16}{entry['load_s']:>8.1f}{entry['file_mib']:>11.0f}"
            print(f"{head}{entry['memory']['load']['peak_rss_mib']:>12.0f}{entry.get('idle_cpu', 0):>10.2f}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a language model's folder")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "generator", help="where models are kept")
    parser.add_argument("--contenders", type=chosen(KNOWN), default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--lengths", type=numbers, default=[512, 2048], help="tokens of the prompts that are read")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt that is gone on with")
    parser.add_argument("--decode", type=int, default=64, help="tokens that are written")
    parser.add_argument("--contexts", type=numbers, default=[512, 4096, 16384], help="tokens that ours writes behind")
    parser.add_argument("--torch-wait", choices=("passive", "default"), default="default", help="OMP_WAIT_POLICY")
    parser.add_argument("--prepare", action="store_true", help="only make the environments and models")
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print."""
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.generator import Generator

    arguments = parse()
    arguments.checkpoint, arguments.work = arguments.checkpoint.absolute(), arguments.work.absolute()
    config = dict(Generator(Checkpoint(arguments.checkpoint)).config)
    benchmark = Benchmark(arguments, config)
    if arguments.prepare:
        benchmark.prepare()
        print(json.dumps({"built": benchmark.models.workshop.built, "contenders": benchmark.contenders}))
        return
    benchmark.run()
    document = benchmark.document()
    report(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
