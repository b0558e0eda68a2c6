"""The reference of label tokens is transformers' own model: rows of its vocabulary's logits, and the mass on them."""

import json
import shutil

import numpy as np
import pytest

from samescore.calibrate.next_token import mass_warning
from samescore.calibrate.reference import load_reference, reference_logits, run_reference
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import CheckpointError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DIGITS = ("0", "1", "2", "3", "4")


@pytest.fixture(scope="module")
def scorer(language_model):
    return TokenScorer(Checkpoint(language_model), DIGITS)


def sequences(count=4):
    random = np.random.default_rng(2)
    return [random.integers(2, 300, size=length).astype(np.int64) for length in (1, 7, 40, 300)[:count]]


def test_scores_are_the_label_rows_of_the_vocabulary_s_logits(scorer, language_model):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(language_model).eval()
    run = run_reference(scorer, sequences())
    assert run.logits.shape == (4, 5) and run.logits.dtype == np.float32
    for row, mass, ids in zip(run.logits, run.label_mass, sequences(), strict=True):
        with torch.inference_mode():
            every = model(torch.from_numpy(ids[None])).logits[0, -1]
        chosen = list(scorer.label_ids)
        np.testing.assert_allclose(row, every[chosen].numpy(), atol=1e-6)
        assert mass == pytest.approx(float(every.softmax(0)[chosen].sum()), rel=1e-5)
        softmax = torch.from_numpy(row).softmax(0)
        np.testing.assert_allclose(softmax * mass, every.softmax(0)[chosen], atol=1e-6)


def test_classifiers_have_no_label_mass(llama_checkpoint):
    assert run_reference(Checkpoint(llama_checkpoint), [ids % 90 for ids in sequences(2)]).label_mass is None


def test_a_head_that_is_stored_is_the_head(language_model, tmp_path):
    """A merged LoRA on lm_head: the config still says tied, the file holds a head of its own. transformers takes the file's."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(language_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * -2 + 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    scorer = TokenScorer(Checkpoint(folder), DIGITS)
    model = load_reference(scorer)
    np.testing.assert_array_equal(scorer.tensor("score.weight"), model.lm_head.weight[list(scorer.label_ids)].detach())
    assert not np.array_equal(
        scorer.tensor("score.weight"), model.model.embed_tokens.weight[list(scorer.label_ids)].detach()
    )


def test_the_graph_of_an_untied_model(tmp_path, language_model):
    from samescore.calibrate.stages import read_model
    from samescore.runtime.prefill import logits_of
    from samescore.runtime.session import Session

    from ..conftest import tiny_language_model

    scorer = TokenScorer(Checkpoint(tiny_language_model(tmp_path / "untied", tie_word_embeddings=False)), DIGITS)
    (tmp_path / "graph").mkdir()
    build_graph(scorer, variant_spec("cpu-fp32").recipe, tmp_path / "graph")
    session = Session(read_model(tmp_path / "graph"), "cpu", intra_op_threads=1)
    for row, ids in zip(reference_logits(scorer, sequences()), sequences(), strict=True):
        np.testing.assert_allclose(logits_of(session, ids), row, atol=5e-6)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_weights_are_an_error(language_model, tmp_path, name):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(language_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}: transformers would fill them with random numbers"):
        run_reference(TokenScorer(Checkpoint(folder), DIGITS), sequences(1))


def tiny_multimodal(folder):
    """A random Qwen3.5 with a vision tower, and its logits' own class."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
    text = {
        "vocab_size": 800,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {**rope, "mrope_interleaved": True},
        "tie_word_embeddings": True,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    torch.manual_seed(1)
    model = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "A_log" not in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")
def test_a_multimodal_checkpoint_is_read_through_its_text_model(language_model, tmp_path):
    """Bit for bit the multimodal class's logits, with the vision tower's weights or without; the text model's must be there."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "qwen"
    shutil.copytree(language_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = tiny_multimodal(folder)
    scorer = TokenScorer(Checkpoint(folder), DIGITS)
    ids = sequences(3)
    run = run_reference(scorer, ids)
    with torch.inference_mode():
        for row, sequence in zip(run.logits, ids, strict=True):
            every = model(input_ids=torch.from_numpy(sequence[None]), logits_to_keep=1).logits[0, -1]
            np.testing.assert_array_equal(row, every[list(scorer.label_ids)].numpy())
    tensors = load_file(folder / "model.safetensors")
    text = {name: tensor for name, tensor in tensors.items() if "visual" not in name}
    assert len(text) < len(tensors)
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(reference_logits(TokenScorer(Checkpoint(folder), DIGITS), ids), run.logits)
    lost = {name: tensor for name, tensor in text.items() if not name.endswith("layers.2.mlp.down_proj.weight")}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.mlp\.down_proj\.weight"):
        reference_logits(TokenScorer(Checkpoint(folder), DIGITS), ids)


def test_a_low_mass_is_worth_a_warning():
    assert mass_warning(None, DIGITS) is None and mass_warning(0.5, DIGITS) is None
    assert "only 12.00% of its next token's probability" in mass_warning(0.12, ("Yes", "No"))
    assert "'Yes', 'No'" in mass_warning(0.0, ("Yes", "No"))
