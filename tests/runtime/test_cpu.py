"""Whether uint8 × int8 products are exact here, and what the runtime does where they are not."""

import numpy as np
import onnx_ir as ir
import pytest

from samescore import load
from samescore.runtime import cpu, session


def test_the_probe_is_one_multiplication():
    values = {}
    for name, kind, rank in (("a", "UINT8", 2), ("b", "INT8", 2), ("s", "FLOAT", 0), ("y", "FLOAT", 2)):
        tensor = ir.TensorType(ir.DataType[kind])
        values[name] = ir.Value(name=name, type=tensor, shape=ir.Shape([None] * rank))
    a, b, s, y = values.values()
    node = ir.Node("com.microsoft", "MatMulIntegerToFloat", [a, b, s, s], outputs=[y], name="n")
    graph = ir.Graph([a, b, s], [y], nodes=[node], opset_imports={"": 21, "com.microsoft": 1}, name="g")
    assert ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString() == cpu.PROBE


def test_products_saturate_with_avx2_alone():
    """What the CPU does is what its flags promise."""
    flags = set(cpu.int8_flags())
    expected = "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}
    assert cpu.u8s8_saturates() is expected


@pytest.mark.torch
@pytest.mark.parametrize("low_memory", [False, True])
def test_the_guard_changes_no_number(bert_bundle, monkeypatch, low_memory):
    """Weights as uint8 give bit for bit the same where products are exact anyway (and are read from the same buffers)."""
    if cpu.u8s8_saturates():
        pytest.skip("this CPU needs the guard: there is nothing to compare it with")
    ids = [np.arange(3, 3 + n, dtype=np.int64) for n in (1, 7, 40)]
    asked = []
    scores = []
    for saturates in (False, True):
        monkeypatch.setattr(session, "u8s8_saturates", lambda: asked.append(1) or saturates)  # noqa: B023
        classifier = load(bert_bundle, provider="cpu", variant="cpu-int8", low_memory=low_memory)
        scores.append(classifier.logits(ids))
    assert asked and np.array_equal(*scores)
    asked.clear()
    load(bert_bundle, provider="cpu", variant="cpu-fp32")
    assert not asked, "float graphs need no probe"
