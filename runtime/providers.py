"""Which execution provider runs a bundle. Choices fail closed: nothing falls back to another provider in silence."""

from __future__ import annotations

import importlib
import logging
from importlib import metadata
from types import ModuleType

from samescore.runtime.errors import MissingDependencyError, ProviderError, UsageError, did_you_mean
from samescore.runtime.manifest import Manifest, Target, Variant

log = logging.getLogger(__name__)

# Preference order of `auto`, and the name ONNX Runtime uses.
EXECUTION_PROVIDERS: dict[Target, str] = {
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
ALIASES: dict[str, Target] = {"rocm": "migraphx"}
PROVIDER_NAMES = ("auto", *EXECUTION_PROVIDERS, *ALIASES)

ORT_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-migraphx", "onnxruntime-rocm")
_EXTRA_OF: dict[Target, str] = {"cpu": "cpu", "cuda": "cuda", "migraphx": "migraphx"}


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, when exactly one distribution of it is installed.

    All distributions write the same folder, so two of them are an unknown mixture of both.
    """
    installed = installed_distributions()
    if len(installed) > 1:
        raise ProviderError(
            f"{len(installed)} ONNX Runtime packages are installed ({', '.join(installed)}) and overwrite each other. "
            f"Keep one: pip uninstall -y {' '.join(installed)} && pip install 'samescore[cpu]' (or [cuda], [migraphx])"
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        detail = f" ({error})" if installed else ""
        raise MissingDependencyError(
            f"ONNX Runtime is not installed{detail}. Choose one: pip install 'samescore[cpu]', 'samescore[cuda]' or "
            "'samescore[migraphx]'"
        ) from error


def installed_distributions() -> list[str]:
    """The ONNX Runtime distributions that package metadata lists as installed."""
    found = []
    for name in ORT_DISTRIBUTIONS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return found


def normalize_provider(name: str) -> str:
    """`auto` or a target name; UsageError for anything else."""
    lowered = name.lower()
    if lowered not in PROVIDER_NAMES:
        raise UsageError(
            f"unknown provider {name!r}; providers are {', '.join(PROVIDER_NAMES)}.{did_you_mean(lowered, PROVIDER_NAMES)}"
        )
    return ALIASES.get(lowered, lowered)


def choose(manifest: Manifest, *, provider: str = "auto", variant: str | None = None) -> tuple[Variant, Target]:
    """The variant to load and the target to run it on.

    An explicit provider must be in this ONNX Runtime build, an explicit variant in the bundle; `auto` takes the best
    target that this build offers and the bundle has a variant for, and logs the choice.
    """
    asked = normalize_provider(provider)
    wanted = manifest.variant(variant) if variant is not None else None
    offered = available_targets()
    if asked != "auto":
        target = next(t for t in EXECUTION_PROVIDERS if t == asked)
        require(target)
        return wanted or _variant_for(manifest, target), target
    if wanted is not None:
        # A portable (migraphx) file is plain ONNX: any provider can read it, but never by a silent choice.
        require(wanted.target)
        return wanted, wanted.target
    for target in EXECUTION_PROVIDERS:
        matching = [v for v in manifest.variants if v.target == target]
        if target in offered and matching:
            log.info(
                "provider auto: %s with variant %s (this build offers %s)", target, matching[0].name, ", ".join(offered)
            )
            return matching[0], target
    have = ", ".join(f"{v.name} (for {v.target})" for v in manifest.variants)
    raise ProviderError(
        f"no variant of this bundle fits this box: it holds {have}; this ONNX Runtime offers {', '.join(offered)}. "
        "Export a variant for it, or name one with --variant and --provider"
    )


def _variant_for(manifest: Manifest, target: Target) -> Variant:
    matching = [v for v in manifest.variants if v.target == target]
    if not matching:
        have = ", ".join(f"{v.name} (for {v.target})" for v in manifest.variants)
        raise ProviderError(
            f"provider {target!r} was asked for, but this bundle holds no variant for it: {have}. "
            f"Name one of these with --variant to run it on {target} all the same"
        )
    return matching[0]


def available_targets() -> list[Target]:
    """The targets that this ONNX Runtime build was compiled with, best first."""
    names = import_onnxruntime().get_available_providers()
    return [target for target, name in EXECUTION_PROVIDERS.items() if name in names]


def require(target: Target) -> None:
    """ProviderError unless this ONNX Runtime build has the target's provider."""
    offered = available_targets()
    if target not in offered:
        version, installed = import_onnxruntime().__version__, " ".join(installed_distributions()) or "onnxruntime"
        raise ProviderError(
            f"provider {target!r} is not in this ONNX Runtime build ({installed} {version} offers {', '.join(offered)}). "
            f"Install the other build: pip uninstall -y {installed} && pip install 'samescore[{_EXTRA_OF[target]}]'"
        )
