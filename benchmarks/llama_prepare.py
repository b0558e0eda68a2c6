"""Make one contender's model for `llama.py` and `scorer.py`, in a process of its own: calibration is what needs most memory.

    python benchmarks/llama_prepare.py ours    --variant cpu-int8 --checkpoint FOLDER --calibration FILE --output FOLDER
    python benchmarks/llama_prepare.py plain   --checkpoint FOLDER --output FOLDER     (float32 ONNX without contrib ops)
    python benchmarks/llama_prepare.py traced  --checkpoint FOLDER --output FOLDER     (the same, traced by transformers)
    python benchmarks/llama_prepare.py w8      --source FOLDER --output FOLDER         (in OpenVINO's environment)
    python benchmarks/llama_prepare.py w8a8    --source FOLDER --calibration FILE --output FOLDER              (likewise)

The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[argparse.Namespace], None]


def read_calibration(path: Path) -> list[Any]:
    """Token id sequences int64 [length] from a JSON list of lists."""
    return [np.asarray(ids, dtype=np.int64) for ids in json.loads(path.read_text())]


def build_calibrated(
    checkpoint: Any, recipe: Any, arguments: argparse.Namespace, max_tokens: int | None = None
) -> None:
    """A graph, its recipe calibrated on the random sequences where it asks for that."""
    from samescore.calibrate.activations import collect_statistics
    from samescore.export.build import build_graph

    statistics = None
    if recipe.smoothing:
        sequences, grams = read_calibration(arguments.calibration), recipe.rounding == "gptq"
        run = collect_statistics(checkpoint, sequences, grams=grams, workspace=arguments.output)
        statistics = run.statistics
    build_graph(checkpoint, recipe, arguments.output, statistics=statistics, max_tokens=max_tokens)


def ours(arguments: argparse.Namespace) -> None:
    """A variant of samescore's, smoothed from the calibration sequences where its recipe smooths."""
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.recipes import variant_spec
    from samescore.export.scorer import TokenScorer

    checkpoint = Checkpoint(arguments.checkpoint)
    if arguments.label_tokens:
        checkpoint = TokenScorer(checkpoint, arguments.label_tokens)
    build_calibrated(checkpoint, variant_spec(arguments.variant).recipe, arguments)


def plain(arguments: argparse.Namespace) -> None:
    """samescore's plain graph in float32, which any ONNX runtime reads."""
    from samescore.export.build import build_graph
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.recipes import variant_spec

    portable = variant_spec("migraphx-fp16").recipe
    recipe = replace(portable, linear="float32", embedding="float32", half=False)
    build_graph(Checkpoint(arguments.checkpoint), recipe, arguments.output)


def traced(arguments: argparse.Namespace) -> None:
    """The float32 graph that transformers' own exporter traces; not compared with PyTorch here, the benchmark does."""
    from samescore.export import generic
    from samescore.export.checkpoint import Checkpoint

    program = generic._trace(generic._load(Checkpoint(arguments.checkpoint)))
    generic._clean(program)
    generic._write(program, arguments.output)


def w8(arguments: argparse.Namespace) -> None:
    """OpenVINO with int8 weights: NNCF's symmetric weight compression."""
    import nncf
    import openvino

    model = openvino.Core().read_model(arguments.source / "model.onnx")
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    openvino.save_model(compressed, arguments.output / "model.xml", compress_to_fp16=False)


def w8a8(arguments: argparse.Namespace) -> None:
    """OpenVINO with int8 weights and activations: NNCF's static quantization, SmoothQuant as by default."""
    import nncf
    import openvino

    sequences = read_calibration(arguments.calibration)
    feeds = [{"input_ids": ids[None, :], "attention_mask": np.ones((1, len(ids)), np.int64)} for ids in sequences]
    quantized = nncf.quantize(
        openvino.Core().read_model(arguments.source / "model.onnx"),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(feeds),
    )
    openvino.save_model(quantized, arguments.output / "model.xml", compress_to_fp16=False)


STEPS = {step.__name__: step for step in (ours, plain, traced, w8, w8a8)}


def parser(steps: Mapping[str, Step], description: str | None) -> argparse.ArgumentParser:
    """The command line of a preparing script."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("step", choices=steps)
    found.add_argument("--checkpoint", type=Path)
    found.add_argument("--variant", default="cpu-int8")
    found.add_argument("--source", type=Path)
    found.add_argument("--calibration", type=Path)
    found.add_argument("--output", type=Path, required=True)
    return found


def run(steps: Mapping[str, Step], arguments: argparse.Namespace) -> None:
    """Run one step, say what it cost."""
    started = time.perf_counter()
    steps[arguments.step](arguments)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_rss_mib": peak}))


def main() -> None:
    """One step."""
    options = parser(STEPS, __doc__)
    options.add_argument("--label-tokens", nargs="+", help="ours: the labels of a language model")
    run(STEPS, options.parse_args())


if __name__ == "__main__":
    main()
