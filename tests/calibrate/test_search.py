"""The search for parts to keep exact: what it predicts, what it chooses, and that stages see what the whole graph does."""

from dataclasses import replace

import numpy as np
import pytest

from samescore._progress import silent
from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.gate import TOLERANCES
from samescore.calibrate.metrics import measure
from samescore.calibrate.search import (
    BUILDS,
    SAFETY,
    Budget,
    Effects,
    fewest,
    part_effects,
    parts_of,
    predicted,
    rank,
    search,
    stored_bytes,
)
from samescore.calibrate.stages import read_model, stages_of
from samescore.export.build import build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.errors import GateError, UsageError
from samescore.runtime.prefill import logits_of
from samescore.runtime.session import Session

from ..conftest import label_tokens

LABELS = ("a", "b")
RECIPE = variant_spec("cpu-int8").recipe


def drift(dp):
    """Of one text whose probability moves from one half by dp."""
    p = 0.5 + np.array([[dp]])
    logits = np.concatenate([np.log(1 - p), np.log(p)], axis=1).astype(np.float32)
    return measure(np.zeros((1, 2), np.float32), logits, LABELS, "softmax")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p98=1e-3", "'p98' is none of gate, max, p99, mean. Did you mean 'p99'"),
        ("p99", "'' is no number"),
        ("p99=x", "'x' is no number"),
        ("mean=0", "mean is a difference of probabilities"),
        ("max=2", "more than 0 and at most 1"),
        ("", "'' is none of gate"),
    ],
)
def test_budgets_that_are_none(text, said):
    with pytest.raises(UsageError, match=said):
        Budget.parse(text, TOLERANCES["int8"])


def test_budgets():
    assert Budget.parse("gate", TOLERANCES["int8"]) == Budget(5e-2, 2e-2, 3e-3)
    budget = Budget.parse("p99=5e-3,mean=1e-3", TOLERANCES["int8"])
    assert budget == Budget(None, 5e-3, 1e-3)
    assert budget.excess({"max_abs_dp": 1.0, "p99_abs_dp": SAFETY * 5e-3, "mean_abs_dp": 0.0}) == pytest.approx(1)
    assert budget.excess(drift(0.07)) == pytest.approx(0.07 / (SAFETY * 1e-3), rel=1e-4)


def test_effects_add_in_squares_and_rank_by_bytes():
    clean = np.zeros((4, 2), np.float32)
    moved = {name: clean + np.array([[size, -size]], np.float32) for name, size in (("x", 3e-3), ("y", 4e-3), ("z", 0))}
    effects = Effects(clean, moved)
    both = predicted(effects, ["x", "y"], "softmax")
    # p = 1/2, so that a logit difference of 2d moves it by d / 2.
    assert both["mean_abs_dp"] == pytest.approx(2.5e-3, rel=1e-4)
    assert predicted(effects, [], "softmax")["max_abs_dp"] == 0
    assert rank(effects, {"x": 1, "y": 1, "z": 1}, "softmax") == ["y", "x", "z"]
    assert rank(effects, {"x": 1, "y": 2, "z": 1}, "softmax") == ["x", "y", "z"]


@pytest.mark.parametrize("needed", [0, 1, 7, 20, 39])
@pytest.mark.parametrize("optimism", [0.1, 1.0, 10.0])
def test_the_fewest_parts_that_pass(needed, optimism):
    """Whatever the prediction is worth."""
    tried = []

    def truth(kept):
        return 0.4e-3 if kept >= needed else 5e-3 * (1 + needed - kept)

    def try_out(kept):
        tried.append(kept)
        return drift(truth(kept))

    def predict(kept):
        return dict.fromkeys(("max_abs_dp", "p99_abs_dp", "mean_abs_dp"), truth(kept) / optimism)

    count, measured = fewest(try_out=try_out, predict=predict, parts=40, budget=Budget(None, None, 1e-3), tick=int)
    assert count in (needed, needed + 1) and len(tried) <= BUILDS
    assert measured.mean_abs_dp == pytest.approx(0.4e-3, rel=1e-3)


def test_a_budget_that_nothing_meets():
    with pytest.raises(GateError, match="no choice of exact parts stays inside the budget"):
        fewest(lambda kept: {"mean_abs_dp": 1.0}, lambda kept: drift(0.1), 5, Budget(None, None, 1e-3), lambda: None)


def scorer(folder):
    return TokenScorer(Checkpoint(folder), label_tokens(folder))


@pytest.fixture(scope="module", params=["bert", "llama", "qwen3_5"])
def subject(request):
    folder = request.getfixturevalue(f"{request.param}_checkpoint")
    checkpoint = scorer(folder) if request.param == "qwen3_5" else Checkpoint(folder)
    random = np.random.default_rng(5)
    ids = [random.integers(5, checkpoint.config["vocab_size"], size=n).astype(np.int64) for n in (3, 9, 20, 33, 40)]
    return checkpoint, ids, collect_statistics(checkpoint, ids)


def whole(checkpoint, ids, statistics, folder, exact, recipe=RECIPE):
    folder.mkdir()
    build_graph(checkpoint, replace(recipe, exact=exact), folder, statistics=statistics)
    session = Session(read_model(folder), "cpu", intra_op_threads=1)
    return np.stack([logits_of(session, sequence) for sequence in ids])


@pytest.mark.torch
def test_stages_see_what_the_whole_graph_does(subject, tmp_path):
    checkpoint, ids, statistics = subject
    parts = parts_of(checkpoint)
    effects = part_effects(checkpoint, RECIPE, ids, statistics, workspace=tmp_path, report=silent)
    assert list(effects.parts) == parts and all(stored_bytes(checkpoint, part) > 0 for part in parts)
    for number, part in enumerate((parts[0], parts[1], parts[-1])):
        others = tuple(other for other in parts if other != part)
        # Behind the first stage the search has a float32 embedding; an exact part's is float16.
        recipe = (
            replace(RECIPE, embedding="float32") if part == parts[-1] and len(stages_of(checkpoint)) > 1 else RECIPE
        )
        logits = whole(checkpoint, ids, statistics, tmp_path / str(number), others, recipe)
        np.testing.assert_allclose(effects.parts[part], logits, atol=2e-5)
        assert np.abs(logits - effects.logits).max() > 1e-5
    everything = whole(checkpoint, ids, statistics, tmp_path / "all", tuple(parts))
    # A float16 embedding is all that is left of the recipe.
    assert np.abs(everything - effects.logits).max() < 1e-2
    assert not list(tmp_path.glob(".*"))


@pytest.mark.torch
def test_a_search_stays_inside_its_budget(subject, tmp_path):
    checkpoint, ids, statistics = subject
    free = search_for(Budget(1.0, None, None), checkpoint, ids, statistics, tmp_path)
    assert free.exact == () and free.share == 0
    budget = Budget(None, None, 1.25 * free.drift.mean_abs_dp)
    tight = search_for(budget, checkpoint, ids, statistics, tmp_path)
    assert tight.exact and 0 < tight.share < 1 and budget.excess(tight.drift) <= 1
    assert set(tight.exact) < set(parts_of(checkpoint))
    # The same parts again, and what they leave is what a build of them leaves.
    assert search_for(budget, checkpoint, ids, statistics, tmp_path).exact == tight.exact


def search_for(budget, checkpoint, ids, statistics, folder):
    return search(
        checkpoint,
        RECIPE,
        budget,
        ids,
        statistics,
        max_tokens=64,
        prefix=None,
        workspace=folder,
        report=silent,
    )
