"""Choosing tokens: the same candidates and probabilities as transformers' processors, seeds, penalties, bad values."""

import numpy as np
import pytest

from samescore.runtime.errors import GenerationError, UsageError
from samescore.runtime.generation.sampling import Sampler, Sampling, candidates, logprob_of, sampling_from


def logits_of(seed, size=4000, scale=3.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


def probabilities(logits, sampling):
    """float64 [vocabulary]; 0 for what is no candidate."""
    ids, scores = candidates(logits, sampling)
    odds = np.exp(scores - scores.max())
    result = np.zeros(len(logits))
    result[ids] = odds / odds.sum()
    return result


WARPERS = {
    "temperature": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "top-p": {"temperature": 1.3, "top_p": 0.9},
    "top-p of nearly all": {"temperature": 1.0, "top_p": 0.9999},
    "top-p of one": {"temperature": 0.05, "top_p": 0.01},
    "min-p": {"temperature": 0.9, "min_p": 0.05},
    "Qwen's": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "all": {"temperature": 1.5, "top_k": 900, "top_p": 0.95, "min_p": 0.01},
}


@pytest.mark.torch
@pytest.mark.parametrize("options", WARPERS.values(), ids=WARPERS.keys())
def test_candidates_are_those_of_transformers(options):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    sampling = Sampling(**options)
    for seed in range(10):
        logits = logits_of(seed)
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        steps = [hf.TemperatureLogitsWarper(float(sampling.temperature))]
        steps += [hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        steps += [hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        steps += [hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
        for step in steps:
            scores = step(None, scores)
        expected = scores.softmax(-1)[0].numpy()
        ours = probabilities(logits, sampling)
        assert np.array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_ties_at_top_k_all_stay():
    logits = np.array([1, 3, 2, 2, 2, 0], np.float32)
    assert sorted(candidates(logits, Sampling(temperature=1.0, top_k=2))[0]) == [1, 2, 3, 4]


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    for seed in range(30):
        logits = logits_of(seed, size=40)
        sampler = Sampler(Sampling(repetition_penalty=penalty), prompt := [3, 7, 7, 30])
        seen = list(prompt)
        for _ in range(6):
            processor = RepetitionPenaltyLogitsProcessor(penalty)
            expected = int(processor(torch.tensor([seen]), torch.from_numpy(logits.copy())[None]).argmax())
            seen.append(sampler.choose(logits))
            assert seen[-1] == expected


def test_presence_and_frequency_count_the_answer_alone():
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    once = Sampler(Sampling(presence_penalty=0.5), prompt=[0, 0, 0])
    assert [once.choose(logits) for _ in range(4)] == [0, 1, 0, 0]
    more = Sampler(Sampling(frequency_penalty=0.3), prompt=[0, 0, 0])
    # 1.0, 0.9 | 0.7, 0.9 | 0.7, 0.6 | 0.4, 0.6 | 0.4, 0.3
    assert [more.choose(logits) for _ in range(5)] == [0, 1, 0, 1, 0]


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=1), prompt=[])
    counts = np.bincount([sampler.choose(logits) for _ in range(20000)], minlength=4) / 20000
    # Four standard errors of the largest are 0.014.
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_a_seed_gives_the_same_tokens_again():
    def tokens(seed):
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), prompt=[])
        return [sampler.choose(logits_of(step)) for step in range(20)]

    assert tokens(5) == tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


def test_logprobs_are_of_the_models_own_distribution():
    logits = np.array([2.0, 1.0, 0.0, -50.0], np.float32)
    exact = np.log(np.exp([2.0, 1.0, 0.0, -50.0]) / np.exp([2.0, 1.0, 0.0, -50.0]).sum())
    found = logprob_of(logits, 3, 2)
    assert found.token_id == 3
    assert found.logprob == pytest.approx(exact[3])
    assert [token for token, _ in found.top] == [0, 1]
    assert [value for _, value in found.top] == pytest.approx(exact[:2])
    assert logprob_of(logits, 0, 0).top == ()
    assert len(logprob_of(logits, 0, 100).top) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers(bad):
    with pytest.raises(GenerationError, match="not finite"):
        Sampler(Sampling(), []).choose(np.array([0, bad], np.float32))


DEFAULTS = {"temperature": 0.7, "top_k": 20.0, "top_p": 0.8}


def test_defaults_are_the_checkpoints():
    assert sampling_from({**DEFAULTS, "do_sample": 1.0}, {}) == Sampling(temperature=0.7, top_k=20, top_p=0.8)
    # As in transformers, without do_sample the other defaults do not make it sample.
    assert sampling_from(DEFAULTS, {}).greedy
    assert sampling_from({**DEFAULTS, "do_sample": 0.0}, {}).greedy
    assert sampling_from({"do_sample": 1.0}, {}).temperature == 1.0
    chosen = sampling_from(DEFAULTS, {"temperature": 0.3, "stop": "x", "top_k": None})
    assert chosen == Sampling(temperature=0.3, top_k=20, top_p=0.8, stop=("x",))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"presence_penalty": 1000},
        {"frequency_penalty": float("inf")},
        {"seed": -1},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"logprobs": 101},
        {"stop": [""]},
        {"stop": [3]},
        {"stop": 3},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        sampling_from({}, options)


def test_an_unknown_option_is_named_with_its_neighbour():
    with pytest.raises(UsageError, match=r"unknown sampling option 'top-p'.*Did you mean 'top_p'"):
        sampling_from({}, {"top-p": 1})
