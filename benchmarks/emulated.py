"""A bundle's CPU variants under emulated older CPUs (qemu-user), against the reference and against this CPU.

    samescore export refusal-tiny -o bundles/b --variant cpu-int8 --variant cpu-fp32 --variant cpu-int4
    python benchmarks/emulated.py bundles/b --texts 100

Each row is a process of its own that scores the same golden texts. `as shipped` is the runtime as it is; `unguarded` is
cpu-int8 without the guard in `runtime/session.py`. Emulation is exact, not fast: no number here is a time. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.calibrate.golden import GoldenSet, read_golden
from samescore.runtime import Bundle, cpu, load, session
from samescore.runtime.prediction import probabilities_of

QEMU = Path(".cache/assets/qemu/qemu-x86_64")
# AVX2 without VNNI; SSE4.2, without AVX. qemu emulates no AVX-512.
CPUS = ("Haswell-v4", "Nehalem")


def find_qemu() -> Path | None:
    """qemu-user for x86-64: what `make assets` fetched, or the system's."""
    fetched = Path(__file__).parent.parent / QEMU
    if fetched.is_file():
        return fetched
    found = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    return Path(found) if found else None


def command_on(model: str | None, *arguments: str) -> list[str]:
    """A python command on an emulated CPU model; None: on this CPU."""
    python = [sys.executable, *arguments]
    if model is None:
        return python
    qemu = find_qemu()
    if qemu is None:
        raise SystemExit("qemu-x86_64 was not found: make assets, or install qemu-user")
    return [str(qemu), "-cpu", model, *python]


def score_on(model: str | None, bundle: Path, variant: str, texts: int, *, guarded: bool = True) -> dict[str, Any]:
    """What `--worker` answers from a process on that CPU."""
    settings = ["--variant", variant, "--texts", str(texts), *([] if guarded else ["--unguarded"])]
    command = command_on(model, str(Path(__file__).resolve()), str(bundle), "--worker", *settings)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"{variant} on {model or 'this CPU'}: {done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def work(bundle: Path, variant: str, texts: int, unguarded: bool) -> dict[str, Any]:
    """Logits of the texts on this (emulated) CPU, and whether its uint8 × int8 products saturate."""
    saturates = cpu.u8s8_saturates()
    if unguarded:
        session.u8s8_saturates = lambda: False  # type: ignore[assignment]
    golden = sample(bundle, texts)
    logits = load(bundle, provider="cpu", variant=variant, threads=1, canary="off").logits(golden.input_ids())
    return {"saturates": saturates, "logits": [[float(x).hex() for x in row] for row in logits]}


def sample(bundle: Path, texts: int) -> GoldenSet:
    """That many golden texts, evenly spread."""
    golden = read_golden(bundle / "golden.jsonl.gz")
    chosen = np.unique(np.linspace(0, len(golden.texts) - 1, min(texts, len(golden.texts))).astype(int))
    return GoldenSet(golden.reference, tuple(golden.texts[i] for i in chosen))


def moved(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> dict[str, float]:
    """max, p99 and mean over texts of the largest difference of probabilities [texts, labels]."""
    dp = np.abs(p - q).max(axis=1)
    return {"max": float(dp.max()), "p99": float(np.quantile(dp, 0.99)), "mean": float(dp.mean())}


def table(bundle: Path, texts: int, models: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per variant and CPU, printed as it comes."""
    with Bundle(bundle) as opened:
        variants = [v for v in opened.manifest.variants if v.target == "cpu"]
        activation = opened.manifest.activation
    reference = probabilities_of(sample(bundle, texts).logits(), activation)
    rows = []
    print(
        f"{'variant':<10}{'CPU':<13}{'':<12}{'vs reference: max':>18}{'p99':>9}{'mean':>9}{'vs this CPU: max':>18}{'mean':>9}"
    )
    for variant in variants:
        here = None
        for model in (None, *models):
            for guarded in (True, False) if variant.precision == "int8" and model else (True,):
                answer = score_on(model, bundle, variant.name, texts, guarded=guarded)
                p = probabilities_of(
                    np.array([[float.fromhex(x) for x in row] for row in answer["logits"]]), activation
                )
                here = p if here is None else here
                row = {
                    "variant": variant.name,
                    "cpu": model or "this",
                    "guarded": guarded,
                    "saturates": answer["saturates"],
                }
                row |= {"reference": moved(p, reference), "this": moved(p, here)}
                rows.append(row)
                r, t = row["reference"], row["this"]
                print(
                    f"{variant.name:<10}{model or 'this CPU':<13}{'as shipped' if guarded else 'unguarded':<12}"
                    f"{r['max']:>18.1e}{r['p99']:>9.1e}{r['mean']:>9.1e}{t['max']:>18.1e}{t['mean']:>9.1e}",
                    flush=True,
                )
    return rows


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument(
        "--cpu", action="append", help=f"a model of `qemu-x86_64 -cpu help` (default: {', '.join(CPUS)})"
    )
    parser.add_argument("--worker", action="store_true", help="score on this CPU and print logits as JSON")
    parser.add_argument("--variant", default="cpu-int8", help="of --worker")
    parser.add_argument("--unguarded", action="store_true", help="of --worker: without the guard of the runtime")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments.bundle, arguments.variant, arguments.texts, arguments.unguarded)))
        return 0
    models = tuple(arguments.cpu or CPUS)
    version = subprocess.run([str(find_qemu()), "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    document = {
        "texts": len(sample(arguments.bundle, arguments.texts).texts),
        "this_cpu": cpu.cpu_model(),
        "int8_flags": cpu.int8_flags(),
        "qemu": version,
        "onnxruntime": metadata.version("onnxruntime"),
        "rows": table(arguments.bundle, arguments.texts, models),
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
