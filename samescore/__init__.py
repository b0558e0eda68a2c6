"""Export once, run anywhere, and prove that the score is the same.

from samescore import load

classifier = load("bundles/refusal")
classifier("<|user|>…<|assistant|>…")     # Prediction(label, probability, probabilities, logits, …)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samescore.calibrating import CalibrationResult, calibrate_bundle
    from samescore.comparing import CompareResult, compare
    from samescore.exporting import ExportResult, export_bundle
    from samescore.generating import GeneratorExport, export_generator
    from samescore.runtime import Classifier, Completion, Generator, Prediction, RewardFunction, SamescoreError, load
    from samescore.verifying import VerifyResult, verify

__version__ = "0.1.0"

# `samescore.export` is the room that makes bundles, so the function that runs it is `export_bundle`.
# Name → module: imported on first use, so that scoring never loads what only export needs.
_HOMES = {
    "CalibrationResult": "samescore.calibrating",
    "Classifier": "samescore.runtime",
    "CompareResult": "samescore.comparing",
    "Completion": "samescore.runtime",
    "ExportResult": "samescore.exporting",
    "Generator": "samescore.runtime",
    "GeneratorExport": "samescore.generating",
    "Prediction": "samescore.runtime",
    "RewardFunction": "samescore.runtime",
    "SamescoreError": "samescore.runtime",
    "VerifyResult": "samescore.verifying",
    "compare": "samescore.comparing",
    "calibrate_bundle": "samescore.calibrating",
    "export_bundle": "samescore.exporting",
    "export_generator": "samescore.generating",
    "load": "samescore.runtime",
    "verify": "samescore.verifying",
}

__all__ = [
    "CalibrationResult",
    "Classifier",
    "CompareResult",
    "Completion",
    "ExportResult",
    "Generator",
    "GeneratorExport",
    "Prediction",
    "RewardFunction",
    "SamescoreError",
    "VerifyResult",
    "__version__",
    "calibrate_bundle",
    "compare",
    "export_bundle",
    "export_generator",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'samescore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
