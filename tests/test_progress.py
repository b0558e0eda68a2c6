import pytest

from samescore import _progress
from samescore._progress import step, time_left


@pytest.mark.parametrize(
    ("seconds", "share", "said"),
    [(10, 0.5, "10 s left"), (60, 0.25, "3 min left"), (3600, 0.5, "60 min left"), (3600, 0.25, "3 h 0 min left")],
)
def test_time_left(seconds, share, said):
    assert time_left(seconds, share) == said


def test_lines_while_a_step_runs(monkeypatch, capsys):
    """The clock is at 0, then 10 s per text; a line comes at most every 30 s, and the estimate counts work."""
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with step("measuring", 8, 800) as tick:
        for work in (300, 200, 100, 100, 50, 20, 20, 10):
            clock[0] += 10
            tick(work)
    assert capsys.readouterr().err.splitlines() == [
        "measuring … 3 of 8, 10 s left",
        "measuring … 6 of 8, 2 s left",
        "measuring … 80.0 s",
    ]


def test_without_work_each_counts_alike(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: clock[0])
    with step("measuring", 4) as tick:
        clock[0] = 40
        tick()
    assert capsys.readouterr().err.splitlines()[0] == "measuring … 1 of 4, 2 min left"
