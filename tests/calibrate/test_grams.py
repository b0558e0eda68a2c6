"""Gram matrices of linear layers' inputs: what PyTorch's modules see, kept on disk without a name, and rounded by."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from samescore import export_bundle
from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.effects import float_recipe
from samescore.calibrate.golden import encode_golden, read_golden
from samescore.calibrate.metrics import measure
from samescore.calibrate.reference import load_reference
from samescore.calibrate.stages import read_model, stages_of
from samescore.export.build import DATA_NAME, MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import contract_for, profile_named
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.packaged import PACKAGE, packaged
from samescore.runtime.prefill import logits_of
from samescore.runtime.session import Session
from samescore.runtime.tokenizer import TextEncoder

from ..conftest import label_tokens

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RECIPE = variant_spec("cpu-int4").recipe
NEAREST = replace(RECIPE, rounding="nearest")


@pytest.fixture(scope="module", params=["bert", "llama", "qwen3_5"])
def subject(request):
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    checkpoint = Checkpoint(folder)
    if request.param == "qwen3_5":
        checkpoint = TokenScorer(checkpoint, label_tokens(folder))
    random = np.random.default_rng(5)
    ids = [random.integers(5, checkpoint.config["vocab_size"], size=n).astype(np.int64) for n in range(3, 60, 3)]
    return checkpoint, ids


@pytest.fixture(scope="module")
def statistics(subject):
    return collect_statistics(*subject, grams=True).statistics


def score(checkpoint, ids, recipe, folder, statistics):
    folder.mkdir()
    build_graph(checkpoint, recipe, folder, statistics=statistics)
    session = Session(read_model(folder), "cpu", intra_op_threads=1)
    return np.stack([logits_of(session, sequence) for sequence in ids]), (folder / DATA_NAME).read_bytes()


def test_what_they_are_made_of(llama_checkpoint, tmp_path):
    """The mean over texts of the mean over tokens, of what PyTorch's own modules read."""
    checkpoint = Checkpoint(llama_checkpoint)
    random = np.random.default_rng(6)
    ids = [random.integers(3, checkpoint.config["vocab_size"], size=n) for n in (4, 11, 30)]
    found = collect_statistics(checkpoint, ids, grams=True, workspace=tmp_path).statistics
    model = load_reference(checkpoint)
    layer, seen = model.model.layers[1], {}
    modules = {"self_attn.qkv": layer.self_attn.v_proj, "self_attn.o_proj": layer.self_attn.o_proj}
    modules |= {"mlp.gate_up": layer.mlp.up_proj, "mlp.down_proj": layer.mlp.down_proj}
    for site, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, inputs, site=site: seen.setdefault(site, []).append(inputs[0][0].double().numpy())
        )
    with torch.inference_mode():
        for sequence in ids:
            model(torch.from_numpy(sequence[None]))
    for site, inputs in seen.items():
        expected = np.mean([x.T @ x / len(x) for x in inputs], axis=0)
        gram = found[f"model.layers.1.{site}"].gram
        assert gram.dtype == np.float32 and isinstance(gram, np.memmap)
        np.testing.assert_allclose(gram, expected, atol=1e-5 * expected.max())
    assert not list(tmp_path.iterdir())  # readable, and no file to be left behind


def test_only_on_request(subject, statistics):
    plain = collect_statistics(*subject)
    assert all(one.gram is None for one in plain.statistics.values())
    assert list(plain.statistics) == list(statistics)
    for site, one in plain.statistics.items():
        width = len(one.mean)
        assert statistics[site].gram.shape == (width, width)
        for part in ("low", "high", "mean"):
            np.testing.assert_allclose(getattr(one, part), getattr(statistics[site], part), atol=1e-6)


def test_they_make_a_trained_model_more_exact(tmp_path):
    """The model that ships, on texts that were not used."""
    checkpoint = Checkpoint(PACKAGE / "models" / "refusal-tiny")
    facts = profile_named("refusal-tiny")
    encoder = TextEncoder(checkpoint.tokenizer_bytes(), contract_for(checkpoint, facts))
    texts = {name: encode_golden(read_golden(packaged(facts, name)), encoder) for name in ("calibration", "golden")}
    run = collect_statistics(checkpoint, texts["calibration"].input_ids()[:60], grams=True, workspace=tmp_path)
    golden = texts["golden"].first(100)
    drift = {}
    for name, recipe in (("gptq", RECIPE), ("nearest", NEAREST)):
        logits, _ = score(checkpoint, golden.input_ids(), recipe, tmp_path / name, run.statistics)
        expected = np.stack([text.logits for text in golden.texts])
        drift[name] = measure(expected, logits, checkpoint.labels, checkpoint.activation).mean_abs_dp
    assert drift["gptq"] < 0.8 * drift["nearest"]


def test_the_same_file_every_time(subject, statistics, tmp_path):
    checkpoint, ids = subject
    again = collect_statistics(*subject, grams=True).statistics
    first, second = (
        score(checkpoint, ids[:1], RECIPE, tmp_path / name, given)[1]
        for name, given in (("first", statistics), ("second", again))
    )
    assert first == second


def test_without_them_it_is_the_nearest(subject, statistics, tmp_path):
    checkpoint, ids = subject
    without = {site: replace(one, gram=None) for site, one in statistics.items()}
    files = [
        score(checkpoint, ids[:1], recipe, tmp_path / name, given)[1]
        for name, recipe, given in (
            ("without", RECIPE, without),
            ("nearest", NEAREST, statistics),
            ("gptq", RECIPE, statistics),
        )
    ]
    assert files[0] == files[1] != files[2]


def stored(folder):
    graph = onnx.load(folder / MODEL_NAME).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if "layer" in tensor.name}


def test_stages_round_as_the_whole_graph_does(subject, statistics, tmp_path):
    checkpoint, ids = subject
    score(checkpoint, ids[:1], RECIPE, tmp_path / "whole", statistics)
    whole, parts = stored(tmp_path / "whole"), {}
    for number, stage in enumerate(stages_of(checkpoint)):
        folder = tmp_path / str(number)
        folder.mkdir()
        build_graph(checkpoint, float_recipe(RECIPE), folder, statistics=statistics, stage=stage)
        assert not any(array.dtype == np.uint8 for array in stored(folder).values())
        recipe = replace(float_recipe(RECIPE), linear="int4-blocks")
        build_graph(checkpoint, recipe, folder, statistics=statistics, stage=stage)
        parts |= stored(folder)
    assert parts.keys() == whole.keys() and any(array.dtype == np.uint8 for array in whole.values())
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array)


def test_an_export_rounds_by_them(bert_checkpoint, bert_bundle, texts_files, tmp_path):
    """Nothing of them is in the bundle, and the manifest says how its weights were rounded."""
    result = export_bundle(
        bert_checkpoint,
        tmp_path / "b",
        profile="refusal",
        variants=["cpu-int4", "cpu-int8"],
        golden=bert_bundle / "golden.jsonl.gz",
        calibration=texts_files[1],
        budget="none",
        allow_drift=True,
    )
    four, eight = sorted(result.manifest.variants, key=lambda variant: variant.name)
    assert four.recipe["rounding"] == "GPTQ from calibration texts" and "rounding" not in eight.recipe
    files = {path.name for path in (tmp_path / "b" / "cpu-int4").iterdir()}
    assert files == {"model.onnx", "model.onnx.data"} and [path.name for path in tmp_path.iterdir()] == ["b"]
    nearest = tmp_path / "nearest"
    nearest.mkdir()
    build_graph(Checkpoint(bert_checkpoint), NEAREST, nearest)
    assert (nearest / DATA_NAME).read_bytes() != (tmp_path / "b" / "cpu-int4" / DATA_NAME).read_bytes()
