import os

import pytest

from samescore.runtime.threads import available_threads


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("content", "threads"),
    [
        ("max 100000", 8),
        ("250000 100000", 3),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("9900000 100000", 8),
        ("junk", 8),
    ],
)
def test_affinity_and_a_v2_quota_bound_the_threads(tmp_path, eight_cores, content, threads):
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text(content)
    assert available_threads(tmp_path) == threads


def test_the_tightest_group_counts(tmp_path, eight_cores):
    """A job inside a container, both with a quota."""
    for folder, content in (("", "400000 100000"), ("job", "200000 100000"), ("job/step", "max 100000")):
        group = tmp_path / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / "cpu.max").write_text(content)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    assert available_threads(tmp_path) == 2


@pytest.mark.parametrize(("us", "threads"), [("-1", 8), ("300000", 3)])
def test_a_v1_quota_bounds_the_threads(tmp_path, eight_cores, us, threads):
    group = tmp_path / "sys/fs/cgroup/cpu"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(us)
    (group / "cpu.cfs_period_us").write_text("100000")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:cpu,cpuacct:/\n")
    assert available_threads(tmp_path) == threads


def test_without_a_cgroup_affinity_decides(tmp_path):
    assert available_threads(tmp_path) == len(os.sched_getaffinity(0))
