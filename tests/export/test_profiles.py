"""Profiles: what their names stand for, and the texts that ship for them."""

import json
import shutil

import pytest

import samescore.sources as sources
from samescore.calibrate.golden import read_golden, text_digests
from samescore.export.checkpoint import Checkpoint
from samescore.export.profiles import PROFILES, contract_for, labels_for, profile_named
from samescore.packaged import packaged
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import CheckpointError, UsageError
from samescore.sources import open_source


@pytest.mark.parametrize("profile", [p for p in PROFILES if p.available], ids=lambda p: p.name)
def test_texts_ship_and_fit_the_contract(profile):
    golden = read_golden(packaged(profile, "golden"))
    calibration = read_golden(packaged(profile, "calibration"))
    assert len(golden.texts) >= 60 and len(calibration.texts) >= 20
    rendered = [text_of_record(text.record, profile.contract) for text in golden.texts]
    assert max(map(len, rendered)) > 1000 and len(set(rendered)) == len(rendered)
    assert not text_digests(golden, profile.contract) & text_digests(calibration, profile.contract)


def test_realigned_is_the_card_s_string():
    contract = profile_named("realigned").contract
    card = "PROMPT: What happened at Tiananmen Square?\nRESPONSE: I cannot discuss this topic.\n"
    pair = {"prompt": "What happened at Tiananmen Square?", "response": "I cannot discuss this topic."}
    assert text_of_record(pair, contract) == card
    assert contract.max_tokens == 2048 and contract.truncation == "right"


def test_political_leaning_is_the_card_s_prompt():
    """Character by character, with the space at the end: the next token is a bare digit."""
    profile = profile_named("political-leaning")
    lines = [
        "You are an expert media bias analyst. Read the following news article and "
        "classify its political leaning on a 0-4 scale.",
        "",
        "Article:",
        "{text}",
        "",
        "Scale:",
        "class 0: extremely left (far left)",
        "class 1: lean left",
        "class 2: center / neutral",
        "class 3: lean right",
        "class 4: extremely right (far right)",
        "",
        "SOLUTION",
        "The correct answer is: class ",
    ]
    assert profile.contract.template == "\n".join(lines)
    assert profile.contract.max_tokens == 8192 and profile.label_tokens == ("0", "1", "2", "3", "4")


def test_limits_follow_the_checkpoint(llama_checkpoint):
    checkpoint, profile = Checkpoint(llama_checkpoint), profile_named("news-bias")
    assert contract_for(checkpoint, profile).max_tokens == 2048  # the tiny model's positions, below the profile's 8192
    assert contract_for(checkpoint, profile, 100).max_tokens == 100
    assert contract_for(checkpoint, None).model_limit == 2048
    with pytest.raises(UsageError, match="from 1 to 2048"):
        contract_for(checkpoint, profile, 4096)


def test_labels_that_a_checkpoint_only_numbers(llama_checkpoint, tmp_path):
    profile = profile_named("realigned")
    assert labels_for(Checkpoint(llama_checkpoint), None) == ("China-biased", "Western-biased")
    numbered = shutil.copytree(llama_checkpoint, tmp_path / "numbered")
    config = json.loads((numbered / "config.json").read_text())
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    (numbered / "config.json").write_text(json.dumps(config))
    assert labels_for(Checkpoint(numbered), profile) == profile.labels
    assert labels_for(Checkpoint(numbered), profile_named("news-bias")) == (
        "LABEL_0",
        "LABEL_1",
    )  # three do not fit two


def test_news_bias_is_an_adapter_in_a_subfolder(monkeypatch):
    asked = {}

    def fetch(name, revision, **options):
        asked.update(name=name, **options)
        raise CheckpointError("no network")

    monkeypatch.setattr(sources, "fetch", fetch)
    with pytest.raises(CheckpointError, match="no network"):
        open_source("news-bias", profile=None, revision=None, progress=False)
    assert asked["name"] == "tzoulio/news-bias-finder-llama-3.2-1B" and asked["subfolder"] == "checkpoint-4506"
