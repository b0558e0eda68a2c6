"""The BERT graph against PyTorch: every variant, shapes, activations, checkpoints it must refuse."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.reference import load_reference, reference_logits
from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert
from samescore.export.recipes import variant_spec
from samescore.runtime.errors import CheckpointError
from samescore.runtime.prefill import feeds_for

from ..conftest import tiny_bert

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RANDOM = np.random.default_rng(3)
# Largest |logit| difference on tiny random models; each gate of the real variants is stricter in its own unit.
TOLERANCE = {
    "cpu-fp32": 2e-6,
    "cpu-int8": 3e-2,
    "cpu-int4": 0.5,
    "cuda-fp16": 2e-3,
    "cuda-int8": 3e-2,
    "migraphx-fp16": 2e-3,
    "migraphx-int8": 3e-2,
}


def sequences(vocabulary, lengths):
    return [RANDOM.integers(3, vocabulary, size=length) for length in lengths]


def session(folder):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / MODEL_NAME, options, providers=["CPUExecutionProvider"])


def build(checkpoint, name, folder, statistics=None):
    folder.mkdir()
    build_graph(checkpoint, variant_spec(name).recipe, folder, statistics=statistics)
    return session(folder)


def feeds(model, ids, mask=None):
    return feeds_for([value.name for value in model.get_inputs()], ids, mask)


@pytest.fixture(scope="module")
def checkpoint(bert_checkpoint):
    return Checkpoint(bert_checkpoint)


@pytest.mark.parametrize("name", bert.VARIANTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_length_matches_pytorch(checkpoint, tmp_path, name, calibrated):
    vocabulary = checkpoint.config["vocab_size"]
    ids = sequences(vocabulary, [1, 2, 3, 7, 16, 33, 63, 64])
    statistics = collect_statistics(checkpoint, sequences(vocabulary, [5, 20, 40])).statistics if calibrated else None
    model = build(checkpoint, name, tmp_path / name, statistics)
    expected = reference_logits(checkpoint, ids)
    for row, sequence in zip(expected, ids, strict=True):
        got = model.run(None, feeds(model, sequence[None]))[0]
        assert got.shape == (1, 2) and got.dtype == np.float32
        np.testing.assert_allclose(got[0], row, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", bert.VARIANTS)
def test_a_batch_equals_its_rows(checkpoint, tmp_path, name):
    model = build(checkpoint, name, tmp_path / name)
    ids = np.stack(sequences(checkpoint.config["vocab_size"], [12] * 5))
    together = model.run(None, feeds(model, ids))[0]
    for row, sequence in zip(together, ids, strict=True):
        np.testing.assert_allclose(model.run(None, feeds(model, sequence[None]))[0][0], row, atol=2e-6)


@pytest.mark.parametrize("heads", [2, 16], ids=["heads of 16", "heads of 2"])
@pytest.mark.parametrize("name", ["cuda-fp16", "cuda-int8", "migraphx-fp16", "migraphx-int8"])
def test_padding_does_not_change_a_masked_graph(tmp_path, name, heads):
    """Whatever lies in it. CUDA's graphs mask heads whose size 8 does not divide in another way."""
    checkpoint = Checkpoint(tiny_bert(tmp_path / "checkpoint", num_attention_heads=heads))
    assert checkpoint.config["hidden_size"] == 32
    model = build(checkpoint, name, tmp_path / "model")
    ids = sequences(checkpoint.config["vocab_size"], [3, 1, 9, 20])
    padded, mask = np.ones((4, 20), np.int64), np.zeros((4, 20), np.int64)
    for row, sequence in enumerate(ids):
        padded[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    together = model.run(None, feeds(model, padded, mask))[0]
    for row, sequence in zip(together, ids, strict=True):
        np.testing.assert_allclose(model.run(None, feeds(model, sequence[None]))[0][0], row, atol=1e-3)
    padded[mask == 0] = 7
    np.testing.assert_array_equal(model.run(None, feeds(model, padded, mask))[0], together)
    blind = model.run(None, feeds(model, padded))[0]
    assert np.abs(blind - together)[:3].max() > 1e-2  # what padding would do without a mask


def test_masks_of_cuda_graphs_reach_the_kernel_that_keeps_scores_in_float32(checkpoint, tmp_path):
    """Lengths and offsets, of all queries and of the last layer's one; head sizes without that kernel get the lengths."""
    build(checkpoint, "cuda-fp16", tmp_path / "model")
    build(Checkpoint(tiny_bert(tmp_path / "small", num_attention_heads=16)), "cuda-fp16", tmp_path / "lengths")
    graph, small = (
        onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False).graph for name in ("model", "lengths")
    )
    made = {node.output[0]: node for node in graph.node}
    masks = [node.input[4] for node in graph.node if node.op_type == "MultiHeadAttention"]
    assert {node.input[4] for node in small.node if node.op_type == "MultiHeadAttention"} == {"lengths"}
    assert len(set(masks[:-1])) == 1 and masks[-1] != masks[0]
    assert all(made[mask].op_type == "Concat" and made[mask].input[0] == "lengths" for mask in masks)
    model = onnx.load(tmp_path / "model" / MODEL_NAME, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=mask) for mask in (masks[0], masks[-1]))
    (tmp_path / "model" / "masks.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "model" / "masks.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.full((3, 7), 5), "lengths": np.array([2, 7, 1], np.int32)}
    every, one = session.run([masks[0], masks[-1]], feed)
    assert every.tolist() == [2, 7, 1, *range(0, 22, 7), *range(0, 22, 7)]
    assert one.tolist() == [2, 7, 1, *range(4), *range(0, 22, 7)]


@pytest.mark.parametrize("name", ["cuda-fp16", "cuda-int8", "migraphx-fp16"])
def test_the_residual_stream_of_half_recipes_is_float32(checkpoint, tmp_path, name):
    """Read from the graph: a CPU adds in float32 whatever the graph says, and hides what float16 would overflow."""
    build(checkpoint, name, tmp_path / name)
    graph = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    sums = [made[node.input[0]] for node in graph.node if node.op_type == "LayerNormalization"][1:]
    assert len(sums) == 2 * checkpoint.config["num_hidden_layers"]
    for added in sums:
        product, residual = (made[value] for value in added.input)
        assert added.op_type == "Add" and product.op_type == "Cast" and product.attribute[0].i == onnx.TensorProto.FLOAT
        while residual.op_type in ("Gather", "Reshape"):
            residual = made[residual.input[0]]
        assert residual.op_type == "LayerNormalization"


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"num_hidden_layers": 1},
        {"num_attention_heads": 1},
        {"id2label": {i: f"class {i}" for i in range(5)}, "label2id": {f"class {i}": i for i in range(5)}},
        {"layer_norm_eps": 1e-3},
    ],
    ids=lambda overrides: next(iter(overrides)) + "=" + str(next(iter(overrides.values())))[:18],
)
@pytest.mark.parametrize("name", ["cpu-fp32", "cuda-fp16", "migraphx-fp16"])
def test_configurations(tmp_path, overrides, name):
    checkpoint = Checkpoint(tiny_bert(tmp_path / "checkpoint", **overrides))
    ids = sequences(checkpoint.config["vocab_size"], [2, 19])
    model = build(checkpoint, name, tmp_path / "model")
    expected = reference_logits(checkpoint, ids)
    for row, sequence in zip(expected, ids, strict=True):
        got = model.run(None, feeds(model, sequence[None]))[0][0]
        np.testing.assert_allclose(got, row, atol=TOLERANCE[name])


def test_statistics_equal_those_of_pytorch(checkpoint):
    """What calibration sees is what PyTorch's own modules see."""
    ids = sequences(checkpoint.config["vocab_size"], [4, 11])
    statistics = collect_statistics(checkpoint, ids).statistics
    model = load_reference(checkpoint)
    seen = []
    module = model.bert.encoder.layer[1].intermediate.dense
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy()))
    with torch.inference_mode():
        for sequence in ids:
            model(torch.from_numpy(sequence[None]))
    handle.remove()
    measured = statistics["bert.encoder.layer.1.intermediate.dense"]
    np.testing.assert_allclose(measured.low, np.concatenate(seen).min(axis=0), atol=1e-5)
    np.testing.assert_allclose(measured.high, np.concatenate(seen).max(axis=0), atol=1e-5)
    np.testing.assert_allclose(measured.mean, np.mean([x.mean(axis=0) for x in seen], axis=0), atol=1e-5)


def test_calibration_makes_int8_more_exact_where_channels_are_outliers(tmp_path):
    """Two channels with a large mean and two with a large spread, as trained models have them."""
    folder = tiny_bert(tmp_path / "checkpoint")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("LayerNorm.bias") and ".layer." in name:
            tensor[[3, 9]] += 20
        if name.endswith("LayerNorm.weight") and ".layer." in name:
            tensor[[5, 17]] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    vocabulary = checkpoint.config["vocab_size"]
    ids = sequences(vocabulary, range(3, 43))
    expected = reference_logits(checkpoint, ids)
    statistics = collect_statistics(checkpoint, sequences(vocabulary, range(5, 45, 3))).statistics
    errors = {}
    for name, given in (("plain", None), ("calibrated", statistics)):
        model = build(checkpoint, "cpu-int8", tmp_path / name, given)
        got = np.concatenate([model.run(None, feeds(model, sequence[None]))[0] for sequence in ids])
        errors[name] = float(np.abs(got - expected).mean())
    assert errors["calibrated"] < errors["plain"] / 2


def test_graph_contracts(checkpoint, tmp_path):
    """Names, types and axes of each variant, and what a MIGraphX file may hold."""
    for spec in map(variant_spec, bert.VARIANTS):
        build(checkpoint, spec.name, tmp_path / spec.name)
        model = onnx.load(tmp_path / spec.name / MODEL_NAME, load_external_data=False)
        inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        if spec.recipe.padding:
            lengths = inputs.pop("lengths")
            assert lengths.elem_type == onnx.TensorProto.INT32 and lengths.shape.dim[0].dim_param == "batch"
        assert list(inputs) == (["input_ids"] if spec.recipe.contrib else ["input_ids", "attention_mask"])
        for tensor in inputs.values():
            assert tensor.elem_type == onnx.TensorProto.INT64
            assert [dim.dim_param for dim in tensor.shape.dim] == ["batch", "sequence"]
        (output,) = model.graph.output
        assert output.name == "logits" and output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert model.ir_version <= 10
        domains = {node.domain for node in model.graph.node}
        assert domains <= ({"", "com.microsoft"} if spec.recipe.contrib else {""})
        assert all(opset.version <= 21 for opset in model.opset_import)
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        for initializer in model.graph.initializer:
            if initializer.external_data:
                place = {entry.key: entry.value for entry in initializer.external_data}
                assert place["location"] == "model.onnx.data" and int(place["offset"]) % 4096 == 0


@pytest.mark.parametrize("name", ["cuda-fp16", "migraphx-fp16"])
def test_half_precision_file_holds_no_float32_matrix_of_the_layers(checkpoint, tmp_path, name):
    build(checkpoint, name, tmp_path / "model")
    model = onnx.load(tmp_path / "model" / MODEL_NAME, load_external_data=False)
    wide = [i.name for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2]
    assert sorted(wide) == [
        "bert.embeddings.position_embeddings.weight",
        "bert.pooler.dense.weight",
        "classifier.weight",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish'; the bert graph knows 'gelu'"),
        ({"is_decoder": True}, "is_decoder = True"),
    ],
)
def test_unknown_configurations_are_refused(bert_checkpoint, tmp_path, change, said):
    import shutil

    folder = tmp_path / "checkpoint"
    shutil.copytree(bert_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        build(Checkpoint(folder), "cpu-fp32", tmp_path / "model")
