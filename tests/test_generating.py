"""Bundles that generate text: what they hold, what the export reads of a checkpoint, and what it refuses."""

import json
import shutil

import pytest

from samescore import export_bundle, export_generator, load
from samescore.cli import main
from samescore.export.checkpoint import Checkpoint
from samescore.export.generation import generation_of
from samescore.export.generator import Generator
from samescore.export.profiles import profile_named
from samescore.generation_gate import GenerationCertificate, GenerationParity
from samescore.runtime.bundle import Bundle
from samescore.runtime.errors import CheckpointError, GateError, UsageError

from .conftest import tiny_adapter, tiny_language_model, tiny_qwen3_5

pytestmark = pytest.mark.torch
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
SETTINGS = {
    "eos_token_id": [1, 7],
    "bos_token_id": 0,
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": None,
    "transformers_version": "5.0",
}


def edit(path, **changes):
    document = json.loads(path.read_text()) if path.is_file() else {}
    document |= changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


@pytest.fixture
def chat_model(language_model, tmp_path):
    """A copy of the tiny language model with a chat template and sampling defaults."""
    folder = shutil.copytree(language_model, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    (folder / "README.md").write_text("The source's card.")
    return folder


def facts(folder):
    return generation_of(Generator(Checkpoint(folder)), 64)


def test_a_bundle(chat_model, tmp_path, capsys):
    output = tmp_path / "bundle"
    arguments = ["export", str(chat_model), "-o", str(output), "--task", "generate", "--max-tokens", "256"]
    assert main([*arguments, "--variant", "cpu-int8", "--variant", "cpu-fp32"]) == 0
    said = capsys.readouterr()
    assert "cpu-int8       NOT MEASURED" in said.out and "not measured against PyTorch" in said.err
    with Bundle(output) as bundle:
        manifest, generation = bundle.manifest, bundle.manifest.generation
        bundle.verify_files()
        assert bundle.read(generation.chat_template).decode() == TEMPLATE
        parity = json.loads(bundle.read("parity.json"))
        card = bundle.read("README.md").decode()
    assert manifest.labels == () and manifest.label_tokens is None
    assert (generation.context, manifest.contract.max_tokens, manifest.contract.model_limit) == (256, 256, None)
    assert [variant.name for variant in manifest.variants] == ["cpu-int8", "cpu-fp32"]
    assert manifest.variants[0].recipe["smoothing"] == "from calibration texts"
    assert manifest.variants[0].max_tokens == 256
    assert manifest.variants[0].inputs[:2] == ("input_ids", "total_lengths")
    assert (generation.eos, generation.bos, generation.pad) == ((1, 7), 0, None)
    assert generation.defaults == {"do_sample": 1, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert generation.template_tokens == {"eos_token": "<|end|>"}
    nothing = {"outcome": "NOT MEASURED", "failures": [], "tolerance": None, "drift": None}
    assert parity["variants"] == dict.fromkeys(("cpu-int8", "cpu-fp32"), nothing)
    assert "not measured" in card and "passed" not in card
    assert (output / "SOURCE_CARD.md").read_text() == "The source's card."
    assert main(["inspect", str(output)]) == 0
    assert "generates   text, 256 tokens of context" in capsys.readouterr().out


def test_a_multimodal_checkpoint(tmp_path):
    folder = tiny_qwen3_5(tmp_path / "model", multimodal=True)
    edit(folder / "generation_config.json", eos_token_id=2)
    result = export_generator(folder, tmp_path / "bundle", variants=["cpu-fp32"])
    generation = result.manifest.generation
    assert generation.vocabulary == json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert generation.context == 2048 and generation.chat_template is None
    assert result.manifest.variants[0].recipe["smoothing"] == "none"


def test_a_failing_variant_is_not_written(chat_model, tmp_path, monkeypatch):
    failed = GenerationCertificate({}, {"cpu-fp32": GenerationParity("FAIL", ("mean KLD 2.0 > 0.1",))})
    monkeypatch.setattr("samescore.generating.measure_variants", lambda *_: (failed, None))
    with pytest.raises(GateError, match=r"cpu-fp32: mean KLD 2\.0 > 0\.1\. Nothing was written"):
        export_generator(chat_model, tmp_path / "out" / "bundle", variants=["cpu-fp32"])
    assert not list((tmp_path / "out").iterdir())
    result = export_generator(chat_model, tmp_path / "bundle", variants=["cpu-fp32"], allow_drift=True)
    assert "FAILED; mean KLD 2.0 > 0.1" in (result.path / "README.md").read_text()


def test_templates_of_the_tokenizer_config(chat_model):
    (chat_model / "chat_template.jinja").unlink()
    config = chat_model / "tokenizer_config.json"
    assert facts(chat_model).chat_template is None
    for stored in ("one", [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "one"}]):
        edit(config, chat_template=stored, bos_token={"content": "<|begin|>", "special": True}, pad_token=None)
        found = facts(chat_model)
        assert found.chat_template == "chat_template.jinja"
        assert found.template_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("generation", "model", "tokenizer", "expected"),
    [
        (3, [1, 4], "<|end|>", (3,)),
        (None, [4, 5], "<|end|>", (4, 5, 1)),
        (None, 1, "<|end|>", (1,)),
        (None, None, "<|end|>", (1,)),
        (None, 4, None, (4,)),
    ],
)
def test_tokens_that_end_a_text(chat_model, generation, model, tokenizer, expected):
    edit(chat_model / "generation_config.json", eos_token_id=generation)
    edit(chat_model / "config.json", eos_token_id=model)
    edit(chat_model / "tokenizer_config.json", eos_token=tokenizer)
    assert facts(chat_model).eos == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eos_token_id": 10**6}, r"eos_token_id is 1000000; its vocabulary has \d+ tokens"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be at least 0"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be above 0, at most 1"),
    ],
)
def test_a_generation_config_that_makes_no_sense(chat_model, changes, said):
    edit(chat_model / "generation_config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        facts(chat_model)


def test_no_end_is_an_error(chat_model):
    (chat_model / "generation_config.json").unlink()
    edit(chat_model / "config.json", eos_token_id=...)
    edit(chat_model / "tokenizer_config.json", eos_token=...)
    with pytest.raises(
        CheckpointError, match=r"names no token that ends a text: add eos_token_id to its generation_config"
    ):
        facts(chat_model)


def test_a_long_context_is_asked_for(tmp_path):
    folder = tiny_language_model(tmp_path / "long", max_position_embeddings=100_000)
    edit(folder / "tokenizer_config.json", model_max_length=100_000)
    for asked, context in ((None, 32768), (40_000, 40_000)):
        result = export_generator(folder, tmp_path / "bundle", variants=["cpu-fp32"], max_tokens=asked)
        assert result.manifest.generation.context == context
    with pytest.raises(UsageError, match="max_tokens must be from 1 to 100000"):
        export_generator(folder, tmp_path / "other", variants=["cpu-fp32"], max_tokens=100_001)


def test_the_profile(chat_model, tmp_path):
    facts = profile_named("civic-aligned")
    assert (facts.task, facts.contract.max_tokens, facts.available) == ("generate", 32768, True)
    result = export_generator(chat_model, tmp_path / "bundle", profile="civic-aligned", variants=["cpu-fp32"])
    assert result.manifest.profile == "civic-aligned" and result.manifest.generation.context == 2048
    with pytest.raises(UsageError, match="'civic-aligned' generates text: export it with --task generate"):
        export_bundle(chat_model, tmp_path / "other", profile="civic-aligned")
    with pytest.raises(UsageError, match="'refusal' is a classifier"):
        export_generator(chat_model, tmp_path / "other", profile="refusal")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label-tokens", "a,b"], "--label-tokens is for classifiers"),
        (["--budget", "p99=1e-3"], "'p99' is none of gate, kld"),
        (["--budget", "gate", "--recipe", "b"], "--recipe takes formats over, --budget searches for them"),
        (["--budget", "gate", "--variant", "cpu-fp32"], "quantizes nothing"),
        (["--golden-limit", "-3"], "--golden-limit must be 0 (measure nothing) or more"),
        (["--variant", "migraphx-fp16"], "unknown variant 'migraphx-fp16'; variants are cpu-int8, cpu-fp32, cpu-int4"),
    ],
)
def test_arguments_of_classifiers(chat_model, tmp_path, capsys, more, said):
    arguments = ["export", str(chat_model), "-o", str(tmp_path / "b"), "--profile", "civic-aligned"]
    assert main([*arguments, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_finer_formats_inside_a_budget(chat_model, tmp_path, capsys):
    """Searched once, taken over the second time; the manifest names them."""
    arguments = ["export", str(chat_model), "--profile", "civic-aligned", "--variant", "cpu-int8"]
    plain = export_generator(chat_model, tmp_path / "plain", variants=["cpu-int8"], budget="none")
    assert "parts" not in plain.manifest.variants[0].recipe
    assert main([*arguments, "-o", str(tmp_path / "a"), "--budget", "kld=6e-5"]) == 0
    assert " parts finer (" in capsys.readouterr().out
    assert main([*arguments, "-o", str(tmp_path / "b"), "--recipe", str(tmp_path / "a")]) == 0
    first, second = (Bundle(tmp_path / name).manifest.variants[0].recipe for name in "ab")
    assert first == second and "model.layers." in first["parts"]
    finer, again = (load(tmp_path / name).generate("a", max_tokens=3, temperature=0).token_ids for name in "ab")
    assert finer == again


def test_what_generates_nothing(bert_checkpoint, llama_base, tmp_path):
    with pytest.raises(
        UsageError, match=r"--task generate reads LlamaForCausalLM, .*is a BertForSequenceClassification"
    ):
        export_generator(bert_checkpoint, tmp_path / "b")
    adapter = tiny_adapter(llama_base, tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"--task generate reads a whole language model, but .* is an adapter"):
        export_generator(adapter, tmp_path / "b")
