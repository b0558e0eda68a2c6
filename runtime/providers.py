"""Which execution provider runs a bundle. Choices fail closed: nothing falls back to another provider in silence."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar

from samescore.runtime.errors import MissingDependencyError, ProviderError, UsageError, did_you_mean
from samescore.runtime.manifest import Manifest, Target, Variant

log = logging.getLogger(__name__)

T = TypeVar("T")

# Preference order of `auto`, and the name ONNX Runtime uses.
EXECUTION_PROVIDERS: dict[Target, str] = {
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
ALIASES: dict[str, Target] = {"rocm": "migraphx"}
PROVIDER_NAMES = ("auto", *EXECUTION_PROVIDERS, *ALIASES)

# Every distribution that installs the folder `onnxruntime`. Plugins (onnxruntime-ep-…) have folders of their own.
ORT_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-cann",
    "onnxruntime-training",
)
_EXTRA_OF: dict[str, str] = {"cpu": "cpu", "cuda": "cuda", "migraphx": "migraphx"}
_SUFFIX = "ExecutionProvider"


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
    """`auto`, a target, or another provider's ONNX Runtime name, of those that this ONNX Runtime lists.

    Case does not matter and `ExecutionProvider` may be left out: `openvino` is `OpenVINOExecutionProvider`. UsageError for
    a name that neither samescore nor this ONNX Runtime knows.
    """
    lowered = name.lower().removesuffix(_SUFFIX.lower())
    if lowered in PROVIDER_NAMES:
        return ALIASES.get(lowered, lowered)
    others = other_providers()
    for other in others:
        if lowered == other.removesuffix(_SUFFIX).lower():
            return other
    known = (*PROVIDER_NAMES, *(other.removesuffix(_SUFFIX).lower() for other in others))
    raise UsageError(
        f"unknown provider {name!r}; providers are {', '.join(known)}.{did_you_mean(lowered, known)} "
        "A plugin must be registered first: onnxruntime.register_execution_provider_library(name, path)"
    )


def provider_name(target: str) -> str:
    """ONNX Runtime's name of a target; another provider's name is returned as it is."""
    return next((name for known, name in EXECUTION_PROVIDERS.items() if known == target), target)


def candidates(manifest: Manifest, *, provider: str = "auto", variant: str | None = None) -> list[tuple[Variant, str]]:
    """The variants to try, best first, each with what to run it on: a target, or another provider's ONNX Runtime name.

    An explicit provider must be in this ONNX Runtime build, an explicit variant in the bundle; with either there is one
    candidate. `auto` alone gives one for every target that this build offers and the bundle has a variant for.

    A provider that is no target (a plugin such as OpenVINO) has no variant of its own. It runs the explicit variant, else the
    portable one (plain ONNX, made for MIGraphX), else cpu-fp32, which holds operators of ONNX Runtime's own and therefore
    may not fit it; the placement tells.
    """
    asked = normalize_provider(provider)
    wanted = manifest.variant(variant) if variant is not None else None
    if asked != "auto":
        require(asked)
        return [(wanted or _variant_for(manifest, asked), asked)]
    if wanted is not None:
        # A portable (migraphx) file is plain ONNX: any provider can read it, but never by a silent choice.
        require(wanted.target)
        return [(wanted, wanted.target)]
    offered = available_targets()
    found: list[tuple[Variant, str]] = []
    for target in offered:
        found += [(v, target) for v in manifest.variants if v.target == target][:1]
    if not found:
        raise ProviderError(
            f"no variant of this bundle fits this box: it holds {_held(manifest)}; this ONNX Runtime offers "
            f"{', '.join(offered)}. Export a variant for it, or name one with --variant and --provider"
        )
    return found


def choose(manifest: Manifest, *, provider: str = "auto", variant: str | None = None) -> tuple[Variant, str]:
    """The first of `candidates`: the variant to load and what to run it on. `auto` logs the choice."""
    chosen, target = candidates(manifest, provider=provider, variant=variant)[0]
    if provider == "auto" and variant is None:
        log_choice(chosen, target)
    return chosen, target


def open_first(
    manifest: Manifest, provider: str, variant: str | None, attempt: Callable[[Variant, str, bool], T]
) -> tuple[Variant, str, T, dict[str, str]]:
    """The first of `candidates` that opens here, what it runs on, what `attempt` made of it, and why those before it did not.

    attempt: given a variant, what to run it on, and whether nothing else is left; raises ProviderError where that does not work
    here. `auto` then logs a warning and takes the next; the last error is raised.
    """
    found = candidates(manifest, provider=provider, variant=variant)
    rejected: dict[str, str] = {}
    for number, (chosen, target) in enumerate(found, start=1):
        try:
            opened = attempt(chosen, target, number == len(found))
        except ProviderError as error:
            if number == len(found):
                raise
            rejected[chosen.name] = f"{target} does not work here: {error}"
            log.warning("provider auto: %s does not work here, trying %s: %s", target, found[number][1], error)
            continue
        if provider == "auto" and variant is None:
            log_choice(chosen, target)
        return chosen, target, opened, rejected
    raise AssertionError("candidates is never empty")


def log_choice(chosen: Variant, target: str) -> None:
    """Log what `auto` took."""
    offered = ", ".join(available_targets())
    log.info("provider auto: %s with variant %s (this build offers %s)", target, chosen.name, offered)


def _held(manifest: Manifest) -> str:
    return ", ".join(f"{v.name} (for {v.target})" for v in manifest.variants)


def _variant_for(manifest: Manifest, target: str) -> Variant:
    matching = [v for v in manifest.variants if v.target == target]
    if target not in EXECUTION_PROVIDERS:
        matching = [v for v in manifest.variants if v.target == "migraphx"]
        matching += [v for v in manifest.variants if v.target == "cpu" and v.precision == "fp32"]
    if not matching:
        raise ProviderError(
            f"provider {target!r} was asked for, but this bundle holds no variant for it: {_held(manifest)}. "
            f"Name one of these with --variant to run it on {target} all the same"
        )
    return matching[0]


def available_targets() -> list[Target]:
    """The targets that this ONNX Runtime build was compiled with, best first."""
    names = import_onnxruntime().get_available_providers()
    return [target for target, name in EXECUTION_PROVIDERS.items() if name in names]


def other_providers() -> list[str]:
    """ONNX Runtime's names of the providers that are no target: built in, or registered as plugins with a device here."""
    ort = import_onnxruntime()
    names = list(ort.get_available_providers()) + [device.ep_name for device in plugin_devices(ort)]
    return sorted(set(names) - set(EXECUTION_PROVIDERS.values()))


def plugin_devices(ort: ModuleType, name: str | None = None) -> list[Any]:
    """The devices of one or every provider as ONNX Runtime's plugin interface lists them; none before that existed."""
    listed = getattr(ort, "get_ep_devices", None)
    return [device for device in (listed() if listed else ()) if name is None or device.ep_name == name]


def require(target: str) -> None:
    """ProviderError unless this ONNX Runtime build has the provider of a target, or that other provider."""
    offered = [*available_targets(), *other_providers()]
    if target in offered:
        return
    version, installed = import_onnxruntime().__version__, " ".join(installed_distributions()) or "onnxruntime"
    extra = _EXTRA_OF.get(target)
    remedy = (
        f"Install the other build: pip uninstall -y {installed} && pip install 'samescore[{extra}]'"
        if extra
        else "Register its plugin first: onnxruntime.register_execution_provider_library(name, path)"
    )
    raise ProviderError(
        f"provider {target!r} is not in this ONNX Runtime build ({installed} {version} offers {', '.join(offered)}). {remedy}"
    )
