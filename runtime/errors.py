"""The errors of samescore. Each is also the builtin a caller would expect, and knows its exit code.

    SamescoreError
    ├── GateError                 exit 1   a variant drifts from the reference beyond its tolerance
    ├── CanaryError               exit 1   this box gives other numbers than the certified ones (RuntimeError)
    ├── UsageError                exit 2   an argument is wrong            (ValueError)
    ├── BundleError               exit 3   a bundle is damaged or foreign  (ValueError)
    ├── CheckpointError           exit 3   a checkpoint cannot be read     (ValueError)
    ├── InputError                exit 3   a text cannot be scored         (ValueError)
    ├── GenerationError           exit 3   a model's output is no number   (RuntimeError)
    ├── ProviderError             exit 4   the asked provider is not there (RuntimeError)
    └── MissingDependencyError    exit 4   an extra is not installed       (ImportError)

Every message names what was asked, what exists, and what to type next.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SamescoreError(Exception):
    """Base of every error that samescore raises on purpose."""

    exit_code = 3


class GateError(SamescoreError):
    """A variant's numbers are outside its tolerance."""

    exit_code = 1


class CanaryError(SamescoreError, RuntimeError):
    """The start-up canary tripped, or could not say, and the caller asked to refuse then."""

    exit_code = 1


class UsageError(SamescoreError, ValueError):
    """An argument names something that does not exist or cannot be combined."""

    exit_code = 2


class BundleError(SamescoreError, ValueError):
    """A bundle is missing, damaged, or of another schema."""


class CheckpointError(SamescoreError, ValueError):
    """A checkpoint is missing, gated, incomplete, or of an architecture that is not supported."""


class InputError(SamescoreError, ValueError):
    """One input cannot be scored; other inputs are unaffected."""


class GenerationError(SamescoreError, RuntimeError):
    """A model gave logits that no token can be chosen from; other prompts are unaffected."""


class ProviderError(SamescoreError, RuntimeError):
    """An execution provider that was asked for is not available or was not used."""

    exit_code = 4


class MissingDependencyError(SamescoreError, ImportError):
    """A package of an optional extra is not installed."""

    exit_code = 4


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` when `asked` is close to a known name, else the empty string."""
    close = get_close_matches(asked, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
