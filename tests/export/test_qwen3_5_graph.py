"""The Qwen3.5 graph against PyTorch: both head layouts, variants, padding, states, smoothing, what it must refuse."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.stages import read_model
from samescore.export.build import MODEL_NAME, build_graph, check_variant
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import qwen3_5
from samescore.export.graphs.linears import WeightOnlyLinears
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime import prefill
from samescore.runtime.errors import CheckpointError
from samescore.runtime.prefill import feeds_for, logits_of, state_after
from samescore.runtime.session import Session

from ..conftest import label_tokens, tiny_qwen3_5

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# |logit| differences on tiny random models, whose logits have a standard deviation of about 0.9: mean of all, and the
# largest in float32. The norms by head of DeltaNet amplify rounding where what a head reads nearly cancels, so that the
# largest of a random model says little of int8. PyTorch's own two forms of the delta rule, by chunk and by token, differ
# on these models by as much as either from our float32: 9e-6 over 80 texts, more on a rare one.
MEAN = {
    "cpu-fp32": 2e-6,
    "cpu-int8": 0.12,
    "cpu-int4": 0.6,
    "cuda-fp16": 3e-3,
    "cuda-int8": 0.12,
    "migraphx-fp16": 3e-3,
    "migraphx-int8": 0.12,
}
LARGEST = 5e-5
# The others are in test_chunked_delta_net.
VARIANTS = [name for name in qwen3_5.VARIANTS if variant_spec(name).certified_on == "cpu"]
PAD = 1
# As the 4B and the 0.8B model have them.
LAYOUTS = {"two value heads per key head": {}, "as many": {"linear_num_value_heads": 2, "multimodal": True}}


def sequences(checkpoint, lengths):
    random = np.random.default_rng([3, *lengths])
    return [random.integers(3, checkpoint.config["vocab_size"], size=length) for length in lengths]


def scorer(folder):
    return TokenScorer(Checkpoint(folder), label_tokens(folder))


def reference_model(checkpoint):
    """The class that the checkpoint names, in transformers, float32."""
    cls = getattr(transformers, checkpoint.architecture)
    return cls.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def reference_logits(checkpoint, ids):
    model = reference_model(checkpoint)
    with torch.inference_mode():
        rows = [model(input_ids=torch.from_numpy(x[None]), use_cache=False).logits[0, -1].numpy() for x in ids]
    return np.stack(rows)[:, list(checkpoint.label_ids)]


def build(checkpoint, name, folder, *, recipe=None, **options):
    folder.mkdir()
    build_graph(checkpoint, recipe or variant_spec(name).recipe, folder, **options)
    return Session(read_model(folder), "cpu", intra_op_threads=2)


def scores(session, ids):
    return np.stack([logits_of(session, sequence) for sequence in ids])


def initializers(folder):
    model = onnx.load(folder / MODEL_NAME)
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


@pytest.fixture(scope="module", params=LAYOUTS)
def checkpoint(request, tmp_path_factory):
    return scorer(tiny_qwen3_5(tmp_path_factory.mktemp("qwen3_5") / "checkpoint", **LAYOUTS[request.param]))


@pytest.fixture(scope="module")
def session(checkpoint, tmp_path_factory):
    """The float32 graph, with states."""
    return build(checkpoint, "cpu-fp32", tmp_path_factory.mktemp("fp32") / "model")


@pytest.fixture(scope="module")
def statistics(checkpoint):
    return collect_statistics(checkpoint, sequences(checkpoint, [5, 20, 40, 80])).statistics


def test_every_length_matches_pytorch(checkpoint, session):
    """Around each border: of the reference's chunks of 64, of the convolution's 4 tokens, of the session's chunks."""
    ids = sequences(checkpoint, [*range(1, 71), 127, 128, 129, 255, 256, 257, 600])
    expected = reference_logits(checkpoint, ids)
    assert expected.shape[1] == 5 and expected.std() > 0.3  # else agreement would mean nothing
    np.testing.assert_allclose(scores(session, ids), expected, atol=LARGEST)
    assert np.abs(scores(session, ids) - expected).mean() < MEAN["cpu-fp32"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_variants_match_pytorch(checkpoint, statistics, tmp_path, name, calibrated):
    ids = sequences(checkpoint, [1, 2, 3, 7, 33, 64, 65, 256, 300])
    quantized = build(checkpoint, name, tmp_path / name, statistics=statistics if calibrated else None)
    difference = np.abs(scores(quantized, ids) - reference_logits(checkpoint, ids))
    assert difference.mean() < MEAN[name]


@pytest.mark.parametrize("name", ["cpu-int4", "cuda-int8"])
def test_widths_that_no_block_divides(tmp_path, name):
    checkpoint = scorer(tiny_qwen3_5(tmp_path / "checkpoint", intermediate_size=40, hidden_size=72))
    ids = sequences(checkpoint, [1, 7, 33, 65, 90])
    session = build(checkpoint, name, tmp_path / name)
    assert np.abs(scores(session, ids) - reference_logits(checkpoint, ids)).mean() < MEAN[name]


@pytest.mark.parametrize("token", [0, 7])
def test_repeated_tokens(checkpoint, session, token):
    """The keys of repeated tokens are nearly the same, the hardest case for the delta rule."""
    ids = [np.full(length, token) for length in (2, 63, 64, 65, 200, 600)]
    np.testing.assert_allclose(scores(session, ids), reference_logits(checkpoint, ids), atol=LARGEST)


def test_a_token_of_zeros(tmp_path):
    """Its queries and keys are zero and have no direction: 0, not 0 / 0."""
    from safetensors.torch import load_file, save_file

    folder = tiny_qwen3_5(tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = scorer(folder)
    ids = [np.array([9]), np.array([9, 9, 12]), np.array([12, 9])]
    got = scores(build(checkpoint, "cpu-fp32", tmp_path / "model"), ids)
    np.testing.assert_allclose(got, reference_logits(checkpoint, ids), atol=LARGEST)


def padded_batch(checkpoint, lengths, *, left=False, fill=None):
    ids = sequences(checkpoint, lengths)
    width = max(lengths)
    shape = (len(ids), width)
    random = np.random.default_rng(5).integers(3, checkpoint.config["vocab_size"], size=shape)
    padded = random if fill is None else np.full(shape, fill)
    mask = np.zeros(shape, np.int64)
    for row, sequence in enumerate(ids):
        place = slice(width - len(sequence), None) if left else slice(len(sequence))
        padded[row, place], mask[row, place] = sequence, 1
    return ids, padded, mask


def test_right_padding_and_neighbours_change_no_bit(checkpoint, session):
    """In one batch, whatever lies in the padding: each row scores as alone."""
    ids, padded, mask = padded_batch(checkpoint, [1, 40, 21, 100, 7])
    together = session.run(feeds_for(session.inputs, padded, mask))
    np.testing.assert_array_equal(together, scores(session, ids))


@pytest.mark.parametrize("name", ["cpu-int8", "cuda-fp16", "cuda-int8"])
def test_right_padding_in_other_variants(checkpoint, tmp_path, name):
    """int8 activations may round the other way where a matrix product adds in another order."""
    session = build(checkpoint, name, tmp_path / name)
    ids, padded, mask = padded_batch(checkpoint, [1, 40, 21])
    together = session.run(feeds_for(session.inputs, padded, mask))
    np.testing.assert_allclose(together, scores(session, ids), atol=2e-2)


def test_the_reference_pads_on_either_side(checkpoint, session):
    """Left padding with a mask gives the reference our scores, and without one other scores, which no graph repeats."""
    ids, padded, mask = padded_batch(checkpoint, [5, 17, 90], left=True, fill=PAD)
    model = reference_model(checkpoint)
    with torch.inference_mode():
        masked, bare = (
            model(input_ids=torch.from_numpy(padded), attention_mask=given, use_cache=False).logits[:, -1].numpy()
            for given in (torch.from_numpy(mask), None)
        )
    columns = list(checkpoint.label_ids)
    np.testing.assert_allclose(scores(session, ids), masked[:, columns], atol=LARGEST)
    assert np.abs(scores(session, ids) - bare[:, columns])[:2].max() > 0.05
    np.testing.assert_allclose(scores(session, ids[2:]), bare[2:, columns], atol=LARGEST)


def test_a_shared_prefix_and_chunks_score_as_the_whole(checkpoint, session, monkeypatch):
    (ids,) = sequences(checkpoint, [150])
    whole = logits_of(session, ids)
    for split in (1, 2, 3, 16, 64, 77, 149):
        state = state_after(session, ids[:split])
        np.testing.assert_allclose(logits_of(session, ids[split:], state), whole, atol=1e-5)
    monkeypatch.setattr(prefill, "CHUNK", 32)
    np.testing.assert_allclose(logits_of(session, ids), whole, atol=1e-5)
    forgotten = {name: np.zeros_like(value) if "recurrent" in name else value for name, value in state.items()}
    assert np.abs(logits_of(session, ids[149:], forgotten) - whole).max() > 1e-3


@pytest.mark.parametrize("name", ["cpu-int8", "cpu-int4"])
def test_a_shared_prefix_in_other_variants(checkpoint, statistics, tmp_path, name):
    """One text that reads on behind a prefix: rounding of int8 activations amplifies what differs in the last bits."""
    session = build(checkpoint, name, tmp_path / name, statistics=statistics)
    (ids,) = sequences(checkpoint, [150])
    state = state_after(session, ids[:77])
    np.testing.assert_allclose(logits_of(session, ids[77:], state), logits_of(session, ids), atol=0.1)


def test_the_first_state_is_zeros(checkpoint, session):
    """Empty where an axis grows with the text; what comes back has the shapes that go in."""
    config = qwen3_5.Qwen35Config.read(checkpoint)
    (ids,) = sequences(checkpoint, [9])
    state = state_after(session, ids)
    for index, kind in enumerate(config.layer_types):
        if kind == qwen3_5.FULL:
            assert state[f"past_key.{index}"].shape == state[f"past_value.{index}"].shape == (1, 2, 9, 64)
        else:
            assert state[f"past_conv.{index}"].shape == (1, config.delta.channels, 3)
            assert state[f"past_recurrent.{index}"].shape == (1, config.delta.value_heads, 32, 32)
    empty = {name: value[:, :, :0] if "key" in name or "value" in name else value * 0 for name, value in state.items()}
    np.testing.assert_array_equal(logits_of(session, ids, empty), logits_of(session, ids))


FULL_LAYERS = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 5},  # linear attention in the last layer
        {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2},
        FULL_LAYERS,
        {"layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2},
        {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        {"linear_key_head_dim": 16, "linear_value_head_dim": 48},
        {"linear_num_key_heads": 1},
        {"linear_conv_kernel_dim": 2},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.25}},
    ],
    ids=lambda overrides: ",".join(f"{key}={value}" for key, value in overrides.items())[:60],
)
def test_configurations(tmp_path, overrides):
    checkpoint = scorer(tiny_qwen3_5(tmp_path / "checkpoint", **overrides))
    session = build(checkpoint, "cpu-fp32", tmp_path / "model")
    ids = sequences(checkpoint, [2, 300])
    expected = reference_logits(checkpoint, ids)
    np.testing.assert_allclose(scores(session, ids), expected, atol=LARGEST)
    _, padded, mask = padded_batch(checkpoint, [3, 40])
    alone = scores(session, [padded[0, :3], padded[1]])
    np.testing.assert_allclose(session.run(feeds_for(session.inputs, padded, mask)), alone, atol=2e-6)


@pytest.mark.parametrize("rotary", [0.25, 1.0])
def test_gated_attention_from_plain_operators(tmp_path, rotary):
    """Where all channels of a head are rotated, and where some are."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotary}
    checkpoint = scorer(tiny_qwen3_5(tmp_path / "checkpoint", rope_parameters=rope, **FULL_LAYERS))
    recipe = replace(variant_spec("migraphx-fp16").recipe, linear="float32", embedding="float32", half=False)
    ids = sequences(checkpoint, [2, 90])
    plain = build(checkpoint, "", tmp_path / "plain", recipe=recipe)
    np.testing.assert_allclose(scores(plain, ids), reference_logits(checkpoint, ids), atol=LARGEST)
    assert plain.inputs == ("input_ids", "attention_mask")


def test_a_config_without_layer_types(checkpoint, session, tmp_path):
    """Every fourth layer attends fully, and a quarter of a head is rotated, as in transformers."""
    folder = shutil.copytree(checkpoint.folder, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    del text["layer_types"], text["rope_parameters"]["partial_rotary_factor"]
    text["full_attention_interval"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    bare = build(scorer(folder), "cpu-fp32", tmp_path / "model")
    ids = sequences(checkpoint, [3, 70])
    np.testing.assert_array_equal(scores(bare, ids), scores(session, ids))


def test_statistics_equal_those_of_pytorch(checkpoint):
    """What calibration sees, a stage at a time, is what PyTorch's own modules see."""
    ids = sequences(checkpoint, [4, 11])
    statistics = collect_statistics(checkpoint, ids).statistics
    model = reference_model(checkpoint)
    text = getattr(model.model, "language_model", model.model)
    seen = {}
    for site, module in (
        ("model.layers.1.linear_attn.in_proj", text.layers[1].linear_attn.in_proj_z),
        ("model.layers.2.linear_attn.out_proj", text.layers[2].linear_attn.out_proj),
        ("model.layers.3.self_attn.qkv", text.layers[3].self_attn.v_proj),
        ("model.layers.2.mlp.gate_up", text.layers[2].mlp.up_proj),
        ("model.layers.0.mlp.down_proj", text.layers[0].mlp.down_proj),
    ):
        module.register_forward_pre_hook(
            lambda _, inputs, site=site: seen.setdefault(site, []).append(inputs[0][0].numpy())
        )
    with torch.inference_mode():
        for sequence in ids:
            model(input_ids=torch.from_numpy(sequence[None]), use_cache=False)
    for site, values in seen.items():
        np.testing.assert_allclose(statistics[site].low, np.concatenate(values).min(axis=0), atol=5e-5)
        np.testing.assert_allclose(statistics[site].high, np.concatenate(values).max(axis=0), atol=5e-5)
    assert len(seen) == 5 and len(statistics) == 4 * 4


def test_smoothing_changes_the_weights_and_not_the_scores(checkpoint, session, statistics, tmp_path, monkeypatch):
    """Without rounding, scales that are folded into producers and weights cancel."""
    monkeypatch.setattr(qwen3_5, "make_linears", lambda g, statistics, taps: WeightOnlyLinears(g, statistics))
    recipe = replace(variant_spec("cpu-fp32").recipe, smoothing=True)
    smoothed = build(checkpoint, "", tmp_path / "smoothed", recipe=recipe, statistics=statistics)
    build(checkpoint, "", tmp_path / "plain", recipe=recipe)
    ids = sequences(checkpoint, [1, 30, 90])
    np.testing.assert_allclose(scores(smoothed, ids), scores(session, ids), atol=2e-5)
    stored, plain = (initializers(tmp_path / name) for name in ("smoothed", "plain"))
    for name in (
        "layers.0.input_layernorm.weight",
        "layers.0.linear_attn.in_proj_ab.weight",
        "layers.0.linear_attn.in_proj_z.weight",
        "layers.0.linear_attn.norm.weight",
        "layers.0.linear_attn.out_proj.weight",
        "layers.3.input_layernorm.weight",
        "layers.3.self_attn.gate_proj.weight",
        "layers.3.self_attn.v_proj.weight",
        "layers.3.self_attn.o_proj.weight",
        "layers.3.post_attention_layernorm.weight",
        "layers.3.mlp.down_proj.weight",
    ):
        assert np.abs(stored[f"model.{name}"] / plain[f"model.{name}"] - 1).max() > 0.1, name


def with_outliers(tensors, factor=30):
    """The same function of the ids: a few channels are large, and the weights that read them small."""

    def grow(producer, rows, readers, columns, *, offset=0):
        weight = tensors[producer]
        weight[rows] = factor * (weight[rows] + offset) - offset
        for reader in readers:
            tensors[reader][:, columns] /= factor

    for name in list(tensors):
        prefix, _, leaf = name.rpartition("input_layernorm.")
        if leaf == "weight" and prefix:
            parts = (".in_proj_", ".q_proj", ".k_proj", ".v_proj")
            readers = [n for n in tensors if n.startswith(prefix) and any(part in n for part in parts)]
            grow(name, [5, 17], readers, [5, 17], offset=1)
        prefix, found, _ = name.partition("post_attention_layernorm.weight")
        if found:
            readers = [f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up")]
            grow(name, [5, 17], readers, [5, 17], offset=1)
            grow(f"{prefix}mlp.up_proj.weight", [3, 50], [f"{prefix}mlp.down_proj.weight"], [3, 50])
        if name.endswith("linear_attn.norm.weight"):
            columns = [head * 32 + channel for head in range(4) for channel in (3, 20)]
            grow(name, [3, 20], [name.replace("norm", "out_proj")], columns)
        if name.endswith("v_proj.weight"):
            # Two query heads read each value head.
            columns = [head * 64 + channel for head in (0, 1) for channel in (3, 40)]
            grow(name, [3, 40], [name.replace("v_proj", "o_proj")], columns)


@pytest.mark.parametrize("name", ["cpu-int8", "cuda-int8"])
def test_calibration_undoes_outliers(tmp_path, name):
    """Trained models have channels that are many times larger than the others, and weights that make up for them."""
    from safetensors.torch import load_file, save_file

    folder = tiny_qwen3_5(tmp_path / "checkpoint")
    ids = sequences(scorer(folder), range(3, 23))
    expected = reference_logits(scorer(folder), ids)
    tensors = load_file(folder / "model.safetensors")
    with_outliers(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = scorer(folder)
    np.testing.assert_allclose(reference_logits(checkpoint, ids), expected, atol=1e-4)
    statistics = collect_statistics(checkpoint, sequences(checkpoint, range(5, 45, 3))).statistics
    errors = {}
    for kind, given in (("plain", None), ("calibrated", statistics)):
        session = build(checkpoint, name, tmp_path / kind, statistics=given)
        errors[kind] = float(np.abs(scores(session, ids) - expected).mean())
    assert errors["calibrated"] < MEAN[name] and errors["calibrated"] < errors["plain"] / 2, errors


def test_graph_contracts(checkpoint, tmp_path):
    """Names, operators and opsets of each variant."""
    config = qwen3_5.Qwen35Config.read(checkpoint)
    pasts = [
        f"past_{part}.{layer}"
        for layer, kind in enumerate(config.layer_types)
        for part in (("key", "value") if kind == qwen3_5.FULL else ("conv", "recurrent"))
    ]
    for name in VARIANTS:
        check_variant(checkpoint, variant_spec(name))
        recipe = variant_spec(name).recipe
        build(checkpoint, name, tmp_path / name)
        model = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False)
        expected = pasts if recipe.state else []
        inputs, outputs = ([value.name for value in part] for part in (model.graph.input, model.graph.output))
        second = "lengths" if recipe.contrib else "attention_mask"
        assert inputs[:2] == ["input_ids", second] and sorted(inputs[2:]) == sorted(expected)
        assert sorted(outputs) == sorted(["logits", *(past.replace("past", "present") for past in expected)])
        operators = [node.op_type for node in model.graph.node]
        fused = 3 if recipe.contrib else 0
        assert operators.count("LinearAttention") == operators.count("LinearAttentionGate") == fused
        assert operators.count("CausalConvWithState" if recipe.state else "Conv") == 3
        assert recipe.contrib or {node.domain for node in model.graph.node} == {""}
        assert operators.count("GroupQueryAttention") == 0  # the one full layer is the last: one query per text
        assert not {"If", "Loop", "Scan", "GatedRMSNorm"} & set(operators)
        assert model.ir_version <= 10 and all(opset.version <= 21 for opset in model.opset_import)


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """From standard operators, float32, up to 256 tokens."""
    recipe = replace(variant_spec("migraphx-fp16").recipe, linear="float32", embedding="float32", half=False)
    folder = tmp_path_factory.mktemp("plain") / "graph"
    return build(checkpoint, "migraphx-fp16", folder, recipe=recipe, max_tokens=256)


def test_plain_operators_match_pytorch(checkpoint, plain):
    ids = sequences(checkpoint, [*range(1, 8), 63, 64, 65, 127, 128, 129, 200, 255, 256])
    ids.append(np.full(200, 7))
    assert np.abs(scores(plain, ids) - reference_logits(checkpoint, ids)).max() < LARGEST


def test_plain_operators_mask_right_padding(checkpoint, plain):
    lengths = [1, 3, 64, 65, 130]
    ids = sequences(checkpoint, lengths)
    batch, mask = np.full((5, 140), PAD), np.zeros((5, 140), np.int64)
    for row, sequence in enumerate(ids):
        batch[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    together = plain.run(feeds_for(plain.inputs, batch, mask))
    assert np.abs(together - scores(plain, ids)).max() < 1e-5


def test_plain_operators_refuse_longer_texts(checkpoint, plain):
    """An error of ONNX Runtime, never a wrong score; the runtime asks before (`Variant.max_tokens`)."""
    with pytest.raises(Exception, match="cannot be reshaped"):
        scores(plain, sequences(checkpoint, [257]))


def test_stored_types(checkpoint, tmp_path):
    """Matrices in the recipe's type; what drives the recurrence, norms and the head float32 in all."""
    float16, int8, uint8 = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    kinds = {"cuda-fp16": float16, "cpu-int8": int8, "cuda-int8": uint8, "cpu-int4": uint8, "migraphx-fp16": float16}
    for name, kind in kinds.items():
        build(checkpoint, name, tmp_path / name)
        model = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False)
        stored = {i.name: i.data_type for i in model.graph.initializer}
        kept = (
            "in_proj_ab.weight",
            "dt_bias",
            ".A",
            "conv1d.weight",
            "norm.weight",
            "layernorm.weight",
            "score.weight",
        )
        floats = [n for n in stored if n.endswith(kept)]
        assert len(floats) == 3 * 5 + 2 + 4 * 2 + 2 and all(stored[n] == onnx.TensorProto.FLOAT for n in floats)
        parts = ("in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", ".mlp.")
        matrices = [n for n in stored if any(part in n for part in parts) and ".weight.scale" not in n]
        assert len(matrices) >= 3 * 3 + 4 + 4 * 3 and all(stored[n] == kind for n in matrices)


def test_float32_islands_of_half_recipes(checkpoint, tmp_path):
    """Convolution, gates and delta rule read float32, the quantized or halved products float16."""
    float32, float16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for name, product in (("cuda-fp16", "MatMul"), ("cuda-int8", "MatMulNBits")):
        build(checkpoint, name, tmp_path / name)
        graph = onnx.load(tmp_path / name / MODEL_NAME, load_external_data=False).graph
        makers = {output: node for node in graph.node for output in node.output}
        stored = {i.name: i.data_type for i in graph.initializer}

        def kind(value, makers=makers, stored=stored, product=product):
            """The type of a value, found at the nearest Cast or product that made it."""
            while value not in stored:
                node = makers[value]
                if node.op_type == "Cast":
                    return node.attribute[0].i
                if node.op_type == product and node.input[1] in stored:
                    return float16 if product == "MatMulNBits" else stored[node.input[1]]
                value = node.input[0]
            return stored[value]

        for node in graph.node:
            if node.op_type in ("Conv", "LinearAttention", "LinearAttentionGate", "Pow"):
                assert {kind(value) for value in node.input if value} == {float32}, node.name
            if node.op_type == product and node.input[1].endswith("_proj.weight"):
                assert kind(node.input[0]) == float16, node.name


def test_norms_by_head_become_one_operator(checkpoint, tmp_path):
    """Written with standard operators, which the checker knows; ONNX Runtime fuses them."""
    import onnxruntime

    build(checkpoint, "cpu-fp32", tmp_path / "model")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(tmp_path / "model" / MODEL_NAME, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    # queries, keys and output of three linear layers, queries and keys of the full one, and the first norm of all
    assert operators.count("SimplifiedLayerNormalization") == 3 * 3 + 2 + 1 and "Pow" not in operators


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; the qwen3_5 graph knows 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"head_dim": 40}, "heads of 40 channels; the qwen3_5 graph knows multiples of 16"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.125}},
            "RoPE over 8 channels of a head; the qwen3_5 graph knows multiples of 16",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'; the qwen3_5 graph knows"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types 'sliding_attention'"),
        ({"layer_types": ["linear_attention"]}, "1 layer_types for 4 layers"),
        ({"linear_num_key_heads": 3}, "4 value heads for 3 key heads"),
    ],
)
def test_unknown_configurations_are_refused(tmp_path, change, said):
    folder = tiny_qwen3_5(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        build(scorer(folder), "cpu-fp32", tmp_path / "model")
