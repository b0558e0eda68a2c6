"""LoRA adapters as PEFT writes them: the folded weights are PEFT's merged ones, the scores those of the adapter switched on."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from samescore import export_bundle, load, verify
from samescore.adapted import AdapterOptions
from samescore.calibrate.reference import load_reference, reference_logits
from samescore.calibrate.stages import read_model
from samescore.export import build
from samescore.export import checkpoint as checkpoint_module
from samescore.export.adapter import AdaptedCheckpoint, AdapterConfig, adapters_below, is_adapter
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import contract_for
from samescore.export.recipes import variant_spec
from samescore.exporting import open_source
from samescore.runtime.errors import CheckpointError, MissingDependencyError, UsageError
from samescore.runtime.manifest import BaseSource
from samescore.runtime.prefill import logits_of
from samescore.runtime.session import Session
from samescore.runtime.tokenizer import TextEncoder

from ..conftest import tiny_adapter, tiny_bert, tiny_llama_base, train_tokenizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.torch

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 7, "down_proj": 2, "^model.layers.0.self_attn.v_proj": 5},
        "alpha_pattern": {r".*\.0\.self_attn\.k_proj": 3, "q_proj": 5},
    },
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "whole-modules": {"modules_to_save": ["score", "embed_tokens", "norm"]},
}


@pytest.fixture(scope="module")
def plain(llama_base, tmp_path_factory):
    return tiny_adapter(llama_base, tmp_path_factory.mktemp("adapter") / "plain")


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of the plain adapter, to change."""
    return shutil.copytree(plain, tmp_path / "adapter")


def edit(folder, name="adapter_config.json", **values):
    path = folder / name
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | values))


def change_weights(folder, change):
    """Rewrite the adapter's tensors by a function from key and tensor to key and tensor, or None to drop it."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    pairs = [change(key, tensor) for key, tensor in load_file(path).items()]
    save_file(dict(pair for pair in pairs if pair is not None), path)


def adapted(base, folder, **kwargs):
    return AdaptedCheckpoint(Checkpoint(base), folder, **kwargs)


def merged_by_peft(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_reference(checkpoint).merge_and_unload()


def sequences(count=6):
    random = np.random.default_rng(5)
    return [random.integers(5, 90, size=length) for length in range(1, 1 + 4 * count, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_weights_and_scores_are_peft_s(kind, llama_base, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    checkpoint = adapted(llama_base, tiny_adapter(llama_base, tmp_path / "adapter", **KINDS[kind]))
    assert checkpoint.architecture == "LlamaForSequenceClassification" and checkpoint.model_type == "llama"
    merged = merged_by_peft(checkpoint).state_dict()
    assert set(checkpoint.names()) == set(merged)
    for name, expected in merged.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        np.testing.assert_allclose(checkpoint.tensor(name), expected.numpy(), rtol=0, atol=1e-6)
    model = LlamaForSequenceClassification(LlamaConfig(**checkpoint.config)).eval()
    model.load_state_dict({name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names()})
    ids = sequences()
    with torch.inference_mode():
        logits = np.stack([model(input_ids=torch.from_numpy(text[None])).logits[0].numpy() for text in ids])
    expected = reference_logits(checkpoint, ids)
    assert expected.shape == (len(ids), 3) and np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_reference_has_the_adapter_on_and_not_merged(llama_base, plain):
    from peft.tuners.lora import LoraLayer

    model = load_reference(adapted(llama_base, plain))
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 4 and not any(layer.merged or layer.disable_adapters for layer in layers)
    assert not model.training


def test_the_reference_in_bfloat16(llama_base, plain):
    checkpoint = adapted(llama_base, plain)
    exact, rough = (reference_logits(checkpoint, sequences(), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rough).max() < 0.3


@pytest.mark.parametrize("kind", ["plain", "embedding", "all-linear"])
def test_rows_in_chunks_are_the_table(kind, llama_base, tmp_path, monkeypatch):
    checkpoint = adapted(llama_base, tiny_adapter(llama_base, tmp_path / "adapter", **KINDS[kind]))
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 32 * 4 * 7)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "score.weight"):
        chunks = list(checkpoint.row_chunks(name))
        assert all(len(chunk) <= 7 and chunk.dtype == np.float32 for chunk in chunks)
        np.testing.assert_allclose(np.concatenate(chunks), checkpoint.tensor(name), rtol=0, atol=1e-6)


def test_fan_in_fan_out(tmp_path):
    """GPT-2 stores its matrices [in, out]; its square projection shows a wrong transposition only in the numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    base = tmp_path / "base"
    vocabulary = train_tokenizer(base)
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(base)
    folder = tiny_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    checkpoint = adapted(base, folder)
    assert checkpoint.architecture == "GPT2ForSequenceClassification"
    for name, expected in merged_by_peft(checkpoint).state_dict().items():
        np.testing.assert_allclose(checkpoint.tensor(name), expected.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base_class", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_bases_with_and_without_a_head(base_class, tmp_path):
    import transformers

    base = tiny_bert(tmp_path / "base")
    if base_class != "BertForSequenceClassification":
        source = transformers.BertForSequenceClassification.from_pretrained(base)
        model = getattr(transformers, base_class)(source.config)
        getattr(model, "bert", model).load_state_dict(source.bert.state_dict(), strict=False)
        model.save_pretrained(base)
    saved = ["classifier", "pooler"] if base_class == "BertForMaskedLM" else ["classifier"]
    folder = tiny_adapter(base, tmp_path / "adapter", target_modules=["query", "dense"], modules_to_save=saved)
    checkpoint = adapted(base, folder)
    assert checkpoint.architecture == "BertForSequenceClassification"
    assert checkpoint.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    merged = merged_by_peft(checkpoint).state_dict()
    assert set(merged) <= set(checkpoint.names())
    for name, expected in merged.items():
        np.testing.assert_allclose(checkpoint.tensor(name), expected.numpy(), rtol=0, atol=1e-6)


def test_modules_to_save_as_peft_writes_them_and_as_older_ones_did(llama_base, plain, adapter):
    assert json.loads((plain / "adapter_config.json").read_text())["modules_to_save"][:1] == ["score"]
    edit(adapter, modules_to_save=["score", "classifier", "score"])
    expected = adapted(llama_base, plain)
    np.testing.assert_array_equal(adapted(llama_base, adapter).tensor("score.weight"), expected.tensor("score.weight"))
    reference = reference_logits(adapted(llama_base, adapter), sequences(2))
    np.testing.assert_array_equal(reference, reference_logits(expected, sequences(2)))
    change_weights(adapter, lambda key, value: (key.replace("score.", "score.modules_to_save.default."), value))
    np.testing.assert_array_equal(adapted(llama_base, adapter).tensor("score.weight"), expected.tensor("score.weight"))


def test_adapter_stored_in_half_precision(llama_base, plain, adapter):
    change_weights(adapter, lambda key, value: (key, value.bfloat16()))
    checkpoint = adapted(llama_base, adapter)
    for name, expected in merged_by_peft(checkpoint).state_dict().items():
        np.testing.assert_allclose(checkpoint.tensor(name), expected.numpy(), rtol=0, atol=1e-6)


def test_labels(llama_base, adapter, tmp_path):
    assert adapted(llama_base, adapter).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert any("names the labels" in note for note in adapted(llama_base, adapter).notes)
    base = shutil.copytree(llama_base, tmp_path / "base")
    edit(base, "config.json", id2label={"0": "x", "1": "y", "2": "z"})
    assert adapted(base, adapter).labels == ("x", "y", "z")
    edit(adapter, "config.json", id2label={"0": "Left", "1": "Center", "2": "Right"})
    assert adapted(base, adapter).labels == ("Left", "Center", "Right")
    assert len(adapted(base, adapter).notes) == 2
    edit(adapter, "config.json", id2label={"0": "Left", "1": "Right"})
    with pytest.raises(CheckpointError, match=r"2 labels \(Left, Right\) for a head of 3 rows \(score.weight\)"):
        adapted(base, adapter)


def test_the_activation_follows_the_head_and_the_adapter_s_config(llama_base, adapter, tmp_path):
    assert adapted(llama_base, adapter).activation == "softmax"
    assert adapted(llama_base, tiny_adapter(llama_base, tmp_path / "one", labels=1)).activation == "sigmoid"
    edit(adapter, "config.json", problem_type="multi_label_classification")
    assert adapted(llama_base, adapter).activation == "sigmoid"


def test_the_adapter_s_tokenizer_goes_first(llama_base, adapter):
    base = Checkpoint(llama_base)
    assert adapted(llama_base, adapter).tokenizer_bytes() == base.tokenizer_bytes()
    assert adapted(llama_base, adapter).max_tokens == 64
    (adapter / "tokenizer.json").write_bytes(base.tokenizer_bytes() + b"\n")
    edit(adapter, "tokenizer_config.json", model_max_length=40)
    checkpoint = adapted(llama_base, adapter)
    assert checkpoint.tokenizer_bytes() == base.tokenizer_bytes() + b"\n" and checkpoint.max_tokens == 40


def test_the_digest_is_of_base_and_adapter(llama_base, adapter, tmp_path):
    digests = {adapted(llama_base, adapter).sha256(), adapted(llama_base, adapter).sha256()}
    assert len(digests) == 1
    digests.add(adapted(tiny_llama_base(tmp_path / "other", rms_norm_eps=1e-3), adapter).sha256())
    edit(adapter, lora_alpha=17)
    digests.add(adapted(llama_base, adapter).sha256())
    change_weights(adapter, lambda key, value: (key, value * 2))
    digests.add(adapted(llama_base, adapter).sha256())
    assert len(digests) == 4


def test_notes_say_what_is_known_and_no_paths(llama_base, adapter):
    assert adapted(llama_base, adapter).notes[0] == "adapter_config.json names the base base and no revision of it"
    edit(adapter, base_model_name_or_path="meta-llama/Llama-3.2-1B", revision="a" * 40)
    first, second, *_ = adapted(llama_base, adapter).notes
    assert (
        "meta-llama/Llama-3.2-1B and revision aaaa" in first
        and "does not record whether its base was quantized" in second
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "adapter of type IA3; samescore folds LORA only"),
        ({"use_dora": True}, r"uses DoRA \(use_dora\).*merge_and_unload"),
        ({"lora_bias": True}, r"a bias in lora_B \(lora_bias\)"),
        ({"bias": "lora_only"}, r"trained biases too \(bias='lora_only'\)"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"layer_replication": [[0, 1]]}, "replicated layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's weights"),
        ({"task_type": "TOKEN_CLS"}, r"adapter for TOKEN_CLS; .*\(SEQ_CLS\)"),
        ({"r": 0}, "must be numbers"),
        ({"rank_pattern": {"q_proj": "8"}}, "must be numbers"),
    ],
)
def test_other_adapters_are_refused_by_name(values, said, adapter):
    edit(adapter, **values)
    with pytest.raises(CheckpointError, match=said):
        AdapterConfig.read(adapter)


def test_dora_as_peft_writes_it(llama_base, tmp_path):
    folder = tiny_adapter(llama_base, tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match="DoRA"):
        adapted(llama_base, folder)
    edit(folder, use_dora=False)
    with pytest.raises(CheckpointError, match=r"lora_magnitude_vector.* is of no LoRA"):
        adapted(llama_base, folder)


def test_no_head_no_random_head(llama_base, adapter, bert_checkpoint, tmp_path):
    change_weights(adapter, lambda key, value: None if "score" in key else (key, value))
    with pytest.raises(
        CheckpointError, match=r"no trained head \(score.weight or classifier.weight\).*modules_to_save"
    ):
        adapted(llama_base, adapter)
    # A base that is a classifier already brings its own.
    folder = tiny_adapter(bert_checkpoint, tmp_path / "b", 2, target_modules=["query"], modules_to_save=["classifier"])
    change_weights(folder, lambda key, value: None if "classifier" in key else (key, value))
    assert adapted(bert_checkpoint, folder).labels == ("Non-refusal", "Refusal")


def test_keys_that_belong_nowhere(llama_base, adapter):
    change_weights(adapter, lambda key, value: (key.replace("layers.1", "layers.7"), value))
    with pytest.raises(
        CheckpointError, match=r"layers\.7\.self_attn.* belong to no tensor of the base .*LlamaForCausalLM"
    ):
        adapted(llama_base, adapter)


def test_a_whole_tensor_that_belongs_nowhere(llama_base, adapter):
    change_weights(adapter, lambda key, value: (key, value))
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.extra.weight": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"base_model\.model\.extra\.weight belong to no tensor"):
        adapted(llama_base, adapter)


def test_half_a_pair(llama_base, adapter):
    change_weights(adapter, lambda key, value: None if "layers.1.self_attn.q_proj.lora_B" in key else (key, value))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj has only one of lora_A and lora_B"):
        adapted(llama_base, adapter)


def test_shapes_that_do_not_fit(llama_base, plain, adapter, tmp_path):
    other = tiny_llama_base(tmp_path / "other", hidden_size=16)
    with pytest.raises(CheckpointError, match=r"do not fit the base's \[16, 16\].*--base"):
        adapted(other, plain)
    edit(adapter, r=5)
    with pytest.raises(CheckpointError, match=r"with r = 5 do not fit"):
        adapted(llama_base, adapter)


def test_a_resized_vocabulary(llama_base, tmp_path):
    folder = tiny_adapter(llama_base, tmp_path / "adapter", modules_to_save=["score", "embed_tokens"])
    change_weights(folder, lambda key, value: (key, torch.cat([value, value[:1]]) if "embed" in key else value))
    with pytest.raises(CheckpointError, match="resized vocabulary"):
        adapted(llama_base, folder)


def test_a_quantized_base(llama_base, adapter, tmp_path):
    base = shutil.copytree(llama_base, tmp_path / "base")
    edit(base, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    edit(adapter, base_model_name_or_path="unsloth/llama-3.2-1b-unsloth-bnb-4bit")
    with pytest.raises(
        CheckpointError, match=r"quantized \(bitsandbytes\).*by its name, unsloth/llama-3\.2-1b\): --base"
    ):
        adapted(base, adapter)


def test_pickles_and_missing_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but no adapter_model\.safetensors"):
        AdapterConfig.read(adapter)
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"as a pickle \(adapter_model\.bin\).*safe_serialization=True"):
        AdapterConfig.read(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter: it holds no adapter_config\.json"):
        AdapterConfig.read(adapter)


def test_an_adapter_is_no_base(llama_base, plain):
    with pytest.raises(CheckpointError, match="is itself an adapter"):
        AdaptedCheckpoint(adapted(llama_base, plain), plain)


def test_what_is_an_adapter(llama_base, plain, bert_checkpoint, tmp_path):
    assert is_adapter(plain) and not is_adapter(llama_base) and not is_adapter(tmp_path / "nowhere")
    merged = shutil.copytree(bert_checkpoint, tmp_path / "merged")
    (merged / "adapter_config.json").write_text("{}")
    assert not is_adapter(merged)
    run = tmp_path / "run"
    for name in ("checkpoint-1000", "checkpoint-500"):
        shutil.copytree(plain, run / name)
    assert adapters_below(run) == ["checkpoint-500", "checkpoint-1000"] and adapters_below(tmp_path / "nowhere") == []


def test_the_reference_needs_peft(llama_base, plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"peft: pip install 'samescore\[calibrate\]'"):
        load_reference(adapted(llama_base, plain))


def test_the_reference_refuses_what_would_be_random(llama_base, plain, tmp_path):
    from safetensors.torch import load_file, save_file

    base = shutil.copytree(llama_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight: transformers would fill"):
        load_reference(adapted(base, plain))


def opened(source, **options):
    return open_source(source, profile=None, revision=None, adapter=AdapterOptions(**options), progress=False)


def test_an_adapter_folder_and_the_base_it_names(llama_base, adapter):
    source, checkpoint, facts = opened(adapter)
    assert isinstance(checkpoint, AdaptedCheckpoint) and facts is None
    assert (source.kind, source.name, source.sha256) == ("folder", "adapter", checkpoint.sha256())
    assert source.base == BaseSource("folder", "base", None, Checkpoint(llama_base).sha256())
    assert source.notes == checkpoint.notes


def test_relative_bases(llama_base, tmp_path, monkeypatch):
    """PEFT writes the base as it was given to transformers."""
    shutil.copytree(llama_base, tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path / "models")
    folder = tiny_adapter("base", tmp_path / "models" / "run")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert opened(folder)[0].base.name == "base"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"'base', which is neither a folder here nor a hub id.*--base FOLDER or HUB_ID"
    ):
        opened(folder)
    assert opened(folder, base="models/base")[0].base.name == "base"
    edit(folder, base_model_name_or_path="../base")
    assert opened(folder)[0].base.name == "base"


def test_adapters_in_subfolders(llama_base, plain, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-1000", "checkpoint-500"):
        shutil.copytree(plain, run / name)
    assert opened(run, subfolder="checkpoint-500/")[0].name == "run/checkpoint-500"
    with pytest.raises(
        UsageError, match="adapters in checkpoint-500, checkpoint-1000: name one with --adapter-subfolder"
    ):
        opened(run)
    with pytest.raises(UsageError, match=r"checkpoint-7 holds no adapter_config\.json; .* in checkpoint-500"):
        opened(run, subfolder="checkpoint-7")


def test_what_is_no_adapter_takes_no_base(bert_checkpoint, llama_base, plain, adapter):
    with pytest.raises(UsageError, match="is no adapter"):
        opened(bert_checkpoint, base=llama_base)
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json"):
        opened("refusal-tiny", subfolder="checkpoint-1")
    with pytest.raises(CheckpointError, match="is itself an adapter"):
        opened(adapter, base=plain)
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(UsageError, match="names no base"):
        opened(adapter)


def test_without_a_graph_an_adapter_is_not_traced(adapter, tmp_path, monkeypatch):
    """Tracing would read the base's folder alone."""
    monkeypatch.setattr(build, "architecture_of", lambda checkpoint: None)
    with pytest.raises(
        CheckpointError, match="LlamaForSequenceClassification, which has no hand-built graph. Merge it"
    ):
        export_bundle(adapter, tmp_path / "bundle", variants=["cpu-fp32"])
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def bert_adapter(bert_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert-adapter") / "run" / "checkpoint-9"
    targets = ["query", "value", "word_embeddings", "intermediate.dense"]
    tiny_adapter(bert_checkpoint, folder, 3, target_modules=targets, modules_to_save=["classifier"], use_rslora=True)
    edit(folder, "config.json", id2label={"0": "Left", "1": "Center", "2": "Right"})
    (folder / "README.md").write_text("# The adapter's card")
    return folder


def samescore(*arguments):
    command = [sys.executable, "-m", "samescore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_an_adapter_from_end_to_end(bert_checkpoint, bert_adapter, texts_files, tmp_path):
    bundle = tmp_path / "bundle"
    options = ["--adapter-subfolder", "checkpoint-9", "--base", bert_checkpoint, "--golden", texts_files[0]]
    options += ["--calibration", texts_files[1], "--variant", "cpu-fp32", "--tokenization-texts", "500"]
    done = samescore("export", bert_adapter.parent, "-o", bundle, *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert manifest["source"]["name"] == "run/checkpoint-9" and manifest["labels"] == ["Left", "Center", "Right"]
    assert manifest["source"]["base"]["sha256"] == Checkpoint(bert_checkpoint).sha256()
    parity = json.loads((bundle / "parity.json").read_text())
    assert all(variant["verdict"]["outcome"] == "PASS" for variant in parity["variants"].values())
    assert parity["variants"]["cpu-fp32"]["drift"]["max_abs_dp"] < 1e-5
    card = (bundle / "README.md").read_text()
    assert "folder `run/checkpoint-9`" in card and "LoRA adapter on the base\nfolder `checkpoint`" in card
    assert "does not record whether its base was quantized" in card and str(tmp_path) not in card
    assert (bundle / "SOURCE_CARD.md").read_text() == "# The adapter's card"
    said = samescore("inspect", bundle).stdout
    assert "source      folder run/checkpoint-9\nbase        folder checkpoint\nnote        adapter_config" in said


def test_a_bundle_of_an_adapter_is_verified_against_the_adapter(bert_checkpoint, bert_adapter, texts_files, tmp_path):
    bundle = tmp_path / "bundle"
    export_bundle(bert_adapter, bundle, variants=["cpu-fp32"], golden=texts_files[0])
    for base in (None, bert_checkpoint):
        result = verify(bundle, reference=bert_adapter, base=base)
        assert result.passed and result.note is None
    with pytest.raises(UsageError, match="name the adapter with --reference"):
        verify(bundle, base=bert_checkpoint)
    checkpoint = adapted(bert_checkpoint, bert_adapter)
    encoder = TextEncoder(checkpoint.tokenizer_bytes(), contract_for(checkpoint, None))
    expected = reference_logits(checkpoint, [encoder.encode("the model refuses").input_ids])[0]
    np.testing.assert_allclose(load(bundle)("the model refuses").logits, expected, atol=1e-5)


def test_a_merged_checkpoint_that_kept_its_adapter_config_is_no_reference(bert_checkpoint, bert_adapter, tmp_path):
    merged = shutil.copytree(bert_checkpoint, tmp_path / "merged")
    shutil.copy(bert_adapter / "adapter_config.json", merged)
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json that belongs to no adapter there: copy the folder"
    ):
        reference_logits(Checkpoint(merged), sequences(1))


def test_a_llama_adapter_s_graph_scores_as_peft(llama_base, plain, tmp_path):
    """PEFT with the adapter on, against the graph of the folded tensors."""
    checkpoint = adapted(llama_base, plain)
    build_graph(checkpoint, variant_spec("cpu-fp32").recipe, tmp_path)
    session = Session(read_model(tmp_path), "cpu", intra_op_threads=1)
    ids = sequences(4)
    for row, sequence in zip(reference_logits(checkpoint, ids), ids, strict=True):
        np.testing.assert_allclose(logits_of(session, sequence), row, atol=1e-4)
