"""From a language model to a scored classifier: export, score, verify, inspect, files."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from samescore import export_bundle, load, verify
from samescore.calibrate.golden import read_golden
from samescore.cli import main
from samescore.runtime import Bundle, CheckpointError, UsageError
from samescore.runtime.manifest import LabelToken

from .conftest import label_tokens, tiny_adapter, tiny_llama_base

pytestmark = pytest.mark.torch

DIGITS = ["0", "1", "2", "3", "4"]


def test_what_the_manifest_says(scorer_bundle, language_model):
    from tokenizers import Tokenizer

    with Bundle(scorer_bundle) as bundle:
        manifest, tokenizer = bundle.manifest, bundle.read("tokenizer.json")
    ids = [Tokenizer.from_buffer(tokenizer).token_to_id(digit) for digit in DIGITS]
    assert manifest.label_tokens == tuple(map(LabelToken, ids, DIGITS))
    assert manifest.labels == tuple(DIGITS) and manifest.values == (0.0, 1.0, 2.0, 3.0, 4.0)
    assert manifest.architecture == "LlamaForCausalLM" and manifest.activation == "softmax"
    assert manifest.contract.kind == "instruction" and manifest.contract.max_tokens == 2048
    # The checkpoint's own tokenizer, not one that transformers wrote again.
    assert json.loads(tokenizer) == json.loads((language_model / "tokenizer.json").read_bytes())


def test_scores_are_transformers_own(scorer_bundle, language_model):
    """The card's pattern, line by line, and this bundle's fp32: from the article's string to probabilities."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    classifier = load(scorer_bundle, variant="cpu-fp32")
    template = classifier.manifest.contract.template
    digits = [tokenizer.encode(digit, add_special_tokens=False)[0] for digit in DIGITS]
    for article in ("bread", " {text} 我不能帮助你 \n", "here is a clear recipe for bread with flour water " * 30):
        inputs = tokenizer([template.replace("{text}", article.strip())], return_tensors="pt")
        with torch.inference_mode():
            last = model(**inputs, logits_to_keep=1).logits[:, -1, :]
        expected = last[:, digits].softmax(dim=-1)[0].numpy()
        prediction = classifier(article)
        np.testing.assert_allclose(list(prediction.probabilities.values()), expected, atol=1e-5)
        assert prediction.label == DIGITS[int(expected.argmax())]
        assert prediction.expected_value == pytest.approx(float(expected @ np.arange(5)), abs=1e-5)
        assert prediction.entropy == pytest.approx(-float((expected * np.log(expected)).sum()), abs=1e-5)
        assert 0 < prediction.entropy < math.log(5)


def test_the_certificate_measures_what_the_runtime_does(scorer_bundle):
    """The numbers in parity.json are those of the bundle's own scores, read behind the prompt that is read once."""
    parity = json.loads((scorer_bundle / "parity.json").read_text())
    golden = read_golden(scorer_bundle / "golden.jsonl.gz")
    for variant in ("cpu-fp32", "cpu-int8"):
        rows = load(scorer_bundle, variant=variant).score([text.record["text"] for text in golden.texts])
        worst = max(
            float(np.abs(np.float64(p.logits) - t.logits).max()) for p, t in zip(rows, golden.texts, strict=True)
        )
        assert parity["variants"][variant]["drift"]["max_abs_dlogit"] == worst
    fp32 = parity["variants"]["cpu-fp32"]
    assert fp32["verdict"]["outcome"] == "PASS" and fp32["invariance"]["workers"] == 0
    assert 0 < fp32["invariance"]["prefix"] < 1e-5 and fp32["invariance"]["neighbours"] < 1e-5


def test_the_label_mass_is_kept(scorer_bundle, language_model):
    golden = read_golden(scorer_bundle / "golden.jsonl.gz")
    parity = json.loads((scorer_bundle / "parity.json").read_text())
    assert parity["reference"] == dataclasses.asdict(golden.reference)
    mean, least = golden.reference.label_mass_mean, golden.reference.label_mass_min
    assert 0 < least < mean < 0.5
    assert golden.first(3).reference.label_mass_mean is None  # of other texts
    card = (scorer_bundle / "README.md").read_text()
    assert f"{mean:.4f} of the probability of the whole" in card and "**Warning:**" in card
    assert "`3` (id " in card and "The correct answer is: class \n```" in card and ".expected_value" in card


def test_verify_against_the_checkpoint(scorer_bundle, language_model, tmp_path):
    result = verify(scorer_bundle, reference=language_model, variant="cpu-fp32")
    assert result.passed and result.note is None
    assert result.certificate.reference.label_mass_mean == pytest.approx(
        read_golden(scorer_bundle / "golden.jsonl.gz").reference.label_mass_mean, rel=1e-6
    )
    other = shutil.copytree(language_model, tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"another tokenizer than the bundle: its label tokens are '0' = \d+"):
        verify(scorer_bundle, reference=other)


def test_verify_against_a_classifier_is_refused(scorer_bundle, llama_checkpoint, bert_bundle, language_model):
    with pytest.raises(UsageError, match="is one already: LlamaForSequenceClassification"):
        verify(scorer_bundle, reference=llama_checkpoint)
    with pytest.raises((UsageError, CheckpointError)):
        verify(bert_bundle, reference=language_model)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_line_from_end_to_end(language_model, article_files, tmp_path, capsys):
    """Words as labels, plain text: export, inspect, classify, verify."""
    output = tmp_path / "bundle"
    arguments = ["export", language_model, "-o", output, "--label-tokens", "b,s,m", "--variant", "cpu-fp32"]
    code, out, err = run(capsys, *arguments, "--golden", article_files[0])
    assert code == 0, err
    assert "label mass     mean 0.0" in out and "PASS" in out
    assert "samescore: warning: the model gives the labels 'b', 's', 'm' only" in err and "prompt may be broken" in err
    code, out, _ = run(capsys, "inspect", output)
    assert code == 0 and "labels      b, s, m (softmax)" in out and "tokens      'b' = " in out
    assert "label mass  mean 0.0" in out and "values" not in out
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "bread", "id": 1, "entropy": "mine"}\n{"text": "  "}\n')
    code, out, err = run(capsys, "classify", output, "-i", source, "--workers", "1")
    first, second = map(json.loads, out.splitlines())
    assert code == 3 and first["label"] in "bsm" and "expected_value" not in first
    assert first["input_entropy"] == "mine" and 0 < first["entropy"] < math.log(3)
    assert "the text is empty" in second["error"]
    code, out, _ = run(capsys, "verify", output, "--reference", language_model)
    assert code == 0 and "PASS" in out


def test_files_of_articles(scorer_bundle, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "bread"}\n{"prompt": "x", "response": "y"}\n{"text": " \\n bread "}\n')
    code, out, _ = run(capsys, "classify", scorer_bundle, "-i", source, "--variant", "cpu-fp32", "--workers", "1")
    first, second, third = map(json.loads, out.splitlines())
    assert code == 3 and "needs exactly one of `text`" in second["error"]
    assert first["expected_value"] == pytest.approx(sum(int(k) * p for k, p in first["probabilities"].items()))
    assert third["logits"] == first["logits"]
    code, out, _ = run(capsys, "inspect", scorer_bundle)
    assert "contract    instruction, 2048 tokens, cut article" in out and "values      0, 1, 2, 3, 4" in out
    code, out, _ = run(capsys, "verify", scorer_bundle, "--variant", "cpu-fp32")
    assert code == 0 and "PASS" in out


def test_a_limit_without_room_for_the_prompt(language_model, scorer_bundle, tmp_path):
    with pytest.raises(UsageError, match="max_tokens 40 leaves no room for an article"):
        export_bundle(language_model, tmp_path / "b", profile="political-leaning", max_tokens=40)
    with pytest.raises(UsageError, match="max_tokens 40 leaves no room for an article"):
        load(scorer_bundle, max_tokens=40)
    prediction = load(scorer_bundle, max_tokens=300)("bread and salt. " * 200)
    assert prediction.truncated and 295 <= prediction.tokens <= 300


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["Yes, of course", "0"], r"label 'Yes, of course' is \d+ tokens .*name another word"),
        (["0"], "label tokens must be at least two, got '0'"),
        (["0", "1", "0"], "labels '0' and '0' are the same token"),
        (["0", ""], "label '' is 0 tokens"),
    ],
)
def test_labels_that_are_not_one_token_each(language_model, tmp_path, labels, said):
    with pytest.raises(UsageError, match=said):
        export_bundle(language_model, tmp_path / "b", label_tokens=labels)
    assert not (tmp_path / "b").exists()


def test_a_language_model_without_label_tokens(language_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"a language model \(LlamaForCausalLM\).*--label-tokens Yes,No"):
        export_bundle(language_model, tmp_path / "b")


def test_a_classifier_with_label_tokens(bert_checkpoint, tmp_path):
    with pytest.raises(
        UsageError, match=r"is one already: BertFor.* labels Non-refusal, Refusal\. Leave --label-tokens away"
    ):
        export_bundle(bert_checkpoint, tmp_path / "b", label_tokens=DIGITS)


def test_an_adapter_with_label_tokens(tmp_path):
    adapter = tiny_adapter(tiny_llama_base(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"adapter is an adapter \(adapter_config\.json\)\. Merge it first: PeftModel"):
        export_bundle(adapter, tmp_path / "b", label_tokens=DIGITS)


def test_an_architecture_without_a_graph(language_model, tmp_path):
    folder = shutil.copytree(language_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UsageError, match=r"reads LlamaForCausalLM.*, but .* is a GPT2LMHeadModel: name a checkpoint"):
        export_bundle(folder, tmp_path / "b", label_tokens=DIGITS)


def test_values_are_the_labels_that_are_numbers(language_model):
    from samescore.export.checkpoint import Checkpoint
    from samescore.export.scorer import TokenScorer
    from samescore.scored import label_tokens_of, values_of

    assert values_of(TokenScorer(Checkpoint(language_model), ["4", "1"])) == (4.0, 1.0)
    for labels in (["1", "a"], ["1", "."]):
        assert values_of(TokenScorer(Checkpoint(language_model), labels)) is None
    assert values_of(Checkpoint(language_model)) is None and label_tokens_of(Checkpoint(language_model)) is None


def test_a_plain_variant_reads_up_to_its_limit(qwen3_5_checkpoint, tmp_path, texts_files):
    """Its delta rule has a fixed depth: what does not fit is an error before anything runs."""
    bundle = tmp_path / "bundle"
    result = export_bundle(
        qwen3_5_checkpoint,
        bundle,
        variants=["migraphx-fp16", "cpu-fp32"],
        label_tokens=label_tokens(qwen3_5_checkpoint),
        golden=texts_files[0],
        golden_limit=8,
        max_tokens=40,
        allow_drift=True,
    )
    assert [variant.max_tokens for variant in result.manifest.variants] == [40, None]
    long = "bread with flour " * 40
    assert load(bundle, variant="migraphx-fp16", provider="cpu")(long).tokens == 40
    with pytest.raises(UsageError, match="migraphx-fp16 was exported for texts of at most 40 tokens, not 64"):
        load(bundle, variant="migraphx-fp16", provider="cpu", max_tokens=64)
    assert load(bundle, variant="cpu-fp32", max_tokens=64)(long).tokens == 64
