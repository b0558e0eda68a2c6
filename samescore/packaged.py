"""Golden and calibration texts of an export: the user's own file, or what ships for the profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from samescore.calibrate.golden import GoldenSet, read_golden
from samescore.export.profiles import Profile
from samescore.runtime.errors import UsageError

PACKAGE = Path(__file__).parent
# For a checkpoint without a profile, whose size and subject are unknown.
DEFAULT_TEXTS = "texts/conversations"
DEFAULT_GOLDEN_LIMIT, DEFAULT_CALIBRATION_LIMIT = 400, 100

Limit = int | Literal["all"] | None


def packaged(facts: Profile | None, name: Literal["golden", "calibration"]) -> Path:
    """The file that ships for a profile (None: for a checkpoint without one), compressed or not."""
    folder = PACKAGE / (facts.texts if facts and facts.texts else DEFAULT_TEXTS)
    compressed = folder / f"{name}.jsonl.gz"
    return compressed if compressed.is_file() else folder / f"{name}.jsonl"


def golden_set(path: str | os.PathLike[str] | None, facts: Profile | None, limit: Limit) -> tuple[GoldenSet, int]:
    """The golden texts to use, from the first, and how many there are.

    limit: how many; `all`; or None for all of a file of the user's own and the profile's usual number of what ships.
    """
    if limit is not None and limit != "all" and limit < 1:
        raise UsageError(f"--golden-limit must be at least 1, or `all`; got {limit}")
    if limit is None and path is None:
        limit = facts.golden_limit if facts else DEFAULT_GOLDEN_LIMIT
    golden = read_golden(Path(path) if path else packaged(facts, "golden"))
    return golden.first(None if limit == "all" else limit), len(golden.texts)


def calibration_set(path: str | os.PathLike[str] | None, facts: Profile | None) -> GoldenSet:
    """The calibration texts: all of a file of the user's own, or the profile's usual number of what ships."""
    texts = read_golden(Path(path) if path else packaged(facts, "calibration")).without_reference()
    limit = facts.calibration_limit if facts else DEFAULT_CALIBRATION_LIMIT
    return texts if path else texts.first(limit)
