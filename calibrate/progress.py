"""How long steps say what they are at: the types, and steps that continue what an earlier run began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from samescore.calibrate.resume import Rows
from samescore.runtime.prefill import Ids


class Tick(Protocol):
    """Counts one thing done. work: its share of the step's work, where things differ (tokens of a text)."""

    def __call__(self, work: float = 1.0, /) -> None: ...  # noqa: D102


class Reporter(Protocol):
    """Opens a step with a title and, where it is known, the number of things to do; yields a function to count them.

    work: that of all things together, by which the time left is estimated (default: each is as much as another).
    """

    def __call__(  # noqa: D102
        self, title: str, total: int | None = None, work: float | None = None
    ) -> AbstractContextManager[Tick]: ...


@contextmanager
def resumed_step(report: Reporter, title: str, sequences: Sequence[Ids], rows: Rows) -> Iterator[Tick]:
    """A step over the texts that `rows` does not know yet, counted in tokens; its title says how many it knows."""
    missing = [len(ids) for ids in sequences if rows.get(ids) is None]
    if known := len(sequences) - len(missing):
        title = f"{title}, {known} of {len(sequences)} from an earlier run"
    with report(title, len(missing), sum(missing)) as tick:
        yield tick
