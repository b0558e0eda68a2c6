"""Time of one matrix product in each number format, over that of `int8-row`: what the recipe search calls a format's cost.

    python benchmarks/kernels.py [--shapes 384x1152,384x1536,1536x384,2048x2048] [--rows 16,128,512] [--rounds 25]

Each product is a graph of its own, made by the same classes as a variant's; all formats are asked in turn, on one thread, and
the smallest time counts. Prints a table for people; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from samescore.calibrate.frontier import TIME
from samescore.calibrate.stages import read_model
from samescore.export.graphs.blocks import GraphBuilder
from samescore.export.graphs.formats import make_linears
from samescore.export.recipes import NumberFormat, variant_spec
from samescore.export.weights import WeightFile
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.session import Session

FORMATS: tuple[NumberFormat, ...] = (*TIME, "int8-blocks")


def product(inputs: int, outputs: int, number_format: NumberFormat, folder: Path) -> Session:
    """A session of `y [rows, outputs] = x [rows, inputs] @ weight + bias`."""
    folder.mkdir()
    weights = WeightFile(folder / "model.onnx.data")
    recipe = replace(variant_spec("cpu-int8").recipe, linear=number_format, smoothing=False)
    g = GraphBuilder(weights, recipe)
    weight = np.random.default_rng(0).normal(size=(inputs, outputs)).astype(np.float32)
    x = g.input("x", ir.DataType.FLOAT, ["rows", inputs])
    y = make_linears(g)(x, "site", weight, np.zeros(outputs, np.float32))
    g.output(y, "y", ir.DataType.FLOAT, ["rows", outputs])
    model = g.model("product")
    weights.close()
    ir.save(model, folder / "model.onnx")
    return Session(read_model(folder), "cpu", intra_op_threads=1)


def measure(sessions: dict[NumberFormat, Session], inputs: int, rows: int, rounds: int) -> dict[NumberFormat, float]:
    """The smallest seconds of each format."""
    x = np.random.default_rng(1).normal(size=(rows, inputs)).astype(np.float32)
    best = dict.fromkeys(sessions, float("inf"))
    for _ in range(rounds):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run_outputs(["y"], {"x": x})
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def main() -> int:
    """Print the table and the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="384x1152,384x1536,1536x384,2048x2048")
    parser.add_argument("--rows", default="16,128,512")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    found = []
    print(f"{'matrix':<12}{'rows':>5}  {'int8-row':>9}" + "".join(f"{name:>14}" for name in FORMATS[1:]))
    for shape in arguments.shapes.split(","):
        inputs, outputs = map(int, shape.split("x"))
        with tempfile.TemporaryDirectory() as temporary:
            sessions = {name: product(inputs, outputs, name, Path(temporary) / name) for name in FORMATS}
            for rows in map(int, arguments.rows.split(",")):
                seconds = measure(sessions, inputs, rows, arguments.rounds)
                base = seconds["int8-row"]
                ratios = {name: value / base for name, value in seconds.items()}
                found.append({"inputs": inputs, "outputs": outputs, "rows": rows, "seconds": base, "ratios": ratios})
                cells = "".join(f"{ratios[name]:>14.2f}" for name in FORMATS[1:])
                print(f"{shape:<12}{rows:>5}  {base * 1e3:>6.2f} ms{cells}", flush=True)
    medians = {name: float(np.median([row["ratios"][name] for row in found])) for name in FORMATS}
    print(f"{'median':<28}" + "".join(f"{medians[name]:>14.2f}" for name in FORMATS[1:]))
    document = {
        "benchmark": "kernels",
        "cpu": cpu_model(),
        "int8_flags": list(int8_flags()),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "rounds": arguments.rounds,
        "rows": found,
        "medians": medians,
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
