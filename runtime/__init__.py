"""Bundles to scores: numpy, tokenizers and onnxruntime, nothing else."""

from samescore.runtime.bundle import Bundle
from samescore.runtime.canary import CanaryResult
from samescore.runtime.classifier import Classifier, load
from samescore.runtime.errors import (
    BundleError,
    CanaryError,
    CheckpointError,
    GateError,
    InputError,
    MissingDependencyError,
    ProviderError,
    SamescoreError,
    UsageError,
)
from samescore.runtime.manifest import Manifest, Variant
from samescore.runtime.prediction import Prediction
from samescore.runtime.reward import RewardFunction

__all__ = [
    "Bundle",
    "BundleError",
    "CanaryError",
    "CanaryResult",
    "CheckpointError",
    "Classifier",
    "GateError",
    "InputError",
    "Manifest",
    "MissingDependencyError",
    "Prediction",
    "ProviderError",
    "RewardFunction",
    "SamescoreError",
    "UsageError",
    "Variant",
    "load",
]
