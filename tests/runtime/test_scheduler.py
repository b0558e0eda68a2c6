import threading

import pytest

from samescore.runtime.scheduler import run_longest_first


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_back_in_input_order(workers):
    items = ["ccc", "a", "", "bb", "dddd"] * 20
    assert run_longest_first(items, len, str.upper, workers=workers) == [item.upper() for item in items]


def test_longest_first():
    started = []
    run_longest_first(["a", "ccc", "bb"], len, started.append, workers=1)
    assert started == ["ccc", "bb", "a"]


def test_workers_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=10)
    assert run_longest_first([1, 2, 3], lambda item: 1, lambda item: barrier.wait() >= 0, workers=3) == [True] * 3


def test_an_exception_comes_through_and_stops_the_rest():
    ran = []

    def run(item):
        ran.append(item)
        if item == 99:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_longest_first(list(range(100)), lambda item: item, run, workers=2)
    assert len(ran) < 100


def test_nothing_to_do():
    assert run_longest_first([], len, str, workers=4) == []
