"""How many threads this process may really use: CPU affinity and the cgroup quota, not the host's cores.

ONNX Runtime sizes its pool from the host, which in a container with a quota means throttled, fighting threads.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_threads(cgroup_root: Path = CGROUP_ROOT) -> int:
    """The smaller of the affinity mask's size and the CPU quota rounded up, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota(cgroup_root)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def cpu_quota(cgroup_root: Path = CGROUP_ROOT) -> float | None:
    """CPUs granted by cgroup v2 (`cpu.max`) or v1 (`cpu.cfs_quota_us`); None where there is no quota."""
    try:
        quota, period = (cgroup_root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((cgroup_root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((cgroup_root / "cpu/cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 and period_us > 0 else None
    except (OSError, ValueError):
        return None
