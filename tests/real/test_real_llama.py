"""Real trained weights of Llama's architecture against PyTorch and PEFT: SmolLM2-135M with classifiers that `make assets` trains.

The weights are 4-bit values in float32 tensors (no other form of them is packaged); the architecture, the tokenizers and the
outlier channels are the originals'.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from samescore import export_bundle, load
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import contract_for, profile_named
from samescore.runtime.contract import text_of_record
from samescore.runtime.tokenizer import TextEncoder

pytest.importorskip("torch")
ASSETS = Path(__file__).parent.parent.parent / ".cache" / "assets"
SHORT, LONG = 160, 3
VARIANTS = ["cpu-fp32", "cpu-int8", "migraphx-fp16"]

pytestmark = [pytest.mark.real, pytest.mark.torch]


def asset(name):
    if not (ASSETS / name).exists():
        pytest.skip(f"{name} is not built: run `make assets`")
    return ASSETS / name


def records(name):
    lines = asset(name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def encoder_of(folder, profile):
    checkpoint = Checkpoint(folder)
    return TextEncoder(checkpoint.tokenizer_bytes(), contract_for(checkpoint, profile_named(profile)))


def golden_file(path, name, encoder, short, long):
    """Every few short texts and the longest few, so that a run takes a minute or two."""
    lengths = [(len(encoder.encode(record.get("text", record)).input_ids), record) for record in records(name)]
    few = [record for tokens, record in lengths if tokens <= 150]
    most = sorted(lengths, key=lambda pair: -pair[0])[:long]
    chosen = few[:: max(1, len(few) // short)][:short] + [record for _, record in most]
    path.write_text("".join(json.dumps(record) + "\n" for record in chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusal")
    checkpoint = asset("smollm2-refusal")
    golden = golden_file(folder / "golden.jsonl", "llama-texts.jsonl", encoder_of(checkpoint, "realigned"), SHORT, LONG)
    return export_bundle(
        checkpoint, folder / "bundle", profile="realigned", variants=VARIANTS, golden=golden, allow_drift=True
    )


@pytest.fixture(scope="module")
def era(tmp_path_factory):
    folder = tmp_path_factory.mktemp("era")
    (adapter,) = asset("smollm2-era-lora").glob("checkpoint-*")
    encoder = encoder_of(asset("smollm2-base"), "news-bias")
    golden = golden_file(folder / "golden.jsonl", "articles.jsonl", encoder, 60, 1)
    return export_bundle(
        asset("smollm2-era-lora"),
        folder / "bundle",
        profile="news-bias",
        adapter_subfolder=adapter.name,
        base=asset("smollm2-base"),
        variants=["cpu-fp32"],
        golden=golden,
    )


def test_fp32_is_pytorch(refusal):
    drift = refusal.certificate.variants["cpu-fp32"].drift
    assert drift.texts >= 150
    assert drift.max_abs_dp <= 5e-5 and drift.agreement == 1


def test_fp16_is_far_more_exact_than_bfloat16(refusal):
    """Its p99 is just outside the fp16 gate (1e-3) on this classifier, whose bfloat16 run has 2.8e-2."""
    drift = refusal.certificate.variants["migraphx-fp16"].drift
    assert drift.noise_ratio <= 0.15 and drift.max_abs_dp <= 5e-3
    assert not drift.not_finite


def test_int8_is_not_much_noisier_than_bfloat16(refusal):
    """This classifier's own bfloat16 run is outside the int8 gate, so the gate says nothing here: a broken recipe shows."""
    parity = refusal.certificate.variants["cpu-int8"]
    assert parity.drift.noise_ratio <= 4
    assert parity.drift.agreement >= 0.95
    assert parity.invariance.neighbours <= 1e-5 and parity.invariance.prefix <= 1e-5
    assert parity.invariance.workers <= 1e-5


def test_an_adapter_scores_as_peft_does(era):
    """Adapter on, not merged; the export itself has held it against its gate."""
    parity = era.certificate.variants["cpu-fp32"]
    assert parity.verdict.passed and parity.drift.max_abs_dp <= 5e-5
    # An adapter names no labels; the profile does.
    assert era.manifest.labels == ("Left", "Center", "Right")
    assert era.manifest.source.base.name == "smollm2-base"


@pytest.mark.parametrize("variant", ["cpu-fp32", "cpu-int8"])
def test_a_shared_prompt_changes_nothing(refusal, variant):
    classifier = load(refusal.path, variant=variant)
    prompt = "Summarise the message to Congress, and say what you would add. " * 30
    responses = [record["response"] for record in records("llama-texts.jsonl")[:6]]
    together = classifier.score(prompt, responses)
    alone = [classifier({"prompt": prompt, "response": response}) for response in responses]
    difference = np.abs(np.array([p.logits for p in together]) - np.array([p.logits for p in alone]))
    assert difference.max() <= 2e-5


@pytest.mark.parametrize("tokenizer", ["smollm2-refusal", "llama3-tokenizer"])
def test_token_ids_are_those_of_transformers(tokenizer, tmp_path):
    """On every text without control tokens; Llama 3's beginning-of-text token comes once."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(asset(tokenizer))
    contract = contract_for(Checkpoint(asset("smollm2-refusal")), profile_named("realigned"))
    encoder = TextEncoder((asset(tokenizer) / "tokenizer.json").read_bytes(), contract)
    special = [token.content for token in reference.added_tokens_decoder.values()]
    count = 0
    for record in records("llama-texts.jsonl"):
        text = text_of_record(record, contract)
        if any(token in text for token in special):
            continue
        expected = reference(text, truncation=True, max_length=contract.max_tokens)["input_ids"]
        assert encoder.encode(text).input_ids.tolist() == expected
        if tokenizer == "llama3-tokenizer":
            assert expected.count(128000) == 1
        count += 1
    assert count >= 1000
