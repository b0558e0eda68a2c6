"""Progress on stderr: a tqdm bar where it is installed and stderr is a terminal, else lines: one per finished step, and how
far a long one is. The time left is estimated by work done, which callers count in tokens where texts differ in length."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samescore.calibrate.progress import Tick

# Seconds between two lines of one step.
INTERVAL = 30.0


@contextmanager
def step(title: str, total: int | None = None, work: float | None = None) -> Iterator[Tick]:
    """Announce a step; the yielded function counts one of `total` things done, and its share of all `work` (default: one)."""
    started = time.monotonic()
    bar = _bar(title, total) if total and sys.stderr.isatty() else None
    count = _Count(title, total, work or total, bar) if total else None
    try:
        yield _nothing if count is None else count
    finally:
        if bar is not None:
            bar.close()
    if bar is None:
        print(f"{title} … {time.monotonic() - started:.1f} s", file=sys.stderr)


@contextmanager
def silent(title: str, total: int | None = None, work: float | None = None) -> Iterator[Tick]:
    """The same, saying nothing."""
    yield _nothing


def _nothing(work: float = 1.0, /) -> None:
    return None


class _Count:
    """Counts things done, from several threads, and says how far the step is."""

    def __init__(self, title: str, total: int, work: float | None, bar: Any):
        self.title, self.total, self.work, self.bar = title, total, work or total, bar
        self.done, self.worked = 0, 0.0
        self.started = self.said = time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, work: float = 1.0, /) -> None:
        with self.lock:
            self.done += 1
            self.worked += work
            now = time.monotonic()
            left = time_left(now - self.started, self.worked / self.work)
            if self.bar is not None:
                self.bar.set_postfix_str(left, refresh=False)
                self.bar.update()
            elif now - self.said >= INTERVAL and self.done < self.total:
                self.said = now
                print(f"{self.title} … {self.done} of {self.total}, {left}", file=sys.stderr, flush=True)


def time_left(seconds: float, share: float) -> str:
    """In words, what remains of a step of which this share (0 to 1) took so many seconds."""
    left = seconds * max(0.0, 1 - share) / share if share > 0 else 0.0
    if left < 90:
        return f"{left:.0f} s left"
    minutes = round(left / 60)
    return f"{minutes} min left" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min left"


def _bar(title: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    return tqdm(total=total, desc=title, file=sys.stderr, bar_format=form)
