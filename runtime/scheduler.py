"""Running many texts without padding.

On CPU a padded batch computes on padding; one text per call on N single-threaded workers over one session does not,
and a text's result cannot depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def run_longest_first(
    items: Sequence[T], length: Callable[[T], int], run: Callable[[T], R], *, workers: int
) -> list[R]:
    """`[run(item) for item in items]`, longest first over `workers` threads; results in the order of `items`.

    Starting with the longest keeps all workers busy to the end. The first exception stops what has not started.
    """
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, R] = {}
    if workers <= 1 or len(items) <= 1:
        for index in order:
            results[index] = run(items[index])
    else:
        with ThreadPoolExecutor(max_workers=min(workers, len(items))) as pool:
            futures = {index: pool.submit(run, items[index]) for index in order}
            try:
                for index, future in futures.items():
                    results[index] = future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [results[index] for index in range(len(items))]
