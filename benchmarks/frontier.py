"""Drift against time along a recipe search's frontier: what each share of finer number formats costs and gains.

    samescore export CKPT --profile P -o exact --variant cpu-fp32        # golden texts with reference logits
    python benchmarks/frontier.py --checkpoint CKPT --profile P --golden exact [--points 8] [--plot frontier.svg]

The search's steps are found on the calibration texts that ship; `points` recipes along them, and float32, are built, measured
on the golden texts, and timed in turn in one process on random token ids. Prints a table for people; the last line of stdout
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from samescore._progress import step
from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.certify import score_all
from samescore.calibrate.effects import LabelEffects, part_effects
from samescore.calibrate.frontier import Frontier, make_frontier
from samescore.calibrate.golden import GoldenSet, encode_golden
from samescore.calibrate.metrics import Drift, measure
from samescore.calibrate.search import effect_texts
from samescore.calibrate.shipped import GOLDEN_NAME, read_shipped
from samescore.calibrate.stages import exact_recipe, read_model
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import contract_for, profile_named
from samescore.export.recipes import Recipe, variant_spec
from samescore.packaged import calibration_set
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.prefill import Reader
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import TextEncoder
from samescore.scored import open_classifier


@dataclass
class Point:
    """One recipe: how many steps, its data's bytes, its time over the first's by length, predicted and measured."""

    steps: int | None
    megabytes: float
    predicted_time: float | None
    drift: Drift
    times: dict[int, float]

    def row(self) -> dict[str, Any]:
        """For the document, without the flips' places."""
        drift = asdict(self.drift)
        drift["flips"] = len(self.drift.flips)
        return {**asdict(self), "drift": drift}


def build(checkpoint: Checkpoint, recipe: Recipe, folder: Path, **options: Any) -> tuple[Session, float]:
    """A session on one thread, and the megabytes of its data."""
    folder.mkdir()
    build_graph(checkpoint, recipe, folder, **options)
    model = read_model(folder)
    return Session(model, "cpu", intra_op_threads=1), sum(map(len, model.data.values())) / 1e6


def timed(readers: list[Reader], vocabulary: int, lengths: list[int], rounds: int) -> list[dict[int, float]]:
    """By reader and length, the median seconds over the first reader's; all are asked in turn."""
    chance = np.random.default_rng(0)
    result: list[dict[int, float]] = [{} for _ in readers]
    for length in lengths:
        ids = chance.integers(10, vocabulary - 10, length).astype(np.int64)
        seconds = np.zeros((rounds + 1, len(readers)))
        for turn in range(rounds + 1):  # the first warms up
            for number, reader in enumerate(readers):
                started = time.perf_counter()
                reader.logits(ids)
                seconds[turn, number] = time.perf_counter() - started
        ratios = np.median(seconds[1:] / seconds[1:, :1], axis=0)
        for number, ratio in enumerate(ratios):
            result[number][length] = float(ratio)
    return result


def frontier_of(arguments: argparse.Namespace, checkpoint: Checkpoint, encoder: TextEncoder, recipe: Recipe) -> Any:
    """The frontier and the statistics behind it, from the calibration texts that ship."""
    facts = profile_named(arguments.profile)
    calibration = calibration_set(arguments.calibration, facts).first(arguments.calibration_limit)
    ids = encode_golden(calibration, encoder).input_ids()
    with step(f"activation statistics of {len(ids)} calibration texts"):
        run = collect_statistics(checkpoint, ids)
    effects = part_effects(
        checkpoint,
        recipe,
        effect_texts(checkpoint, recipe, ids),
        run.statistics,
        LabelEffects,
        max_tokens=encoder.contract.max_tokens,
        report=step,
    )
    return make_frontier(checkpoint, recipe, effects), run.statistics


def points(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    encoder: TextEncoder,
    golden: GoldenSet,
    frontier: Frontier,
    statistics: Any,
) -> list[Point]:
    """Recipes evenly spread over the steps, and float32 as the last."""
    counts = np.unique(np.linspace(0, len(frontier.steps), arguments.points).round().astype(int)).tolist()
    recipes = [(count, frontier.recipe.choosing(frontier.choices(count))) for count in counts]
    recipes.append((None, replace(exact_recipe(), state=frontier.recipe.state)))
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        readers = []
        for number, (count, recipe) in enumerate(recipes):
            session, size = build(checkpoint, recipe, Path(temporary) / str(number), statistics=statistics)
            readers.append(Reader(session, encoder.prefix_ids))
            title = f"float32 over {len(golden.texts)} texts" if count is None else f"{count} steps"
            with step(title, len(golden.texts)) as tick:
                logits = score_all(readers[-1], golden.input_ids(), workers=available_threads(), progress=tick)
            reference = golden.reference
            drift = measure(
                golden.logits(),
                logits,
                checkpoint.labels,
                checkpoint.activation,
                bf16_mean_abs_dp=reference.bf16_mean_abs_dp if reference else None,
            )
            predicted = None if count is None else frontier.time(count)
            found.append(Point(count, size, predicted, drift, {}))
        vocabulary = int(checkpoint.config["vocab_size"])
        for point, times in zip(found, timed(readers, vocabulary, arguments.lengths, arguments.rounds), strict=True):
            point.times = times
    return found


def plot(found: list[Point], lengths: list[int], title: str, path: Path) -> None:
    """p99 and mean |Δp| against time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "samescore"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, label, marker in (("p99_abs_dp", "p99", "o"), ("mean_abs_dp", "mean", "s")):
        steps = [point for point in found if point.steps is not None]
        x = [float(np.mean([point.times[length] for length in lengths])) for point in steps]
        axes.plot(x, [getattr(point.drift, name) for point in steps], marker=marker, label=f"{label} |Δp|")
    exact = float(np.mean([found[-1].times[length] for length in lengths]))
    axes.axvline(exact, color="grey", linestyle="--", label="float32's time")
    axes.set_yscale("log")
    axes.set_xlabel(f"time over plain int8's (mean over {', '.join(map(str, lengths))} tokens)")
    axes.set_ylabel("|Δp| from PyTorch float32")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> int:
    """Print the table and the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--golden", type=Path, required=True, help="a bundle whose golden texts have reference logits")
    parser.add_argument("--golden-limit", type=int)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--calibration-limit", type=int)
    parser.add_argument("--variant", default="cpu-int8")
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    facts = profile_named(arguments.profile)
    checkpoint, _ = open_classifier(arguments.checkpoint, label_tokens=facts.label_tokens)
    encoder = TextEncoder(checkpoint.tokenizer_bytes(), contract_for(checkpoint, facts))
    golden = read_shipped((arguments.golden / GOLDEN_NAME).read_bytes()).inside().first(arguments.golden_limit)
    golden = encode_golden(golden, encoder)
    recipe = variant_spec(arguments.variant).recipe
    frontier, statistics = frontier_of(arguments, checkpoint, encoder, recipe)
    found = points(arguments, checkpoint, encoder, golden, frontier, statistics)
    times = "".join(f"{f'x @{length}':>9}" for length in arguments.lengths)
    print(f"{'steps':>7}{'MB':>8}{'x table':>9}{times}{'max':>10}{'p99':>10}{'mean':>10}{'same':>9}")
    for point in found:
        cells = "".join(f"{point.times[length]:>9.2f}" for length in arguments.lengths)
        predicted = "–" if point.predicted_time is None else f"{point.predicted_time:.2f}"
        d = point.drift
        name = "float32" if point.steps is None else point.steps
        print(
            f"{name:>7}{point.megabytes:>8.0f}{predicted:>9}{cells}{d.max_abs_dp:>10.1e}{d.p99_abs_dp:>10.1e}"
            f"{d.mean_abs_dp:>10.1e}{d.agreement:>9.2%}"
        )
    if arguments.plot:
        title = f"{arguments.checkpoint.name}, {arguments.variant}, N = {len(golden.texts)}"
        plot(found, arguments.lengths, title, arguments.plot)
    document = {
        "benchmark": "frontier",
        "checkpoint": arguments.checkpoint.name,
        "variant": arguments.variant,
        "texts": len(golden.texts),
        "cpu": cpu_model(),
        "int8_flags": list(int8_flags()),
        "onnxruntime": onnxruntime.__version__,
        "rounds": arguments.rounds,
        "steps": [list(entry) for entry in frontier.steps],
        "points": [point.row() for point in found],
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
