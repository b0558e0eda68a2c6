"""Bundles under emulated CPUs without VNNI: int8 products that saturate there, and the runtime's guard."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from samescore import export_bundle
from samescore.runtime import cpu
from samescore.runtime.prediction import probabilities_of

PATH = Path(__file__).parents[2] / "benchmarks" / "emulated.py"
SPEC = importlib.util.spec_from_file_location("emulated_benchmark", PATH)
emulated = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emulated)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(emulated.find_qemu() is None, reason="qemu-x86_64 is absent: make assets, or install qemu-user"),
]
AVX2, SSE4 = "Haswell-v4", "Nehalem"
TEXTS = 24
# What the same weights and texts may differ by on another CPU, in probability: summation order, and for int4 kernels that do
# not round activations.
SAME = {"cpu-fp32": 1e-6, "cpu-int8": 5e-5, "cpu-int4": 1e-2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    output = tmp_path_factory.mktemp("emulated") / "bundle"
    export_bundle("refusal-tiny", output, variants=list(SAME))
    return output


def run(model, code, *arguments):
    command = emulated.command_on(model, "-c", code, *map(str, arguments))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def probabilities(answer):
    logits = np.array([[float.fromhex(x) for x in row] for row in answer["logits"]])
    return probabilities_of(logits, "softmax")


def test_which_cpus_saturate():
    code = "import json; from samescore.runtime.cpu import u8s8_saturates; print(json.dumps(u8s8_saturates()))"
    assert [run(model, code) for model in (AVX2, SSE4)] == [True, False]


# Loads a graph as a bundle's is loaded; what it says for one row of the largest activations.
SATURATING = """
import json, mmap, sys
import numpy as np
from samescore.runtime import session
from samescore.runtime.bundle import ModelBytes
if sys.argv[2] == "unguarded":
    session.u8s8_saturates = lambda: False
with open(sys.argv[1] + "/w.data", "rb") as file:
    data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
model = ModelBytes(open(sys.argv[1] + "/model.onnx", "rb").read(), {"w.data": data})
opened = session.Session(model, "cpu", intra_op_threads=1)
print(json.dumps(opened.run({"x": np.full((3, 64), 255, np.uint8)}).tolist()))
"""


def write_saturating(folder):
    """uint8 [N, 64] × int8 127 [64, 16], zero point 128, with the weights in a file of their own."""
    weight = ir.Tensor(np.full((64, 16), 127, np.int8), name="w")
    initializers = [ir.Value(name=name) for name in ("w", "one", "zero")]
    tensors = [weight, ir.Tensor(np.ones((), np.float32), name="one"), ir.Tensor(np.array(128, np.uint8), name="zero")]
    for value, tensor in zip(initializers, tensors, strict=True):
        value.const_value = tensor
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
    w, one, zero = initializers
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([None, 64]))
    y = ir.Value(name="logits", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 16]))
    node = ir.Node("com.microsoft", "MatMulIntegerToFloat", [x, w, one, one, zero], outputs=[y])
    imports = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], [y], nodes=[node], initializers=initializers, opset_imports=imports, name="g")
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx", external_data="w.data", size_threshold_bytes=100)


def test_the_largest_products_are_exact_with_the_guard_alone(tmp_path):
    write_saturating(tmp_path)
    exact = 64 * 127 * 127
    assert np.all(np.array(run(AVX2, SATURATING, tmp_path, "guarded")) == exact)
    clipped = np.array(run(AVX2, SATURATING, tmp_path, "unguarded"))
    # 32 pairs, each clipped to 32767, less the zero point's share.
    assert np.all(clipped == 32 * 32767 - 64 * 128 * 127)
    assert np.all(np.array(run(SSE4, SATURATING, tmp_path, "unguarded")) == exact)


@pytest.mark.parametrize("model", [AVX2, SSE4])
@pytest.mark.parametrize("variant", list(SAME))
def test_a_bundle_says_the_same_on_an_old_cpu(bundle, model, variant):
    here = probabilities(emulated.score_on(None, bundle, variant, TEXTS))
    there = probabilities(emulated.score_on(model, bundle, variant, TEXTS))
    assert np.abs(here - there).max() < SAME[variant]


def test_without_the_guard_int8_is_another_model(bundle):
    if cpu.u8s8_saturates():
        pytest.skip("this CPU saturates itself: there is nothing to compare with")
    answer = emulated.score_on(AVX2, bundle, "cpu-int8", TEXTS, guarded=False)
    here = probabilities(emulated.score_on(None, bundle, "cpu-int8", TEXTS))
    assert answer["saturates"] and np.abs(here - probabilities(answer)).max() > 20 * SAME["cpu-int8"]


# Loads a bundle on an old CPU, with time for every text; what its canary says.
CANARY = """
import dataclasses, json, sys
from samescore import load
from samescore.runtime import canary, session
canary.BUDGET_SECONDS = 600
canary.log.disabled = True
if sys.argv[2] == "unguarded":
    session.u8s8_saturates = lambda: False
canary.cpu_model = lambda: "emulated"  # qemu shows the real CPU's name
print(json.dumps(dataclasses.asdict(load(sys.argv[1], variant="cpu-int8", threads=1).canary)))
"""


def test_the_canary_sees_what_the_guard_prevents(bundle):
    guarded, unguarded = (run(AVX2, CANARY, bundle, guard) for guard in ("guarded", "unguarded"))
    assert guarded["status"] == "passed" and guarded["texts"] == 32 and guarded["max_moved"] < SAME["cpu-int8"]
    assert (unguarded["status"], unguarded["texts"]) == ("tripped", 32) and unguarded["max_moved"] > 1e-2
