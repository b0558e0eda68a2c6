"""Progress on stderr: a tqdm bar where it is installed and stderr is a terminal, else one line per finished step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Tick = Callable[[], None]


@contextmanager
def step(title: str, total: int | None = None) -> Iterator[Tick]:
    """Announce a step; the yielded function counts one of `total` things done."""
    started = time.monotonic()
    bar = _bar(title, total) if total and sys.stderr.isatty() else None
    try:
        yield _nothing if bar is None else lambda: bar.update()
    finally:
        if bar is not None:
            bar.close()
    if bar is None:
        print(f"{title} … {time.monotonic() - started:.1f} s", file=sys.stderr)


@contextmanager
def silent(title: str, total: int | None = None) -> Iterator[Tick]:
    """The same, saying nothing."""
    yield _nothing


def _nothing() -> None:
    return None


def _bar(title: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc=title, file=sys.stderr)
