"""Bundles to scores and texts: numpy, tokenizers and onnxruntime, nothing else (and jinja2 for chat templates)."""

from samescore.runtime.bundle import Bundle
from samescore.runtime.canary import CanaryResult
from samescore.runtime.classifier import Classifier
from samescore.runtime.errors import (
    BundleError,
    CanaryError,
    CheckpointError,
    GateError,
    GenerationError,
    InputError,
    MissingDependencyError,
    ProviderError,
    SamescoreError,
    UsageError,
)
from samescore.runtime.generation.answer import Completion, Piece
from samescore.runtime.generation.generator import Generator
from samescore.runtime.generation.sampling import Sampling
from samescore.runtime.loading import load
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
    "Completion",
    "GateError",
    "GenerationError",
    "Generator",
    "InputError",
    "Manifest",
    "MissingDependencyError",
    "Piece",
    "Prediction",
    "ProviderError",
    "RewardFunction",
    "SamescoreError",
    "Sampling",
    "UsageError",
    "Variant",
    "load",
]
