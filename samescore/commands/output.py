"""What commands share: exit codes, output files that appear whole or not at all, and words for numbers."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samescore.runtime.errors import UsageError

EXIT_OK, EXIT_GATE, EXIT_USE, EXIT_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


@contextmanager
def output(path: str | None) -> Iterator[Callable[[str], Any]]:
    """A function that writes text to stdout, or to a file that appears whole or not at all."""
    if path is None:
        yield sys.stdout.write
        return
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is no folder; make it first, or choose another -o")
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=f".{target.name}.", delete=False
    ) as file:
        try:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def print_json(document: Any) -> None:
    """A document for programs, on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def label_mass(reference: Mapping[str, Any]) -> str | None:
    """The reference's label mass in words; None for a model with a trained head, and where it was not measured."""
    if reference["label_mass_mean"] is None:
        return None
    mean, least = reference["label_mass_mean"], reference["label_mass_min"]
    return f"mean {mean:.4f}, least {least:.4f} of the next token's probability is on the labels"
