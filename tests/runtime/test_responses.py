"""Prompt and response: the contract, shared prefixes, limits, and the bundle as a reward."""

import json
import math

import numpy as np
import pytest

from samescore.runtime import InputError, RewardFunction, UsageError, load
from samescore.runtime.contract import TextContract, render, text_of_record

CONTRACT = TextContract(
    "prompt-response", 2048, "right", "", template="PROMPT: {prompt}\nRESPONSE: {response}\n", model_limit=4096
)
PROMPT = "here is a clear recipe for bread with flour water salt and yeast mix it well " * 4
RESPONSES = ["sorry", "mix it well then bake it hot", "danke sehr " * 30, "我不能帮助你完成这个请求", "bread " * 9]


@pytest.fixture(scope="module", params=["cpu-fp32", "cpu-int8"])
def classifier(request, llama_bundle):
    return load(llama_bundle, variant=request.param)


def test_the_template_is_filled_literally():
    pair = {"prompt": "Who {response}?", "response": "A {prompt} \\n %s"}
    assert render(pair, CONTRACT) == "PROMPT: Who {response}?\nRESPONSE: A {prompt} \\n %s\n"
    assert text_of_record({**pair, "id": 1}, CONTRACT) == render(pair, CONTRACT)
    assert render({"prompt": "", "response": "x"}, CONTRACT) == "PROMPT: \nRESPONSE: x\n"
    assert text_of_record({"text": "as it is"}, CONTRACT) == "as it is"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "x"}, "needs exactly one of `text` or `prompt` and `response`; this one has: prompt"),
        ({"text": "x", "response": "y"}, "needs exactly one of"),
        ({"prompt": "x", "response": " \n"}, "the response is empty"),
        ({"prompt": 3, "response": "y"}, "`prompt` must be a string, got int"),
    ],
)
def test_bad_pairs(record, said):
    with pytest.raises(InputError, match=said):
        text_of_record(record, CONTRACT)


def test_limits_can_be_raised_to_the_model_and_no_further(llama_bundle):
    assert CONTRACT.with_max_tokens(None) == CONTRACT
    assert CONTRACT.with_max_tokens(4096).max_tokens == 4096
    for bad in (0, 4097):
        with pytest.raises(UsageError, match="from 1 to 4096"):
            CONTRACT.with_max_tokens(bad)
    text = {"prompt": "x", "response": "bread and salt " * 100}
    assert load(llama_bundle, max_tokens=50)(text).tokens == 50
    with pytest.raises(UsageError, match="from 1 to 2048"):
        load(llama_bundle, max_tokens=5000)


def test_responses_of_one_prompt_score_as_alone(classifier):
    """The shared prefix changes nothing but float32 summation order."""
    group = classifier.score(PROMPT, RESPONSES)
    alone = [classifier({"prompt": PROMPT, "response": response}) for response in RESPONSES]
    for together, single in zip(group, alone, strict=True):
        np.testing.assert_allclose(together.logits, single.logits, atol=3e-6)
        assert together.tokens == single.tokens > 60
    assert len({p.logits for p in group}) == len(RESPONSES)
    assert classifier.score(PROMPT, RESPONSES, workers=2) == group


def test_the_prefix_is_read_once(classifier, monkeypatch):
    """Tokens that the graph sees: the prompt once, not once per response."""
    from samescore.runtime.session import Session

    seen = []
    for name in ("run", "advance"):
        original = getattr(Session, name)
        monkeypatch.setattr(
            Session,
            name,
            lambda self, feeds, state=None, f=original: seen.append(feeds["input_ids"].size) or f(self, feeds, state),
        )
    tokens = [p.tokens for p in classifier.score(PROMPT, RESPONSES)]
    prompt = classifier.encoder.encode(f"PROMPT: {PROMPT}\nRESPONSE: ").input_ids
    assert sum(seen) <= sum(tokens) - (len(RESPONSES) - 1) * (len(prompt) - 4)


def test_wrong_use_is_explained(classifier, bert_bundle):
    with pytest.raises(InputError, match="item 1: the response is empty"):
        classifier.score(PROMPT, ["x", ""])
    with pytest.raises(InputError, match="one prompt and a list of responses"):
        classifier.score(PROMPT, "not a list")
    with pytest.raises(InputError, match=r"classifier\(text\)"):
        classifier.score("one text")
    with pytest.raises(UsageError, match="reads a conversation, not a prompt and a response"):
        load(bert_bundle).score("prompt", ["response"])
    assert classifier.score(PROMPT, []) == []


def test_margin_and_log_odds(classifier):
    prediction = classifier({"prompt": "bread?", "response": "sorry"})
    assert prediction.margin == prediction.logits[1] - prediction.logits[0]
    p = prediction.probabilities["Western-biased"]
    assert prediction.log_odds("Western-biased") == pytest.approx(math.log(p / (1 - p)), abs=1e-9)
    assert prediction.log_odds("Western-biased") == pytest.approx(prediction.margin, abs=1e-9)


def test_rewards_follow_their_completions(classifier):
    reward = RewardFunction(classifier, label="Western-biased")
    prompts = ["bread?", PROMPT, "bread?", PROMPT, "alone?", PROMPT]
    completions = ["sorry", "danke", "mix it well", "", "我不能", "   "]
    rewards = reward(prompts, completions, completion_ids=[[1]] * 6, trainer_state=None)
    assert rewards[3] == rewards[5] == 0.0
    for prompt, completion, value in zip(prompts, completions, rewards, strict=True):
        if completion.strip():
            alone = classifier({"prompt": prompt, "response": completion}).probabilities["Western-biased"]
            assert value == pytest.approx(alone, abs=1e-6)
    odds = RewardFunction(classifier, label="China-biased", kind="log_odds")
    assert odds(["bread?"], ["sorry"])[0] == pytest.approx(
        -classifier({"prompt": "bread?", "response": "sorry"}).margin
    )
    assert odds([], []) == []


def test_conversational_prompts_and_completions(classifier):
    reward = RewardFunction(classifier, label="Western-biased")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "bread?"}]
    answer = [{"role": "assistant", "content": "mix it well"}]
    assert reward([messages], [answer]) == reward(["bread?"], ["mix it well"])
    with pytest.raises(InputError, match="pair 0: expected a string, or messages of which the user's hold text"):
        reward([[{"role": "system", "content": "x"}]], [answer])


def test_a_reward_needs_the_right_bundle_and_label(llama_bundle, bert_bundle):
    with pytest.raises(UsageError, match="reads a conversation; a reward needs"):
        RewardFunction(bert_bundle, label="Refusal")
    with pytest.raises(UsageError, match="no label 'Western'.*Did you mean 'Western-biased'"):
        RewardFunction(llama_bundle, label="Western")
    with pytest.raises(UsageError, match="'probability' or 'log_odds'"):
        RewardFunction(llama_bundle, label="Western-biased", kind="score")
    with pytest.raises(InputError, match="2 prompts, but 1 completions"):
        RewardFunction(llama_bundle, label="Western-biased")(["a", "b"], ["c"])


def test_lines_of_prompts_and_responses(llama_bundle, tmp_path):
    from samescore.runtime.records import read_lines, score_lines

    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "bread?", "response": "sorry", "id": 7}, {"prompt": "bread?"}, {"text": "bread"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    classifier = load(llama_bundle)
    with path.open("rb") as stream:
        records = [record for _, record in score_lines(classifier, read_lines(stream, jsonl=True))]
    assert records[0]["id"] == 7 and records[0]["label"] in classifier.labels
    assert "error" in records[1] and records[2]["label"]
