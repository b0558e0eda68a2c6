import os

import pytest

from samescore.runtime.threads import available_threads, cpu_quota


@pytest.mark.parametrize(
    ("content", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("50000 100000\n", 0.5), ("junk", None)]
)
def test_cgroup_v2(tmp_path, content, quota):
    (tmp_path / "cpu.max").write_text(content)
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(("us", "quota"), [("-1", None), ("300000", 3.0)])
def test_cgroup_v1(tmp_path, us, quota):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(us)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) == quota


def test_without_a_cgroup_affinity_decides(tmp_path):
    assert available_threads(tmp_path) == len(os.sched_getaffinity(0))


def test_affinity_and_quota_bound_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for content, threads in (("max 100000", 8), ("250000 100000", 3), ("1000 100000", 1), ("9900000 100000", 8)):
        (tmp_path / "cpu.max").write_text(content)
        assert available_threads(tmp_path) == threads
