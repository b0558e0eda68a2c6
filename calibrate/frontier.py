"""Exactness against cost: in which order parts of a network should get finer number formats.

Each part has a few (cost, error) points, one per format. On their lower convex hull every step to a finer format removes some
error at some cost; all parts' steps, best ratio first, are the frontier: its first k steps are the choice for some budget
(greedy on convex hulls is optimal for every budget that a whole number of steps meets, Shoham and Gersho 1988).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from samescore.calibrate.effects import Effects
from samescore.export.checkpoint import Checkpoint
from samescore.export.recipes import NumberFormat, Recipe

# Time of a product in each format over that of `int8-row`, and bytes of a weight. Medians of benchmarks/kernels.py over
# matrices of 384 to 2048 channels and 16 to 512 tokens (docs/results/kernels.json); a table, so that the same texts give the
# same choice on every machine.
TIME: dict[NumberFormat, float] = {
    "int8-row": 1.0,
    "int8-row-a16": 1.9,
    "int16-row": 2.6,
    "int4-blocks": 2.2,
    "float32": 2.4,
}
BYTES: dict[NumberFormat, float] = {
    "int8-row": 1.0,
    "int8-row-a16": 1.0,
    "int16-row": 2.0,
    "int8-weights": 1.0,
    "int8-blocks": 1.03,
    "int4-blocks": 0.64,
    "float16": 2.0,
    "float32": 4.0,
}
S = TypeVar("S")
# What a share of the time and a share of the bytes count: int8 is chosen to be fast, int4 to be small.
FAST, SMALL = (1.0, 0.25), (0.25, 1.0)


class Step(NamedTuple):
    """A part's move to a finer format."""

    part: str
    number_format: NumberFormat


@dataclass(frozen=True)
class Frontier(Generic[S]):
    """The steps in order, what each part's weights count, and the effects that predict what a choice leaves."""

    recipe: Recipe
    steps: tuple[Step, ...]
    weights: Mapping[str, int]
    effects: Effects[S]

    def choices(self, count: int) -> dict[str, NumberFormat]:
        """The parts that have another format than the recipe's after the first `count` steps, in the network's order."""
        reached = dict(self.steps[:count])
        return {part: reached[part] for part in self.weights if part in reached}

    def predicted(self, count: int) -> S:
        """What so many steps leave, if the parts' effects are independent of each other."""
        reached = self.choices(count)
        return self.effects.predicted({p: reached.get(p, self.recipe.options(p)[0]) for p in self.weights})

    def time(self, count: int) -> float:
        """The time of all products after so many steps over that of the recipe as it is, by the table."""
        return time_of(self.recipe, self.choices(count), self.weights)


def make_frontier(checkpoint: Checkpoint, recipe: Recipe, effects: Effects[S]) -> Frontier[S]:
    """All parts' steps in the order of what they gain."""
    weights = {part: weights_of(checkpoint, part) for part in dict.fromkeys(part for part, _ in effects.changed)}
    ranked: list[tuple[float, Step]] = []
    for part in weights:
        for gain, step in _hull(_points(recipe, effects, weights, part)):
            ranked.append((gain, step))
    ranked.sort(key=lambda entry: -entry[0])
    return Frontier(recipe, tuple(step for _, step in ranked), weights, effects)


def weights_of(checkpoint: Checkpoint, part: str) -> int:
    """How many numbers the matrices of a part hold."""
    shapes = [checkpoint.shape(name) for name in checkpoint.names() if name.startswith(f"{part}.")]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) == 2)


def time_of(recipe: Recipe, choices: Mapping[str, NumberFormat], weights: Mapping[str, int]) -> float:
    """The time of a choice's products over that of the recipe's own; an embedding takes none."""
    multiplied = {part: count for part, count in weights.items() if "embed" not in part}
    plain = sum(count * TIME.get(recipe.linear, 1.0) for count in multiplied.values())
    return sum(count * TIME.get(choices.get(part, recipe.linear), 1.0) for part, count in multiplied.items()) / plain


class _Point(NamedTuple):
    cost: float
    error: float
    step: Step


def _points(recipe: Recipe, effects: Effects[S], weights: Mapping[str, int], part: str) -> list[_Point]:
    """The cost of a part's formats, as shares of what the recipe as it is costs, and its error in them."""
    fast, small = SMALL if recipe.linear == "int4-blocks" else FAST
    plain_bytes = sum(count * BYTES[recipe.options(name)[0]] for name, count in weights.items())
    found = []
    for option in recipe.options(part):
        time = time_of(recipe, {part: option}, weights) - 1
        size = weights[part] * (BYTES[option] - BYTES[recipe.options(part)[0]]) / plain_bytes
        found.append(_Point(fast * time + small * size, effects.error(part, option), Step(part, option)))
    return found


def _hull(points: Sequence[_Point]) -> list[tuple[float, Step]]:
    """Steps along the lower convex hull from the first point on, each with the error it removes per cost."""
    steps = []
    here = points[0]
    ahead = list(points[1:])
    while ahead := [point for point in ahead if point.error < here.error]:

        def gain(point: _Point, here: _Point = here) -> float:
            return (here.error - point.error) / max(point.cost - here.cost, 1e-12)

        best = max(ahead, key=gain)
        steps.append((gain(best), best.step))
        ahead = ahead[ahead.index(best) + 1 :]
        here = best
    return steps
