"""`cuda-fp16-chunked`: the wiring of GatedDeltaNet, against PyTorch through its schema, and the rule that certifies it.

See `gated_delta_net` for what this shows, and what it does not: no kernel of the operator runs here.
"""

import numpy as np
import onnx
import pytest

from samescore import export_bundle
from samescore.calibrate.stages import read_model
from samescore.certifiable import check_certifiable
from samescore.cli import main
from samescore.export.build import MODEL_NAME, build_graph, check_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import VARIANTS, variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import CheckpointError, ProviderError
from samescore.runtime.prefill import feeds_for, logits_of
from samescore.runtime.session import Session

from ..conftest import label_tokens, tiny_qwen3_5
from .gated_delta_net import emulate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

NAME = "cuda-fp16-chunked"
# Heads as the kernels want them; as the published models have them, once as the 4B and once as the 0.8B model.
HEADS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
LAYOUTS = {"two value heads per key head": {}, "as many": {"linear_num_value_heads": 2}}
# As of cuda-fp16 in test_qwen3_5_graph: of the mean |logit| difference; logits have a standard deviation of about 0.9.
MEAN = 3e-3


def scorer(folder):
    return TokenScorer(Checkpoint(folder), label_tokens(folder))


def sequences(checkpoint, lengths):
    random = np.random.default_rng([3, *lengths])
    return [random.integers(3, checkpoint.config["vocab_size"], size=length) for length in lengths]


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5") / "checkpoint"
    return scorer(tiny_qwen3_5(folder, **HEADS, **LAYOUTS[request.param]))


@pytest.fixture(scope="module")
def emulated(checkpoint, tmp_path_factory):
    """The variant's own graph, with the schema's recurrence in the place of the operator."""
    folder = tmp_path_factory.mktemp("chunked")
    build_graph(checkpoint, variant_spec(NAME).recipe, folder)
    assert emulate(folder) == 3
    return Session(read_model(folder), "cpu", intra_op_threads=1)


def test_the_wiring_matches_pytorch(checkpoint, emulated):
    ids = sequences(checkpoint, [1, 2, 3, 7, 33, 64, 65, 130, 300])
    ids.append(np.full(150, 7))
    model = (
        getattr(transformers, checkpoint.architecture).from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    )
    with torch.inference_mode():
        rows = [model(input_ids=torch.from_numpy(x[None]), use_cache=False).logits[0, -1].numpy() for x in ids]
    expected = np.stack(rows)[:, list(checkpoint.label_ids)]
    assert expected.std() > 0.3  # else agreement would mean nothing
    got = np.stack([logits_of(emulated, x) for x in ids])
    assert np.abs(got - expected).mean() < MEAN


def test_right_padding_does_not_reach_the_scores(checkpoint, emulated):
    ids = sequences(checkpoint, [1, 40, 21])
    padded, mask = np.full((3, 40), 5), np.zeros((3, 40), np.int64)
    for row, sequence in enumerate(ids):
        padded[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    together = emulated.run(feeds_for(emulated.inputs, padded, mask))
    np.testing.assert_allclose(together, np.stack([logits_of(emulated, x) for x in ids]), atol=2e-3)


def test_types_and_operators(checkpoint, tmp_path):
    """float16 queries, keys and values reach the operator, without which CUDA takes no chunks; the rest is float32."""
    build_graph(checkpoint, variant_spec(NAME).recipe, tmp_path)
    graph = onnx.load(tmp_path / MODEL_NAME, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    nodes = [node for node in graph.node if node.op_type == "GatedDeltaNet"]
    assert len(nodes) == 3 and not any(node.op_type == "LinearAttention" for node in graph.node)
    for node in nodes:
        for value in node.input[:3]:
            assert made[value].op_type == "Cast" and made[value].attribute[0].i == onnx.TensorProto.FLOAT16
        assert {made[value].op_type for value in node.input[4:6]} == {"LinearAttentionGate"}
        assert made[node.input[6]].op_type == "ConstantOfShape"
    assert [value.name for value in graph.input] == ["input_ids", "lengths"]


def test_a_cpu_cannot_run_it(checkpoint, tmp_path):
    """The reason for the rule below: should ONNX Runtime get a kernel, the rule can go."""
    build_graph(checkpoint, variant_spec(NAME).recipe, tmp_path)
    with pytest.raises(ProviderError, match="GatedDeltaNet.*run it on CUDA"):
        Session(read_model(tmp_path), "cpu", intra_op_threads=1)


def test_other_heads_are_refused(qwen3_5_checkpoint, tmp_path):
    """They would run, token by token."""
    with pytest.raises(CheckpointError, match="heads of 32 and 32 channels.*128 only.*cuda-fp16"):
        build_graph(scorer(qwen3_5_checkpoint), variant_spec(NAME).recipe, tmp_path)


def test_without_its_provider_it_is_not_exported(checkpoint, tmp_path, capsys):
    """Before anything is read or computed, and nothing is left behind."""
    arguments = {"variants": [NAME], "label_tokens": label_tokens(checkpoint.folder)}
    with pytest.raises(
        ProviderError, match=rf"{NAME} .*no CPU kernel.*must run on cuda.*take cuda-fp16, which any box"
    ):
        export_bundle(checkpoint.folder, tmp_path / "bundle", **arguments)
    assert not list(tmp_path.iterdir())
    tokens = ",".join(arguments["label_tokens"])
    command = ["export", str(checkpoint.folder), "-o", str(tmp_path / "b"), "--variant", NAME, "--label-tokens", tokens]
    assert main(command) == 4
    assert "samescore[cuda]" in capsys.readouterr().err


def test_who_certifies_what(monkeypatch, checkpoint):
    """Every variant but this one on a CPU; this one where CUDA computes."""
    check_variant(checkpoint, variant_spec(NAME))
    check_certifiable([spec for spec in VARIANTS if spec.name != NAME])
    monkeypatch.setattr("samescore.certifiable.available_targets", lambda: ["cuda", "cpu"])
    with pytest.raises(ProviderError, match="does not compute here"):  # a build for CUDA on a box without a GPU
        check_certifiable(VARIANTS)
    monkeypatch.setattr("samescore.certifiable.computes", lambda target: target == "cuda")
    check_certifiable(VARIANTS)
    for spec in VARIANTS:
        assert spec.certified_on == ("cuda" if spec.name == NAME else "cpu")
        assert spec.instead is None or variant_spec(spec.instead).certified_on == "cpu"
