"""The order of steps to finer formats, on effects made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from samescore.calibrate.effects import LabelEffects
from samescore.calibrate.frontier import make_frontier, time_of
from samescore.export.recipes import variant_spec

RECIPE = variant_spec("cpu-int8").recipe
SHAPES = {"a.x.weight": (10, 10), "b.x.weight": (10, 10), "embed.weight": (100, 4), "a.x.bias": (10,)}
CHECKPOINT = SimpleNamespace(names=lambda: list(SHAPES), shape=SHAPES.__getitem__)


def effects_of(**sizes):
    """Effects on p = 1/2: a logit difference of 2d moves it by d / 2."""
    clean = np.zeros((4, 2), np.float32)
    effects = LabelEffects(clean, "softmax")
    for name, d in sizes.items():
        part, _, number_format = name.partition("__")
        effects.add((part, number_format.replace("_", "-")), clean + np.array([[d, -d]], np.float32))
    return effects


def test_predictions_add_squares():
    effects = effects_of(a__int8_row=3e-3, a__int8_row_a16=0, b__int8_row=4e-3, b__int8_row_a16=0)
    frontier = make_frontier(CHECKPOINT, RECIPE, effects)
    assert frontier.predicted(0).mean_abs_dp == pytest.approx(2.5e-3, rel=1e-4)
    assert frontier.steps[0].part == "b" and frontier.predicted(1).max_abs_dp == pytest.approx(1.5e-3, rel=1e-4)
    assert frontier.predicted(2).p99_abs_dp == 0
    assert effects.sensitivity(RECIPE) == {"a": pytest.approx(1.5e-3, rel=1e-4), "b": pytest.approx(2e-3, rel=1e-4)}


def test_steps_follow_the_convex_hull():
    """16-bit activations are skipped where they gain nothing, and taken first where they gain most of it."""
    effects = effects_of(
        a__int8_row=4e-3, a__int8_row_a16=3.9e-3, b__int8_row=4e-3, b__int8_row_a16=1e-3, embed__int8_row=1e-6
    )
    frontier = make_frontier(CHECKPOINT, RECIPE, effects)
    assert [tuple(step) for step in frontier.steps] == [
        ("b", "int8-row-a16"),
        ("a", "int16-row"),
        ("b", "int16-row"),
        ("embed", "float16"),
    ]
    assert frontier.choices(1) == {"b": "int8-row-a16"}
    # A part has its last step's format; parts come in the network's order.
    assert frontier.choices(3) == {"a": "int16-row", "b": "int16-row"}
    assert list(frontier.choices(4)) == ["a", "b", "embed"]
    assert frontier.predicted(4).max_abs_dp == 0


def test_time_counts_products_and_no_embedding():
    weights = {"a": 100, "b": 300, "embed": 1000}
    assert time_of(RECIPE, {}, weights) == 1
    assert time_of(RECIPE, {"embed": "float16"}, weights) == 1
    assert time_of(RECIPE, {"b": "int16-row"}, weights) == pytest.approx((100 + 300 * 2.6) / 400)
    int4 = variant_spec("cpu-int4").recipe
    assert time_of(int4, {"a": "int8-row"}, weights) < 1


def test_int4_gives_bytes_away_only_where_they_gain():
    int4 = variant_spec("cpu-int4").recipe
    effects = effects_of(a__int4_blocks=4e-2, a__int8_row=1e-3, b__int4_blocks=1e-3, b__int8_row=5e-4)
    frontier = make_frontier(CHECKPOINT, int4, effects)
    assert tuple(frontier.steps[0]) == ("a", "int8-row")
