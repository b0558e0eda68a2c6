"""Open a bundle for what it is made for."""

from __future__ import annotations

import os
from typing import Any

from samescore.runtime.bundle import Bundle
from samescore.runtime.classifier import Classifier
from samescore.runtime.generation.generator import Generator


def load(path: str | os.PathLike[str], **options: Any) -> Any:
    """A Classifier, or a Generator of a bundle that generates text; `options` are those of the class. Raises as they do."""
    with Bundle(path) as bundle:
        generates = bundle.manifest.generation is not None
    return Generator(path, **options) if generates else Classifier(path, **options)
