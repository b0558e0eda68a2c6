"""Speed and memory of a Llama classifier on the CPU: samescore against PyTorch and OpenVINO, in one interleaved run.

    python benchmarks/llama.py --checkpoint FOLDER [--work FOLDER] [--rounds N] [--contenders NAME,…]

Every contender is a process of its own (`llama_worker.py`), so that none inherits another's thread pools or memory; all
are loaded at once, wait without using the CPU, and are asked in turn, round by round, so that a slow phase of the
machine hits every row. Read times as ratios. Models are made once and kept in the work folder (`llama_prepare.py`).

    ours           --variant of samescore, calibrated on random token sequences
    torch-fp32     transformers; texts of more than 2000 tokens in all are run once, without warming up
    torch-bf16     likewise beyond 4000 tokens
    openvino-w8    NNCF's compress_weights INT8_SYM, at OpenVINO's own choice of precision
    openvino-w8a8  NNCF's static quantization with SmoothQuant, at OpenVINO's choice or float32, whichever is faster
    openvino-fp32  the float32 graph at float32, for comparing numbers (only on request)

Prints a table for people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from processes import PEERS, Worker, Workshop, checkpoint_key, chosen, peer_python, say

HERE = Path(__file__).resolve().parent
WORKER, PREPARE = HERE / "llama_worker.py", HERE / "llama_prepare.py"
REQUIREMENTS = PEERS / "openvino.txt"

DEFAULT = ("ours", "torch-fp32", "torch-bf16", "openvino-w8", "openvino-w8a8")
KNOWN = (*DEFAULT, "openvino-fp32")
# Modes of many different texts, and of texts with a common prefix, by kind of contender.
NEED_STATE = {"group", "prefixed"}
MIXED_MODES = {"ours": ("one_by_one", "workers"), "torch": ("one_by_one",), "openvino": ("padded", "streams")}
GROUP_MODES = {"ours": ("one_by_one", "group"), "torch": ("one_by_one",), "openvino": ("streams",)}
# Tokens beyond which a contender is run once: it is the reference, and slow.
ONCE_BEYOND = {"torch-fp32": 2000, "torch-bf16": 4000}
# Tokens beyond which a contender is asked to free what it has grown to.
RELEASE_BEYOND = 1024
CALIBRATION_SEQUENCES = 16
CALIBRATION_LENGTHS = (60, 257)
IDLE_SECONDS = 2.0
SPECIAL_IDS = 5


@dataclass(frozen=True)
class Workload:
    """Texts that are timed together; the first `prefix` tokens of all are the same."""

    name: str
    texts: list[list[int]]
    prefix: int = 0

    def modes(self, contender: str) -> tuple[str, ...]:
        """How a contender runs it."""
        if len(self.texts) == 1:
            return ("one_by_one",)
        return (GROUP_MODES if self.prefix else MIXED_MODES)[kind(contender)]

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))


@dataclass
class Row:
    """One contender's times in one mode of one workload."""

    workload: str
    contender: str
    mode: str
    times: list[float] = field(default_factory=list)
    logits: list[list[float]] = field(default_factory=list)


class Models:
    """Models made in the work folder, once for each key (checkpoint, calibration and options)."""

    def __init__(self, arguments: argparse.Namespace, calibration: list[list[int]]):
        self.arguments = arguments
        self.workshop = Workshop(arguments.work)
        self.calibration: Path = arguments.work / "calibration.json"
        self.calibration.write_text(json.dumps(calibration))
        labels = [arguments.label_tokens] if arguments.label_tokens else []
        self.key = checkpoint_key(arguments.checkpoint, calibration, labels)

    def ours(self, variant: str) -> Path:
        """A variant of samescore's, of the checkpoint's classifier or of the one that label tokens make of it."""
        labels = ["--label-tokens", *self.arguments.label_tokens] if self.arguments.label_tokens else []
        return self._made(variant, Path(sys.executable), ["ours", "--variant", variant, *self._sources(), *labels])

    def plain(self) -> Path:
        """The float32 graph that OpenVINO reads."""
        name = self.arguments.openvino_graph
        return self._made(name, Path(sys.executable), [name, *self._sources()])

    def openvino(self, step: str) -> Path:
        """OpenVINO's model, quantized as `step` says."""
        python = peer_python("openvino")
        options = [step, "--source", str(self.plain()), "--calibration", str(self.calibration)]
        return self._made(f"openvino-{step}-{self.arguments.openvino_graph}", python, options)

    def _sources(self) -> list[str]:
        return ["--checkpoint", str(self.arguments.checkpoint), "--calibration", str(self.calibration)]

    def _made(self, name: str, python: Path, options: list[str]) -> Path:
        """The folder of a model; made now unless one with the same key is there."""
        key = f"{self.key} {REQUIREMENTS.read_text() if options[0] in ('w8', 'w8a8') else ''}"
        return self.workshop.made(name, key, [str(python), str(PREPARE), *options])


def kind(contender: str) -> str:
    """`ours`, `torch` or `openvino`."""
    return contender.partition("-")[0]


def random_texts(config: dict[str, Any], lengths: list[int], seed: int) -> list[list[int]]:
    """Random token ids of each length, without the token that pads."""
    random = np.random.default_rng(seed)
    vocabulary, pad = int(config["vocab_size"]), config.get("pad_token_id")
    texts = [random.integers(SPECIAL_IDS, vocabulary, size=length) for length in lengths]
    return [np.where(ids == pad, SPECIAL_IDS if pad != SPECIAL_IDS else SPECIAL_IDS + 1, ids).tolist() for ids in texts]


def workloads(arguments: argparse.Namespace, config: dict[str, Any]) -> list[Workload]:
    """Single texts, mixed lengths, and responses to one prompt."""
    seed = arguments.seed
    singles = [
        Workload(f"1 x {n} tokens", random_texts(config, [n], seed + number))
        for number, n in enumerate(arguments.lengths)
    ]
    prefix, responses = arguments.group
    (prompt,), ends = random_texts(config, [prefix], seed + 200), random_texts(config, responses, seed + 300)
    # Padding takes by far the most memory, so it comes last, when PyTorch has nothing more to do.
    return [
        *singles,
        Workload(f"{prefix} + {len(responses)} responses", [prompt + end for end in ends], prefix),
        Workload(f"{len(arguments.mixed)} mixed texts", random_texts(config, arguments.mixed, seed + 100)),
    ]


def model_folder(name: str, models: Models, arguments: argparse.Namespace) -> Path:
    """Where a contender's model lies, made now if need be."""
    if kind(name) == "ours":
        return models.ours(f"cpu-{name.partition('-')[2]}" if "-" in name else arguments.variant)
    if kind(name) == "torch":
        return Path(arguments.checkpoint)
    step = name.partition("-")[2]
    return models.plain() if step == "fp32" else models.openvino(step)


def start(name: str, models: Models, arguments: argparse.Namespace, config: dict[str, Any], precision: str) -> Worker:
    """A contender's process, its model made before."""
    folder, python, environment = model_folder(name, models, arguments), Path(sys.executable), {}
    if kind(name) == "torch":
        precision = {"fp32": "float32", "bf16": "bfloat16"}[name.partition("-")[2]]
        environment = {"OMP_NUM_THREADS": str(arguments.threads)}
        if arguments.torch_wait == "passive":
            environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif kind(name) == "openvino":
        python = peer_python("openvino")
        precision = "f32" if name == "openvino-fp32" else precision
    options = ["--threads", str(arguments.threads), "--precision", precision]
    pad = config.get("pad_token_id")
    options += ["--pad", str(0 if pad is None else pad)]
    if arguments.label_ids:
        options += ["--label-ids", *map(str, arguments.label_ids)]
    worker = Worker(
        python,
        WORKER,
        [kind(name), "--model", str(folder), *options],
        environment,
        arguments.work / f"worker-{name}.log",
    )
    suffixes = (".safetensors", ".onnx", ".data", ".xml", ".bin")
    sizes = [file.stat().st_size for file in folder.iterdir() if file.suffix in suffixes]
    worker.startup["file_mib"] = sum(sizes) / 2**20
    return worker


def faster_precision(
    models: Models, arguments: argparse.Namespace, config: dict[str, Any], singles: list[Workload]
) -> tuple[str, dict[str, Any]]:
    """Which precision OpenVINO's W8A8 runs faster in, and seconds by precision and workload.

    Each single text up to 1024 tokens, both precisions in turn; compared by the geometric mean of the medians.
    """
    probed = [workload for workload in singles if len(workload.texts) == 1 and workload.tokens <= 1024]
    workers = {hint: start("openvino-w8a8", models, arguments, config, hint) for hint in ("default", "f32")}
    seconds: dict[str, Any] = {}
    try:
        for hint, worker in workers.items():
            seconds[hint] = {"precision": worker.startup["details"]["precision"]}
        for workload in probed:
            times: dict[str, list[float]] = {hint: [] for hint in workers}
            for number in range(arguments.rounds + 1):
                for hint, worker in workers.items():
                    reply = worker.ask(texts=workload.texts, mode="one_by_one")
                    if number:
                        times[hint].append(reply["seconds"])
            for hint, values in times.items():
                seconds[hint][workload.name] = float(np.median(values))
    finally:
        for worker in workers.values():
            worker.close()
    total = {hint: sum(math.log(seconds[hint][workload.name]) for workload in probed) for hint in workers}
    return min(total, key=lambda hint: total[hint]), seconds


class Benchmark:
    """The contenders that run, and what they did. One that fails is left out from then on, and its entry says why."""

    name = "llama"

    def __init__(self, arguments: argparse.Namespace, config: dict[str, Any], workloads: list[Workload]):
        self.arguments, self.config, self.workloads = arguments, config, workloads
        lengths = np.random.default_rng(arguments.seed).integers(*CALIBRATION_LENGTHS, size=CALIBRATION_SEQUENCES)
        self.models = Models(arguments, random_texts(config, [int(n) for n in lengths], arguments.seed + 400))
        self.workers: dict[str, Worker] = {}
        self.precision: dict[str, str] = {}
        self.contenders: dict[str, dict[str, Any]] = {name: {} for name in arguments.contenders}
        self.rows: list[Row] = []

    def run(self) -> None:
        """Everything."""
        try:
            for name in self.contenders:
                self._prepare(name)
            for name in self.contenders:
                self._start(name)
            for workload in self.workloads:
                self._time(workload)
        finally:
            for worker in self.workers.values():
                worker.close()

    def _prepare(self, name: str) -> None:
        """Make a contender's model, and choose its precision. Nobody else runs yet: quantizing takes the memory."""
        entry = self.contenders[name]
        try:
            model_folder(name, self.models, self.arguments)
            if name == "openvino-w8a8":
                say("choosing the precision of openvino-w8a8")
                self.precision[name], entry["probe"] = faster_precision(
                    self.models, self.arguments, self.config, self.workloads
                )
        except (RuntimeError, OSError) as error:
            self._fail(name, error)

    def _start(self, name: str) -> None:
        entry = self.contenders[name]
        if "error" in entry:
            return
        try:
            say(f"starting {name}")
            precision = self.precision.get(name, "default")
            worker = start(name, self.models, self.arguments, self.config, precision)
        except (RuntimeError, OSError) as error:
            self._fail(name, error)
            return
        self.workers[name] = worker
        memory = {"load": worker.startup.pop("memory")}
        entry.update(worker.startup, memory=memory)

    def _fail(self, name: str, error: Exception) -> None:
        say(f"{name} is out: {error}")
        self.contenders[name]["error"] = str(error)
        if (worker := self.workers.pop(name, None)) is not None:
            worker.close()

    def _time(self, workload: Workload) -> None:
        """All contenders on one workload: one call to warm up, then the rounds.

        What is run once comes first. A padded batch is too, after its warm-up: no two contenders may hold one at a time.
        """
        say(workload.name)
        rows = [Row(workload.name, name, mode) for name in self.workers for mode in self._modes(name, workload)]
        once = [row for row in rows if workload.tokens > ONCE_BEYOND.get(row.contender, math.inf)]
        padded = [row for row in rows if row.mode == "padded"]
        repeated = [row for row in rows if row not in once + padded]
        for row in once:
            self._ask(row, workload, timed=True)
            if workload is self.workloads[-1]:
                self._finish(row.contender, workload)
        for row in padded:
            self._ask(row, workload, timed=False)
            self._ask(row, workload, timed=True)
            self._after(row.contender, workload, f"{workload.name}, padded")
        for row in repeated:
            self._ask(row, workload, timed=False)
        for number in range(self.arguments.rounds):
            # Nobody always follows the same neighbour.
            shift = number % max(1, len(repeated))
            for row in repeated[shift:] + repeated[:shift]:
                self._ask(row, workload, timed=True)
        self.rows += [row for row in rows if row.times]
        for name in list(self.workers):
            self._after(name, workload, workload.name)
        if workload is self.workloads[0]:
            self._idle()

    def _modes(self, name: str, workload: Workload) -> list[str]:
        """How a contender runs a workload: a graph that keeps no state reads every text from its start."""
        state = self.contenders[name]["details"].get("state", True)
        return [mode for mode in workload.modes(name) if state or mode not in NEED_STATE]

    def _ask(self, row: Row, workload: Workload, *, timed: bool) -> None:
        worker = self.workers.get(row.contender)
        if worker is None:
            return
        try:
            reply = worker.ask(texts=workload.texts, mode=row.mode, prefix=workload.prefix)
        except RuntimeError as error:
            self._fail(row.contender, error)
            return
        row.logits = reply["logits"]
        if timed:
            row.times.append(reply["seconds"])

    def _after(self, name: str, workload: Workload, moment: str) -> None:
        """Note a contender's memory; then free what only this workload needed, so that all fit in memory together."""
        worker = self.workers.get(name)
        if worker is None:
            return
        try:
            self.contenders[name]["memory"][moment] = worker.ask(rss=True)
            if len(workload.texts) > 1 or workload.tokens > RELEASE_BEYOND:
                worker.ask(release=True)
        except RuntimeError as error:
            self._fail(name, error)

    def _finish(self, name: str, workload: Workload) -> None:
        """End a contender that has nothing more to do."""
        self._after(name, workload, workload.name)
        if (worker := self.workers.pop(name, None)) is not None:
            worker.close()

    def _idle(self) -> None:
        """CPU seconds per second of each contender while nobody asks anything; should be 0."""
        time.sleep(0.5)
        before = {name: worker.cpu_seconds() for name, worker in self.workers.items()}
        time.sleep(IDLE_SECONDS)
        for name, worker in self.workers.items():
            self.contenders[name]["idle_cpu"] = (worker.cpu_seconds() - before[name]) / IDLE_SECONDS

    def document(self) -> dict[str, Any]:
        """The result."""
        for name, entry in self.contenders.items():
            differences = [row["max_logit_difference"] for row in self.results() if row["contender"] == name]
            entry["max_logit_difference"] = max((d for d in differences if d is not None), default=None)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        return {
            "benchmark": self.name,
            "checkpoint": self.arguments.checkpoint.name,
            "config": {key: self.config.get(key) for key in (*sizes, "intermediate_size", "head_dim")},
            **self.described(),
            "rounds": self.arguments.rounds,
            "seed": self.arguments.seed,
            "workloads": {
                w.name: {"lengths": [len(ids) for ids in w.texts], "prefix": w.prefix} for w in self.workloads
            },
            "environment": environment(self.arguments.threads),
            "built": self.models.workshop.built,
            "contenders": self.contenders,
            "rows": self.results(),
        }

    def described(self) -> dict[str, Any]:
        """What only this benchmark has to say about itself."""
        return {"variant": self.arguments.variant, "openvino_graph": self.arguments.openvino_graph}

    def results(self) -> list[dict[str, Any]]:
        """The rows with their ratios (above 1: faster than that peer) and logit differences to PyTorch float32."""
        found = []
        for row in self.rows:
            beside = [other for other in self.rows if other.workload == row.workload]
            reference = next((other.logits for other in beside if other.contender == "torch-fp32"), None)
            seconds = float(np.median(row.times))
            peers = {"x_torch_fp32": "torch-fp32", "x_torch_bf16": "torch-bf16", "x_best_openvino": "openvino"}
            ratios = {}
            for key, peer in peers.items():
                times = [float(np.median(other.times)) for other in beside if other.contender.startswith(peer)]
                ratios[key] = min(times) / seconds if times else None
            difference = None if reference is None else float(np.max(np.abs(np.subtract(row.logits, reference))))
            entry = {"workload": row.workload, "contender": row.contender, "mode": row.mode, "seconds": seconds}
            found.append({**entry, "times": row.times, **ratios, "max_logit_difference": difference})
        return found


def environment(threads: int) -> dict[str, object]:
    """Versions, the CPU and its instruction sets. What a contender runs on is in its own entry."""
    from samescore.calibrate.certificate import environment as certificate_environment

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    vector = [flag for flag in flags if flag.startswith(("avx", "amx", "fma", "f16c"))]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    found = certificate_environment(threads)
    return found | {"flags": vector, "cores": os.cpu_count(), "memory_mib": total, "host": platform.machine()}


def report(document: dict[str, Any]) -> None:
    """The tables."""
    peers = ("x_torch_fp32", "x_torch_bf16", "x_best_openvino")
    print(
        f"{'':<22}{'':<15}{'':<12}{'seconds':>9}"
        + "".join(f"{p[2:].replace('_', ' '):>15}" for p in peers)
        + "  max |Δlogit|"
    )
    for row in document["rows"]:
        ratios = "".join(f"{'' if row[p] is None else f'x{row[p]:.2f}':>15}" for p in peers)
        difference = "" if row["max_logit_difference"] is None else f"{row['max_logit_difference']:.1e}"
        head = f"{row['workload']:<22}{row['contender']:<15}{row['mode']:<12}{row['seconds']:>9.3f}"
        print(f"{head}{ratios}{difference:>14}")
    singles = [name for name, w in document["workloads"].items() if len(w["lengths"]) == 1 and w["lengths"][0] <= 1024]
    moments = ["load", *singles[-1:]]
    print(f"\nMiB{'':<12}{'precision':>10}{'load s':>8}{'files':>8}{'idle CPU':>9}", end="")
    print("".join(f"  after {moment}: anon, file, peak" for moment in moments))
    for name, entry in document["contenders"].items():
        if "memory" not in entry:
            print(f"{name:<15}{entry['error']}")
            continue
        precision = entry["details"].get("precision") or entry["details"]["variant"]
        head = (
            f"{name:<15}{precision:>10}{entry['load_s']:>8.1f}{entry['file_mib']:>8.0f}{entry.get('idle_cpu', 0):>9.2f}"
        )
        for moment in moments:
            values = entry["memory"].get(moment, {}).values()
            head += f"{' '.join(f'{value:.0f}' for value in values):>{len(moment) + 26}}"
        print(head + (f"  {entry['error']}" if "error" in entry else ""))


def numbers(text: str) -> list[int]:
    """`1,2,3` as integers above 0."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"lengths must be at least 1: {text}")
    return found


def group(text: str) -> tuple[int, list[int]]:
    """`700:140,350` as the prefix's length and the responses'."""
    prefix, _, responses = text.partition(":")
    return numbers(prefix)[0], numbers(responses)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a LlamaForSequenceClassification folder")
    parser.add_argument("--work", type=Path, default=HERE.parent / ".cache" / "llama", help="where models are kept")
    parser.add_argument("--contenders", type=chosen(KNOWN), default=list(DEFAULT))
    parser.add_argument("--variant", default="cpu-int8", help="of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--lengths", type=numbers, default=[128, 512, 1024, 2048])
    parser.add_argument("--mixed", type=numbers, default=[1024, 180, 700, 420, 90, 1500, 260, 640])
    parser.add_argument("--group", type=group, default=(700, [140, 170, 200, 230, 260, 290, 320, 350]))
    parser.add_argument(
        "--openvino-graph",
        choices=("plain", "traced"),
        default="plain",
        help="what OpenVINO is given: our plain graph, or the one that transformers traces",
    )
    parser.add_argument("--torch-wait", choices=("passive", "default"), default="passive", help="OMP_WAIT_POLICY")
    parser.set_defaults(label_tokens=[], label_ids=[])
    return parser.parse_args(argv)


def main() -> None:
    """Measure, print."""
    arguments = parse()
    arguments.checkpoint, arguments.work = arguments.checkpoint.absolute(), arguments.work.absolute()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    benchmark = Benchmark(arguments, config, workloads(arguments, config))
    benchmark.run()
    document = benchmark.document()
    report(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
