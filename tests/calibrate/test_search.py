"""The search for parts to keep exact: what it predicts, what it chooses, and that stages see what the whole graph does."""

import numpy as np
import pytest

import samescore.calibrate.search as search_module
from samescore._progress import silent
from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.budget import FEW_SAFETY, MANY, MANY_SAFETY, Budget, TokenBudget
from samescore.calibrate.effects import LabelEffects, TokenEffects, float_recipe, part_effects, parts_of
from samescore.calibrate.frontier import weights_of
from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.generation_gate import GENERATION_TOLERANCES
from samescore.calibrate.search import BUILDS, effect_texts, fewest, search
from samescore.calibrate.spent import Spent, expected_disagreement
from samescore.calibrate.stages import read_model
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.generator import Generator
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import GateError, UsageError
from samescore.runtime.prefill import logits_of
from samescore.runtime.session import Session

from ..conftest import label_tokens

RECIPE = variant_spec("cpu-int8").recipe


def spent(dp, disagreement=0.0):
    """Of texts whose probabilities all move by dp."""
    return Spent.moved(np.array([dp]), disagreement)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p98=1e-3", "'p98' is none of gate, max, p99, mean, agreement. Did you mean 'p99'"),
        ("p99", "'' is no number"),
        ("p99=x", "'x' is no number"),
        ("mean=0", "mean is a difference of probabilities"),
        ("max=2", "more than 0 and at most 1"),
        ("agreement=1", "at least 0, below 1"),
        ("", "'' is none of gate"),
    ],
)
def test_budgets_that_are_none(text, said):
    with pytest.raises(UsageError, match=said):
        Budget.parse(text, TOLERANCES["int8"])


def test_budgets():
    assert Budget.parse("gate", TOLERANCES["int8"]) == Budget(5e-2, 2e-2, 3e-3, pytest.approx(0.005))
    assert Budget.parse("gate", TOLERANCES["fp32"]).disagreement is None
    budget = Budget.parse("p99=5e-3,mean=1e-3", TOLERANCES["int8"])
    assert budget == Budget(None, 5e-3, 1e-3)
    assert budget.excess(Spent(1.0, FEW_SAFETY * 5e-3, 0.0, 1.0)) == pytest.approx(1)
    labels = Budget.parse("agreement=0.99", TOLERANCES["int8"])
    assert labels.excess(Spent(1.0, 1.0, 1.0, FEW_SAFETY * 0.01)) == pytest.approx(1)
    assert (budget.over(MANY - 1).safety, budget.over(MANY).safety) == (FEW_SAFETY, MANY_SAFETY)
    assert budget.excess(spent(0.07)) == pytest.approx(0.07 / (FEW_SAFETY * 1e-3), rel=1e-4)


@pytest.mark.parametrize(("labels", "activation"), [(2, "softmax"), (5, "softmax"), (3, "sigmoid")])
def test_expected_disagreement_is_what_happens_to_many_texts(labels, activation):
    """Counted over many texts, those near ties moving further; of a hundred of them the estimate is still near."""
    random = np.random.default_rng(labels)
    logits = random.normal(0, 2, (60_000, labels))
    changes = random.normal(0, 0.05, logits.shape) * (1 + np.exp(-np.abs(logits).max(axis=1, keepdims=True)))
    after = logits + changes
    same = (logits > 0) == (after > 0) if activation == "sigmoid" else (logits.argmax(1) == after.argmax(1))[:, None]
    counted = 1 - same.all(axis=1).mean()
    many = [expected_disagreement(logits[i : i + 100], changes[i : i + 100], activation) for i in range(0, 20_000, 100)]
    assert np.mean(many) == pytest.approx(counted, rel=0.2)
    # A hundred texts where it is counted tell it no nearer than its root.
    assert np.std(many) < 0.4 * np.sqrt(counted / 100)


def test_what_lost_texts_spend():
    logits = np.array([[0.0, 1.0], [3.0, 0.0]], np.float32)
    broken = np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32)
    assert Spent.of(logits, logits, "softmax") == Spent(0, 0, 0, 0)
    assert Spent.of(logits, broken, "softmax").max_abs_dp == 1.0
    for activation in ("softmax", "sigmoid"):
        assert Spent.of(logits, broken, activation).disagreement == 0.5
    assert Spent.of(logits, logits * np.float32(np.nan), "softmax").disagreement == 1
    assert expected_disagreement(np.zeros((3, 2)), np.ones((3, 2)) * [0, 1], "softmax") == 1
    assert expected_disagreement(np.ones((3, 1)), np.ones((3, 1)), "softmax") == 0


@pytest.mark.parametrize("needed", [1, 7, 20, 39])
@pytest.mark.parametrize("optimism", [0.1, 1.0, 10.0])
def test_the_fewest_steps_that_pass(needed, optimism):
    """Whatever the prediction is worth."""
    tried = []

    def truth(kept):
        return 0.4e-3 if kept >= needed else 5e-3 * (1 + needed - kept)

    def try_out(kept):
        tried.append(kept)
        return spent(truth(kept))

    def predict(kept):
        return spent(truth(kept) / optimism)

    budget = Budget(None, None, 1e-3)
    count, measured = fewest(try_out=try_out, predict=predict, steps=40, budget=budget, tick=int, plain=spent(truth(0)))
    assert count in (needed, needed + 1) and len(tried) <= BUILDS
    assert measured.mean_abs_dp == pytest.approx(0.4e-3, rel=1e-3)


def test_a_budget_that_nothing_meets():
    tried = []

    def try_out(kept):
        tried.append(kept)
        return spent(0.1)

    with pytest.raises(GateError, match="no choice of formats stays inside the budget"):
        fewest(lambda n: spent(1.0), try_out, 5, Budget(None, None, 1e-3), int, spent(0.1))
    assert tried.count(5) == 1 and len(tried) == len(set(tried))


def scorer(folder):
    return TokenScorer(Checkpoint(folder), label_tokens(folder))


@pytest.fixture(scope="module", params=["bert", "llama", "qwen3_5"])
def subject(request):
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    checkpoint = scorer(folder) if request.param == "qwen3_5" else Checkpoint(folder)
    random = np.random.default_rng(5)
    ids = [random.integers(5, checkpoint.config["vocab_size"], size=n).astype(np.int64) for n in (3, 9, 20, 33, 40)]
    return checkpoint, ids, collect_statistics(checkpoint, ids)


def whole(checkpoint, ids, statistics, folder, recipe):
    folder.mkdir()
    build_graph(checkpoint, recipe, folder, statistics=statistics)
    session = Session(read_model(folder), "cpu", intra_op_threads=1)
    return np.stack([logits_of(session, sequence) for sequence in ids])


@pytest.mark.torch
def test_stages_see_what_the_whole_graph_does(subject, tmp_path):
    checkpoint, ids, run = subject
    parts = parts_of(checkpoint)
    effects = part_effects(checkpoint, RECIPE, ids, run.statistics, LabelEffects, workspace=tmp_path, report=silent)
    assert list(dict.fromkeys(part for part, _ in effects.changed)) == parts
    assert all(weights_of(checkpoint, part) > 0 for part in parts)
    np.testing.assert_allclose(effects.logits, run.logits, atol=1e-6)
    for number, part in enumerate((parts[0], parts[1], parts[-1])):
        for option in RECIPE.options(part)[:-1]:
            recipe = float_recipe(RECIPE).choosing({part: option})
            logits = whole(checkpoint, ids, run.statistics, tmp_path / f"{number}{option}", recipe)
            np.testing.assert_allclose(effects.changed[part, option], logits, atol=2e-5)
            assert np.abs(logits - effects.logits).max() > 1e-6
    finest = {part: RECIPE.options(part)[-1] for part in parts}
    everything = whole(checkpoint, ids, run.statistics, tmp_path / "all", RECIPE.choosing(finest))
    # A float16 embedding and 15-bit numbers are all that is left of the recipe.
    assert np.abs(everything - effects.logits).max() < 1e-2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.torch
@pytest.mark.parametrize("recipe", [RECIPE, variant_spec("cpu-int4").recipe], ids=["int8", "int4"])
def test_a_search_stays_inside_its_budget(subject, recipe, tmp_path):
    checkpoint, ids, run = subject
    free = search_for(recipe, Budget(1.0, None, None), checkpoint, ids, run, tmp_path)
    assert free.formats == {} and free.time == 1 and free.sensitivity is None
    budget = Budget(None, None, 1.25 * free.spent.mean_abs_dp)
    tight = search_for(recipe, budget, checkpoint, ids, run, tmp_path)
    parts = parts_of(checkpoint)
    assert tight.formats and budget.excess(tight.spent) <= 1
    assert list(tight.sensitivity) == parts and min(tight.sensitivity.values()) > 0
    assert all(chosen in recipe.options(part)[1:] for part, chosen in tight.formats.items())
    assert [part for part in parts if part in tight.formats] == list(tight.formats)
    # int4's steps to int8 are faster, not slower: it is there to be small.
    assert tight.time >= 1 if recipe is RECIPE else tight.time <= 1.2
    # The same formats again, and what they leave is what a build of them leaves.
    assert search_for(recipe, budget, checkpoint, ids, run, tmp_path).formats == tight.formats


def search_for(recipe, budget, checkpoint, ids, run, folder):
    return search(checkpoint, recipe, budget, ids, run, max_tokens=64, prefix=None, workspace=folder, report=silent)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["cpu-int8", "cpu-int4"])
@pytest.mark.parametrize("model", ["language_model", "qwen3_5_checkpoint"])
def test_a_language_model_stays_inside_its_budget(model, name, request, tmp_path):
    """By the divergence of the next token's distribution over the whole vocabulary; the table is left as it is."""
    checkpoint = Generator(Checkpoint(request.getfixturevalue(model)))
    recipe = variant_spec(name, "generate").recipe
    random = np.random.default_rng(5)
    ids = [random.integers(5, checkpoint.config["vocab_size"], size=n).astype(np.int64) for n in (3, 9, 20, 33, 40)]
    run = collect_statistics(checkpoint, ids)
    free = search_for(recipe, TokenBudget(1.0), checkpoint, ids, run, tmp_path)
    assert free.formats == {} and free.spent > 0
    effects = part_effects(checkpoint, recipe, ids, run.statistics, TokenEffects, workspace=tmp_path, report=silent)
    layers = [part for part in parts_of(checkpoint) if "embed" not in part]
    assert list(effects.sensitivity(recipe)) == layers and min(effects.sensitivity(recipe).values()) > 0
    # Of a random model the parts' divergences are hardly independent; the order of magnitude is theirs.
    assert free.spent / 4 < effects.predicted(dict.fromkeys(layers, recipe.linear)) < 4 * free.spent
    budget = TokenBudget(free.spent)
    tight = search_for(recipe, budget, checkpoint, ids, run, tmp_path)
    assert tight.formats and budget.excess(tight.spent) <= 1 and not any("embed" in part for part in tight.formats)
    with pytest.raises(GateError, match="the mean divergence is"):
        search_for(recipe, TokenBudget(1e-12), checkpoint, ids, run, tmp_path)


def test_token_budgets():
    tolerance = GENERATION_TOLERANCES["int8"]
    assert TokenBudget.parse("gate", tolerance) == TokenBudget(1e-3)
    assert TokenBudget.parse("kld=5e-4", tolerance).excess(FEW_SAFETY * 5e-4) == pytest.approx(1)
    for text, said in (
        ("p99=1", "'p99' is none of gate, kld"),
        ("kld=x", "'x' is no number"),
        ("kld=0", "more than 0"),
    ):
        with pytest.raises(UsageError, match=said):
            TokenBudget.parse(text, tolerance)
    logits = np.array([[0.0, 1.0, 3.0]], np.float32)
    assert TokenBudget.spent(logits, logits, "softmax") == 0
    # Σ p log(p / q), by hand in float64.
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.5, 3.0])))
    assert TokenBudget.spent(logits, logits + np.float32([0, 0.5, 0]), "softmax") == pytest.approx(
        (p * np.log(p / q)).sum()
    )
    assert TokenBudget.spent(logits, logits * np.float32(np.nan), "softmax") == np.inf


def test_few_texts_measure_the_effects_of_a_large_model(subject, monkeypatch):
    checkpoint, ids, _ = subject
    chosen = effect_texts(checkpoint, RECIPE, ids * 100)
    assert len(chosen) == 128 and all(map(np.array_equal, chosen, (ids * 100)[::3]))
    long = [np.broadcast_to(np.int64(1), 10**9)] * 100
    assert {len(text) for text in effect_texts(checkpoint, RECIPE, long)} == {search_module.EFFECT_TOKENS}
    monkeypatch.setattr(search_module, "EFFECT_BYTES", 1.0)
    assert len(effect_texts(checkpoint, RECIPE, long)) == search_module.EFFECT_TEXTS[0]
