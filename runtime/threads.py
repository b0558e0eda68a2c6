"""How many threads this process may really use: CPU affinity and the cgroup quota, not the host's cores.

ONNX Runtime sizes its pool from the host, which in a container with a quota means throttled, fighting threads.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from samescore.runtime.machine import ROOT, cpu_limits


def available_threads(root: Path = ROOT) -> int:
    """The smaller of the affinity mask's size and the tightest CPU quota rounded up, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    limit = cpu_limits(root)
    quota = None if limit is None else limit.value
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))
