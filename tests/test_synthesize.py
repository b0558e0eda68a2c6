"""benchmarks/synthesize.py writes what transformers and PEFT read: no key missing, none left over."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from .conftest import train_tokenizer

torch = pytest.importorskip("torch")
# PEFT reads an attribute that transformers renamed.
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")]

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "synthesize.py"


@pytest.fixture(scope="module")
def synthesize():
    spec = importlib.util.spec_from_file_location("synthesize", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return folder


def tiny(synthesize):
    return synthesize.Shape(layers=3, hidden=128, vocabulary=512)


def logits_of(model):
    random = np.random.default_rng(3)
    with torch.inference_mode():
        rows = [model(torch.from_numpy(random.integers(5, 500, (1, length)))).logits for length in range(4, 36)]
    return torch.cat(rows).float().numpy()


def test_the_classifier_loads_and_varies_with_the_text(synthesize, tokenizer, tmp_path):
    from transformers import LlamaForSequenceClassification

    synthesize.write_realigned(tmp_path, tiny(synthesize), 0, tokenizer, shard_bytes=400_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files) and len(files) >= 3
    model, info = LlamaForSequenceClassification.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model.config.id2label == {0: "China-biased", 1: "Western-biased"}
    assert logits_of(model.float()).std(axis=0).min() > 0.5


def test_peft_reads_the_adapter(synthesize, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.numpy import load_file
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    synthesize.write_news_bias(tmp_path, tiny(synthesize), 0, tokenizer)
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info.values())
    adapter = tmp_path / "adapter" / "checkpoint-4506"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = LlamaForSequenceClassification.from_pretrained(named, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = 0
    written = load_file(adapter / "adapter_model.safetensors")
    model = peft.PeftModel.from_pretrained(base, adapter)
    held = peft.get_peft_model_state_dict(model)
    assert set(held) == set(written)
    assert all(np.array_equal(held[name].numpy(), written[name]) for name in written)
    adapted = logits_of(model)
    with model.disable_adapter():
        assert np.abs(logits_of(model) - adapted).max() > 0.05


def test_what_peft_writes_has_the_same_names(synthesize, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.numpy import load_file
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = tiny(synthesize)
    config = synthesize.model_config(shape, ("a", "b", "c"))
    model = LlamaForSequenceClassification(LlamaConfig(**config))
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=synthesize.RANK, target_modules=list(synthesize.ADAPTED), modules_to_save=["score"]
    )
    peft.get_peft_model(model, lora).save_pretrained(tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: value.shape for name, value in written.items()} == shape.adapter(3)
    known = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(synthesize.adapter_config(tmp_path)) <= set(known)


def tiny_qwen(synthesize, **changed):
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 64, "linear_key_heads": 2, "linear_value_heads": 4}
    small = {"layers": 4, "hidden": 128, "ffn": 192, "linear_head_dim": 32, "vocabulary": 512, "vision_hidden": 16}
    return synthesize.QwenShape(**{**sizes, **small, **changed})


@pytest.mark.parametrize("tied", [True, False])
def test_the_multimodal_model_loads_and_varies_with_the_text(synthesize, tokenizer, tmp_path, tied):
    from transformers import AutoModelForImageTextToText

    synthesize.write_qwen(tmp_path, tiny_qwen(synthesize, tied=tied), 0, tokenizer, shard_bytes=400_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    random = np.random.default_rng(3)
    model.float()
    with torch.inference_mode():
        ids = [torch.from_numpy(random.integers(5, 500, (1, length))) for length in range(4, 36)]
        rows = torch.cat([model(input_ids=row, logits_to_keep=1).logits[:, -1, 15:20] for row in ids])
        probabilities = rows.softmax(dim=1)
    assert probabilities.std(dim=0).min() > 0.01
    assert probabilities.max(dim=1).values.median() < 0.95


def test_an_exporter_finds_the_text_model_alone(synthesize, tokenizer, tmp_path):
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.scorer import SCORE, TokenScorer

    shape = tiny_qwen(synthesize)
    synthesize.write_qwen(tmp_path, shape, 0, tokenizer)
    read = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    words = [token[1:] for token in sorted(read.get_vocab()) if token[0] == "▁" and len(token) > 1]
    labels = [word for word in words if len(read.encode(word, add_special_tokens=False).ids) == 1][:3]
    scorer = TokenScorer(Checkpoint(tmp_path), labels)
    prefix = synthesize.LANGUAGE
    wanted = {"model." + name.removeprefix(prefix) for name in shape.tensors() if name.startswith(prefix)}
    assert set(scorer.names()) == {*wanted, SCORE}
    # The outlier channels of the embedding and of the second layer.
    embedding = np.abs(scorer.tensor("model.embed_tokens.weight")).mean(axis=0)
    massive = synthesize.channels(synthesize.MASSIVE, shape.hidden)
    assert embedding[massive].min() > 2 * np.median(embedding)
    written = np.abs(scorer.tensor("model.layers.1.mlp.down_proj.weight")).mean(axis=1)
    assert written[massive].min() > 10 * np.median(written)


def test_states_are_forgotten_at_different_speeds(synthesize):
    shape = synthesize.QWEN_4B
    start = f"{synthesize.LANGUAGE}layers.0.linear_attn."
    heads = (shape.linear_value_heads,)
    rate, bias = (np.concatenate(list(synthesize.blocks(start + name, heads, 0))) for name in ("A_log", "dt_bias"))
    decay = np.exp(rate) * np.log1p(np.exp(bias))
    assert np.quantile(decay, 0.9) / np.quantile(decay, 0.1) > 10
    assert decay.min() > 0.001 and decay.max() < 20


def test_the_full_shapes_are_the_published_ones(synthesize):
    """Parameters of the text models, in millions."""
    for shape, millions in ((synthesize.QWEN_4B, 4206), (synthesize.QwenShape(), 752)):
        text = [size for name, size in shape.tensors().items() if name.startswith(synthesize.LANGUAGE)]
        assert round(sum(int(np.prod(size)) for size in text) / 1e6) == millions


def test_values_depend_on_name_and_seed_alone(synthesize):
    first, again = (np.concatenate(list(synthesize.blocks("x.weight", (70, 9), 1))) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, np.concatenate(list(synthesize.blocks("x.weight", (70, 9), 2))))
    assert not np.array_equal(first, np.concatenate(list(synthesize.blocks("y.weight", (70, 9), 1))))
