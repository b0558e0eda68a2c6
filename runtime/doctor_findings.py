"""What the doctor's facts mean: numbered findings, each with what to type next, and the exit code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from samescore.runtime.doctor import Facts, Provider, VariantFacts
from samescore.runtime.machine import ALARMING, CUDA_DRIVER, ROOT, VARIABLES
from samescore.runtime.manifest import Target
from samescore.runtime.opening import MIGRAPHX_PRECISION, NO_EFFICIENT_ATTENTION

EXIT_CANARY, EXIT_BUNDLE, EXIT_PROVIDER = 1, 3, 4
# Newest format that MIGraphX 2.15's parser and AMD's older ONNX Runtime builds are known to read.
PORTABLE_IR, PORTABLE_OPSET = 10, 21

_CUDA_LIBRARY = re.compile(r"lib(cublas|cublasLt|cudart|curand|cufft|cudnn|nvrtc)\b")
_ROCM_LIBRARY = re.compile(r"lib(migraphx|amdhip|hsa-|hip|MIOpen|roc|amd_comgr)")
# Where libraries are that the dynamic loader was never told of.
_USUAL_FOLDERS = (
    "opt/rocm*/lib",
    "opt/rocm*/lib/migraphx/lib",
    "usr/local/cuda*/lib64",
    "usr/local/cuda*/lib",
    "usr/lib/wsl/lib",
)


@dataclass(frozen=True)
class Finding:
    """A problem and what to type next, one thing per line. code: the exit code it causes; 0 where scoring works all the same."""

    problem: str
    advice: str
    code: int = 0


def diagnose(facts: Facts, asked: str = "auto") -> tuple[Finding, ...]:
    """The findings, those that stop scoring first. asked: `auto` or the target that must be ready."""
    found = [
        *_software(facts),
        *_providers(facts, asked),
        *_graphics(facts),
        *_environment(facts),
    ]
    blocked = any(finding.code == EXIT_PROVIDER for finding in found)
    found += _bundle(facts, blocked)
    return tuple(sorted(found, key=lambda finding: -finding.code))


def exit_code(findings: tuple[Finding, ...]) -> int:
    """The largest code of all findings: 4 no usable provider, 3 a damaged bundle, 1 a tripped canary, 0 usable."""
    return max((finding.code for finding in findings), default=0)


def _software(facts: Facts) -> Iterator[Finding]:
    software = facts.software
    names = " ".join(software.distributions)
    if len(software.distributions) > 1:
        yield Finding(
            f"{len(software.distributions)} ONNX Runtime packages are installed and overwrite each other: "
            + ", ".join(f"{name} {version}" for name, version in software.distributions.items()),
            f"keep one: pip uninstall -y {names} && pip install '{_extra(_likely(facts))}'",
            EXIT_PROVIDER,
        )
    elif software.mixture:
        yield Finding(
            f"the folder {software.folder} is a mixture: {'; '.join(software.mixture)}",
            f"pip uninstall -y {names} && rm -r {software.folder}, then pip install '{_extra(_likely(facts))}'",
        )
    if software.problem and not software.distributions:
        yield Finding("ONNX Runtime is not installed", f"pip install '{_extra(_likely(facts))}'", EXIT_PROVIDER)
    elif software.problem:
        yield Finding(
            f"ONNX Runtime cannot be imported: {software.problem}",
            f"pip uninstall -y {names} && pip install '{_extra(_likely(facts))}'",
            EXIT_PROVIDER,
        )
    if software.plugins:
        yield Finding(
            f"provider plugins are installed, and `auto` does not use them: {', '.join(software.plugins)}",
            "to use one: onnxruntime.register_execution_provider_library(name, path), then load(…, provider=name)",
        )


def _providers(facts: Facts, asked: str) -> Iterator[Finding]:
    if facts.software.problem:
        return
    none_ready = not any(provider.state == "ready" for provider in facts.providers)
    for provider in facts.providers:
        blocks = none_ready if asked == "auto" else provider.target == asked
        code = EXIT_PROVIDER if blocks and provider.state != "ready" else 0
        if provider.state == "absent":
            if provider.target == asked:
                yield Finding(
                    f"provider {asked} was asked for, but is not in this ONNX Runtime build",
                    _install(facts, asked),
                    code,
                )
        elif provider.state != "ready":
            why = f"libraries are missing: {', '.join(provider.missing)}" if provider.missing else provider.message
            yield Finding(f"provider {provider.target} does not work: {why}", _repair(provider), code)


def _repair(provider: Provider) -> str:
    """What to type for libraries that are missing; where they lie although the loader does not look there."""
    advice = []
    names = list(provider.missing)
    folders = sorted({str(folder) for name in names for folder in lying_about(name)})
    if folders:
        advice.append(f"some are in folders that are not searched: export LD_LIBRARY_PATH={':'.join(folders)}")
    if any(name.startswith("libcuda.") for name in names):
        advice.append(
            f"install the NVIDIA driver, {CUDA_DRIVER} or newer (libcuda is part of it; in a container: start it with --gpus all)"
        )
    if any(_CUDA_LIBRARY.match(name) for name in names):
        advice.append("pip install 'samescore[cuda]' (brings CUDA 13's libraries), or install the CUDA 13 toolkit")
    if any(_ROCM_LIBRARY.match(name) for name in names):
        advice.append("install ROCm 7.2 with MIGraphX (AMD's package repository: apt install rocm migraphx)")
    if advice:
        return "\n".join(advice)
    if names:
        return f"install the packages that hold {', '.join(names)}, or name their folder in LD_LIBRARY_PATH"
    return {
        "cuda": "nvidia-smi (does the driver see the GPU?)",
        "migraphx": "rocminfo (does the driver see the GPU?)",
        "cpu": "install ONNX Runtime again: pip install --force-reinstall 'samescore[cpu]'",
    }.get(provider.target, "see the provider's own documentation")


def lying_about(name: str, root: Path = ROOT) -> list[Path]:
    """Folders with a library of exactly this name, among the usual ones that a loader is often not told of."""
    return [folder for pattern in _USUAL_FOLDERS for folder in sorted(root.glob(pattern)) if (folder / name).is_file()]


def _graphics(facts: Facts) -> Iterator[Finding]:
    cards, offered = facts.graphics, {p.target for p in facts.providers if p.state != "absent"}
    targets: tuple[tuple[Target, tuple[str, ...]], ...] = (("cuda", cards.nvidia), ("migraphx", cards.amd))
    for target, found in targets:
        if found and facts.software.onnxruntime and target not in offered:
            yield Finding(
                f"this box has {', '.join(found)}, but this ONNX Runtime build has no {target} provider",
                _install(facts, target),
            )
    if cards.nvidia and cards.nvidia_driver is None:
        yield Finding(
            "an NVIDIA card is there, but its driver is not loaded", "install the NVIDIA driver; then: nvidia-smi"
        )
    elif cards.nvidia_driver and int(cards.nvidia_driver.partition(".")[0]) < CUDA_DRIVER:
        yield Finding(
            f"the NVIDIA driver is {cards.nvidia_driver}; CUDA 13 (samescore[cuda]) needs {CUDA_DRIVER} or newer",
            f"install a driver of the {CUDA_DRIVER} branch or newer",
        )
    if cards.amd and cards.kfd is None:
        yield Finding(
            "an AMD card is there, but /dev/kfd is not",
            "load the amdgpu driver (in a container: start it with --device /dev/kfd --device /dev/dri)",
        )
    elif cards.kfd is False:
        yield Finding(
            "/dev/kfd may not be opened by this user, so that ROCm sees no GPU",
            "sudo usermod -aG render,video $USER, then log in again (in a container: --group-add render)",
        )


def _environment(facts: Facts) -> Iterator[Finding]:
    for name, value in facts.environment.items():
        off = name != "HSA_OVERRIDE_GFX_VERSION" and value in ("0", "")
        if name in ALARMING and not off:
            refused = {**dict.fromkeys(MIGRAPHX_PRECISION, "MIGraphX"), NO_EFFICIENT_ATTENTION: "CUDA"}.get(name)
            then = f"samescore refuses {refused} with it" if refused else "scores may not be the certified ones"
            yield Finding(f"{name}={value} is set: {VARIABLES[name]}; {then}", f"unset {name}")
    hidden = [
        name
        for name, target in (("CUDA_VISIBLE_DEVICES", "cuda"), ("HIP_VISIBLE_DEVICES", "migraphx"))
        if facts.environment.get(name) in ("", "-1")
        and any(p.target == target and p.state != "absent" for p in facts.providers)
    ]
    for name in hidden:
        yield Finding(f"{name}={facts.environment[name]!r} hides every GPU", f"unset {name}")


def _bundle(facts: Facts, blocked: bool) -> Iterator[Finding]:
    """blocked: another finding already says why nothing can be loaded."""
    bundle = facts.bundle
    if bundle is None:
        return
    for wrong in bundle.damaged:
        yield Finding(wrong, "copy or export the bundle again", EXIT_BUNDLE)
    if bundle.damaged:
        return
    for variant in bundle.variants:
        yield from _variant(facts, variant)
    if bundle.problem and not blocked:
        yield Finding(
            f"load fails: {bundle.problem.strip()}",
            _other_way(facts),
            bundle.code or EXIT_PROVIDER,
        )
    elif bundle.canary and bundle.canary["status"] == "tripped":
        yield Finding(
            f"the canary of {bundle.chosen[0] if bundle.chosen else ''} tripped: {bundle.canary['reason']}",
            f"samescore verify {bundle.path}",
            EXIT_CANARY,
        )
    elif bundle.canary and bundle.canary["status"] == "skipped" and bundle.differs:
        yield Finding(f"the canary could not say: {bundle.canary['reason']}", f"samescore verify {bundle.path}")


def _variant(facts: Facts, variant: VariantFacts) -> Iterator[Finding]:
    software, left = facts.software, facts.memory.available
    for what, value, most in (("IR", variant.ir, software.max_ir), ("opset", variant.opset, software.max_opset)):
        if value and most and value > most:
            yield Finding(
                f"{variant.name} has {what} {value}; ONNX Runtime {software.onnxruntime} reads up to {most}",
                _install(facts, variant.target),
            )
    if variant.target == "migraphx" and ((variant.ir or 0) > PORTABLE_IR or (variant.opset or 0) > PORTABLE_OPSET):
        yield Finding(
            f"{variant.name} has IR {variant.ir} and opset {variant.opset}; MIGraphX files need IR ≤ {PORTABLE_IR}, opset ≤ "
            f"{PORTABLE_OPSET}",
            "export it again with this samescore",
        )
    if 0 < left < variant.size:
        yield Finding(
            f"{variant.name} holds {variant.size / 1e9:.1f} GB of weights, and {left / 1e9:.1f} GB of memory are left",
            "a smaller variant (--variant), --low-memory, or a larger memory limit",
        )
    for placed in variant.placed:
        if placed.target != variant.target:
            continue
        if placed.strays:
            yield Finding(
                f"{variant.name} on {placed.target}: operators that compute lie on the CPU: {counted(placed.strays)}",
                "export it again with this samescore, or name another --variant",
            )
        elif placed.problem:
            yield Finding(f"{variant.name} cannot be opened on {placed.target}: {placed.problem}", _other_way(facts))


def counted(operators: Mapping[str, int], most: int = 6) -> str:
    """`13 MatMul, 2 Gelu`; of a long list the first ones and how many nodes follow."""
    shown = [f"{count} {name}" for name, count in list(operators.items())[:most]]
    rest = sum(list(operators.values())[most:])
    return ", ".join(shown) + (f" and {rest} others" if rest else "")


def _other_way(facts: Facts) -> str:
    ready = {p.target for p in facts.providers if p.state == "ready"}
    bundle = facts.bundle
    fitting = [v for v in bundle.variants if v.target in ready] if bundle else []
    if bundle and fitting:
        work = "generate" if bundle.generates else "classify"
        return f"samescore {work} {bundle.path} --provider {fitting[0].target} --variant {fitting[0].name} …"
    return "see the findings on providers, or export a variant for a provider that is ready"


def _install(facts: Facts, target: str) -> str:
    return (
        f"pip uninstall -y {' '.join(facts.software.distributions) or 'onnxruntime'} && pip install '{_extra(target)}'"
    )


def _extra(target: str) -> str:
    return f"samescore[{target}]"


def _likely(facts: Facts) -> str:
    """The extra that suits the cards of this box."""
    if facts.graphics.nvidia:
        return "cuda"
    return "migraphx" if facts.graphics.amd else "cpu"
