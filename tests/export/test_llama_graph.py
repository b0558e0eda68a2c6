"""The Llama graph against PyTorch: every variant, padding on either side, prefixes, RoPE forms, what it must refuse."""

import json
import shutil

import numpy as np
import onnx
import pytest

from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.reference import load_reference, reference_logits
from samescore.calibrate.stages import read_model
from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import llama
from samescore.export.graphs.rope import inverse_frequencies
from samescore.export.recipes import variant_spec
from samescore.runtime import prefill
from samescore.runtime.errors import CheckpointError
from samescore.runtime.prefill import common_prefix, feeds_for, logits_of, state_after
from samescore.runtime.session import Session

from ..conftest import tiny_llama

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RANDOM = np.random.default_rng(3)
# Largest |logit| difference on tiny random models, whose logits have a standard deviation of about 1.
TOLERANCE = {
    "cpu-fp32": 3e-6,
    "cpu-int8": 0.08,
    "cpu-int4": 0.8,
    "cuda-fp16": 5e-3,
    "cuda-int8": 0.12,
    "migraphx-fp16": 5e-3,
    "migraphx-int8": 0.08,
}
PAD = 2


def sequences(vocabulary, lengths):
    return [RANDOM.integers(3, vocabulary, size=length) for length in lengths]


def build(checkpoint, name, folder, **options):
    folder.mkdir()
    build_graph(checkpoint, variant_spec(name).recipe, folder, **options)
    return Session(read_model(folder), "cpu", intra_op_threads=2)


@pytest.fixture(scope="module")
def checkpoint(llama_checkpoint):
    return Checkpoint(llama_checkpoint)


@pytest.fixture(scope="module")
def statistics(checkpoint):
    return collect_statistics(checkpoint, sequences(checkpoint.config["vocab_size"], [5, 20, 40])).statistics


@pytest.mark.parametrize("name", llama.VARIANTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_length_matches_pytorch(checkpoint, statistics, tmp_path, name, calibrated):
    ids = sequences(checkpoint.config["vocab_size"], [1, 2, 3, 7, 33, 64, 255, 256, 257, 600])
    session = build(checkpoint, name, tmp_path / name, statistics=statistics if calibrated else None)
    expected = reference_logits(checkpoint, ids)
    assert expected.std() > 0.3  # else agreement would mean nothing
    for row, sequence in zip(expected, ids, strict=True):
        got = logits_of(session, sequence)
        assert got.shape == (2,) and got.dtype == np.float32
        np.testing.assert_allclose(got, row, atol=TOLERANCE[name])


@pytest.mark.parametrize("name", llama.VARIANTS)
def test_right_padding_and_neighbours_do_not_matter(checkpoint, tmp_path, name):
    """In one batch, whatever lies in the padding: each row scores as alone."""
    vocabulary = checkpoint.config["vocab_size"]
    session = build(checkpoint, name, tmp_path / name)
    ids = sequences(vocabulary, [3, 40, 21])
    padded, mask = RANDOM.integers(3, vocabulary, size=(3, 40)), np.zeros((3, 40), np.int64)
    for row, sequence in enumerate(ids):
        padded[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    together = session.run(feeds_for(session.inputs, padded, mask))
    for row, sequence in zip(together, ids, strict=True):
        np.testing.assert_allclose(
            row, logits_of(session, sequence), atol=1e-3 if variant_spec(name).recipe.half else 2e-6
        )


def test_both_paddings_of_the_reference_give_our_scores(checkpoint, tmp_path):
    """transformers pads on either side; pad ids inside a text are text."""
    session = build(checkpoint, "cpu-fp32", tmp_path / "model")
    model = load_reference(checkpoint)
    ids = sequences(checkpoint.config["vocab_size"], [5, 17, 30])
    ids[1][[0, 4, 9]] = PAD
    for left in (False, True):
        padded, mask = np.full((3, 30), PAD), np.zeros((3, 30), np.int64)
        for row, sequence in enumerate(ids):
            place = slice(30 - len(sequence), None) if left else slice(len(sequence))
            padded[row, place], mask[row, place] = sequence, 1
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(padded), attention_mask=torch.from_numpy(mask)).logits.numpy()
        for row, sequence in zip(expected, ids, strict=True):
            np.testing.assert_allclose(logits_of(session, sequence), row, atol=3e-6)


def test_a_text_that_ends_in_the_pad_token_is_read_to_its_end(checkpoint, tmp_path):
    """transformers would pool the token before; the last real token is the last one that was handed in."""
    session = build(checkpoint, "cpu-fp32", tmp_path / "model")
    (ids,) = sequences(checkpoint.config["vocab_size"], [12])
    ids[-1] = PAD
    model = load_reference(checkpoint)
    with torch.inference_mode():
        hidden = model.model(input_ids=torch.from_numpy(ids[None])).last_hidden_state
        expected = model.score(hidden)[0, -1].numpy()
    np.testing.assert_allclose(logits_of(session, ids), expected, atol=3e-6)


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8", "cpu-int4"])
def test_a_shared_prefix_and_chunks_score_as_the_whole(checkpoint, statistics, tmp_path, name, monkeypatch):
    session = build(checkpoint, name, tmp_path / name, statistics=statistics)
    (ids,) = sequences(checkpoint.config["vocab_size"], [150])
    whole = logits_of(session, ids)
    for split in (1, 16, 77, 149):
        state = state_after(session, ids[:split])
        np.testing.assert_allclose(logits_of(session, ids[split:], state), whole, atol=3e-6)
    monkeypatch.setattr(prefill, "CHUNK", 32)
    np.testing.assert_allclose(logits_of(session, ids), whole, atol=3e-6)


def test_common_prefix():
    a, b = np.arange(40), np.concatenate([np.arange(30), [1, 2, 3]])
    assert common_prefix([a, b]) == 30
    assert common_prefix([a, a]) == 39 and common_prefix([a, a[:20]]) == 19  # each keeps a token of its own
    assert common_prefix([a]) == 0 and common_prefix([a, a[1:]]) == 0
    assert common_prefix([a, np.concatenate([np.arange(10), [9]])]) == 0  # too short to be worth it


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_hidden_layers": 1},
        {"head_dim": 32},
        {"rms_norm_eps": 1e-3},
        {"id2label": {i: f"class {i}" for i in range(5)}, "label2id": {f"class {i}": i for i in range(5)}},
    ],
    ids=lambda overrides: next(iter(overrides)) + "=" + str(next(iter(overrides.values())))[:28],
)
@pytest.mark.parametrize("name", ["cpu-fp32", "migraphx-fp16"])
def test_configurations(tmp_path, overrides, name):
    checkpoint = Checkpoint(tiny_llama(tmp_path / "checkpoint", **overrides))
    ids = sequences(checkpoint.config["vocab_size"], [2, 300])
    session = build(checkpoint, name, tmp_path / "model")
    for row, sequence in zip(reference_logits(checkpoint, ids), ids, strict=True):
        np.testing.assert_allclose(logits_of(session, sequence), row, atol=TOLERANCE[name])


def test_rope_written_by_older_transformers(checkpoint, llama_checkpoint, tmp_path):
    """transformers 4 wrote rope_theta and rope_scaling; the frequencies equal transformers' own."""
    old = shutil.copytree(llama_checkpoint, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (old / "config.json").write_text(json.dumps(config))
    ours = inverse_frequencies(Checkpoint(old), "llama", 16)
    np.testing.assert_array_equal(ours, inverse_frequencies(checkpoint, "llama", 16))
    theirs = load_reference(checkpoint).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)


def test_statistics_equal_those_of_pytorch(checkpoint):
    """What calibration sees, a stage at a time, is what PyTorch's own modules see."""
    ids = sequences(checkpoint.config["vocab_size"], [4, 11])
    statistics = collect_statistics(checkpoint, ids).statistics
    model = load_reference(checkpoint)
    seen = {}
    for site, module in (
        ("model.layers.1.self_attn.qkv", model.model.layers[1].self_attn.k_proj),
        ("model.layers.0.self_attn.o_proj", model.model.layers[0].self_attn.o_proj),
        ("model.layers.1.mlp.gate_up", model.model.layers[1].mlp.up_proj),
        ("model.layers.1.mlp.down_proj", model.model.layers[1].mlp.down_proj),
        ("model.layers.2.self_attn.qkv", model.model.layers[2].self_attn.v_proj),
    ):
        module.register_forward_pre_hook(
            lambda _, inputs, site=site: seen.setdefault(site, []).append(inputs[0][0].numpy())
        )
    with torch.inference_mode():
        for sequence in ids:
            model(torch.from_numpy(sequence[None]))
    for site, values in seen.items():
        np.testing.assert_allclose(statistics[site].low, np.concatenate(values).min(axis=0), atol=1e-5)
        np.testing.assert_allclose(statistics[site].high, np.concatenate(values).max(axis=0), atol=1e-5)
    assert len(statistics) == 4 * 3


def test_calibration_makes_int8_more_exact_where_channels_are_outliers(tmp_path):
    """Large norm weights on two channels and large inner channels of the feed-forward, as trained models have them."""
    folder = tiny_llama(tmp_path / "checkpoint")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm.weight" in name:
            tensor[[5, 17]] *= 12
        if "up_proj.weight" in name:
            tensor[[3, 100]] *= 20
        if "down_proj.weight" in name:
            tensor[:, [3, 100]] /= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    vocabulary = checkpoint.config["vocab_size"]
    ids = sequences(vocabulary, range(3, 43))
    expected = reference_logits(checkpoint, ids)
    statistics = collect_statistics(checkpoint, sequences(vocabulary, range(5, 45, 3))).statistics
    errors = {}
    for name, given in (("plain", None), ("calibrated", statistics)):
        session = build(checkpoint, "cpu-int8", tmp_path / name, statistics=given)
        got = np.stack([logits_of(session, sequence) for sequence in ids])
        errors[name] = float(np.abs(got - expected).mean())
    assert errors["calibrated"] < errors["plain"] / 2


def test_graph_contracts(checkpoint, tmp_path):
    """Names, types and axes of each variant, and what a MIGraphX file may hold."""
    for name in llama.VARIANTS:
        recipe = variant_spec(name).recipe
        build(checkpoint, name, tmp_path / name)
        model = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False)
        inputs = [value.name for value in model.graph.input]
        caches = [f"past_{part}.{layer}" for layer in range(3) for part in ("key", "value")]
        fused = ["input_ids", "lengths", *(caches if recipe.state else [])]
        assert inputs == (fused if recipe.contrib else ["input_ids", "attention_mask"])
        outputs = [value.name for value in model.graph.output]
        present = [cache.replace("past", "present") for cache in caches]
        assert sorted(outputs) == sorted(["logits", *(present if recipe.state else [])])
        domains = {node.domain for node in model.graph.node}
        assert domains <= ({"", "com.microsoft"} if recipe.contrib else {""})
        assert model.ir_version <= 10 and all(opset.version <= 21 for opset in model.opset_import)
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}


def test_stored_types(checkpoint, tmp_path):
    """A variant's data file holds its matrices in the recipe's type: the head and norms float32, the rest not."""
    stored = {"cuda-fp16": onnx.TensorProto.FLOAT16, "migraphx-fp16": onnx.TensorProto.FLOAT16}
    stored |= {
        "cpu-int8": onnx.TensorProto.INT8,
        "migraphx-int8": onnx.TensorProto.INT8,
        "cpu-int4": onnx.TensorProto.UINT8,
    }
    for name, kind in stored.items():
        build(checkpoint, name, tmp_path / name)
        model = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False)
        kinds = {i.name: i.data_type for i in model.graph.initializer}
        matrices = [n for n in kinds if "_proj" in n and n.endswith(".weight")]
        assert len(matrices) >= 12 and all(kinds[n] == kind for n in matrices)
        assert kinds["score.weight"] == kinds["model.norm.weight"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; the llama graph knows 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"head_dim": 8}, "heads of 8 channels; the llama graph knows multiples of 16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
    ],
)
def test_unknown_configurations_are_refused(llama_checkpoint, tmp_path, change, said):
    folder = shutil.copytree(llama_checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        build(Checkpoint(folder), "cpu-fp32", tmp_path / "model")
