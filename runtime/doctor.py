"""The facts about this box that decide whether and how a bundle runs here: `examine`. What they mean: `doctor_findings`.

Nothing is concluded from names alone. A provider is "ready" when a session on it computed a product, in a process of its own
(`doctor_probe`); a library is missing when the dynamic loader says so; where nodes lie is what ONNX Runtime answers.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from samescore.runtime.bundle import Bundle
from samescore.runtime.cpu import cpu_model, int8_flags
from samescore.runtime.doctor_probe import BUNDLE_SECONDS, LOAD_SECONDS, Asked, ask
from samescore.runtime.errors import BundleError, SamescoreError
from samescore.runtime.installed import mixture, onnxruntime_distributions, plugin_distributions, version_of
from samescore.runtime.libraries import PROVIDER_LIBRARIES
from samescore.runtime.machine import Graphics, Limit, Memory, cpu_limits, environment, graphics, memory
from samescore.runtime.manifest import Manifest, Target, Variant
from samescore.runtime.providers import EXECUTION_PROVIDERS, provider_name
from samescore.runtime.threads import available_threads

# absent: not in this build. fails: in it, but a session on it cannot be made. loads: a session can be made, but does not
# compute. ready: it computed a product, and rightly.
State = Literal["absent", "fails", "loads", "ready"]


@dataclass(frozen=True)
class Software:
    """Versions; None where absent. distributions, plugins: package name → version. mixture: contradictions in the folder.

    providers: ONNX Runtime's names in this build. max_ir, max_opset: the newest it reads, None where it was not to be asked.
    problem: why onnxruntime cannot be imported, else None.
    """

    samescore: str | None
    python: str
    system: str
    numpy: str | None
    tokenizers: str | None
    onnxruntime: str | None
    folder: str | None
    distributions: Mapping[str, str]
    plugins: Mapping[str, str]
    mixture: tuple[str, ...]
    providers: tuple[str, ...]
    max_ir: int | None
    max_opset: int | None
    problem: str | None


@dataclass(frozen=True)
class Provider:
    """One target, or another provider that was asked for.

    missing: library → the loader's message, of all it is linked against. message: why it is not ready.
    """

    target: str
    name: str
    state: State
    missing: Mapping[str, str]
    message: str
    seconds: float


@dataclass(frozen=True)
class Processor:
    """threads: what samescore uses. limit: the tightest quota that applies, in CPUs.

    saturates: whether uint8 × int8 products clip, None where ONNX Runtime could not be asked.
    """

    model: str
    cores: int
    affinity: int
    limit: Limit | None
    threads: int
    int8_flags: tuple[str, ...]
    saturates: bool | None


@dataclass(frozen=True)
class PlacedNodes:
    """A variant on a provider that loads. nodes: count by ONNX Runtime provider name, None where this build does not tell.

    subgraphs: likewise, in how many pieces. strays: operators that compute elsewhere. problem: why there is no session.
    """

    target: str
    nodes: Mapping[str, int] | None
    subgraphs: Mapping[str, int]
    strays: Mapping[str, int]
    problem: str | None


@dataclass(frozen=True)
class VariantFacts:
    """A variant's file. size: bytes of graph and weights; ir and opset (of the standard domain): as the graph says."""

    name: str
    target: Target
    precision: str
    size: int
    ir: int | None
    opset: int | None
    placed: tuple[PlacedNodes, ...]


@dataclass(frozen=True)
class BundleFacts:
    """A bundle here. damaged: what is wrong with its files. chosen: what `load` takes, (variant, target), None if nothing.

    rejected: each other variant and why `load` does not take it. differs: what is not as where the bundle was certified; None
    where it was not to be told. canary: a CanaryResult's fields, None where `load` failed and for a model that generates
    text (`generates`), which has none. problem: why it took nothing or failed, with `code`, the exit code of that error where it
    is samescore's own.
    """

    path: str
    digest: str
    profile: str | None
    files: int
    size: int
    generates: bool
    damaged: tuple[str, ...]
    variants: tuple[VariantFacts, ...]
    chosen: tuple[str, str] | None
    rejected: Mapping[str, str]
    differs: tuple[str, ...] | None
    canary: Mapping[str, Any] | None
    problem: str | None
    code: int | None


@dataclass(frozen=True)
class Facts:
    """All of it. environment: the set variables that matter, name → value."""

    software: Software
    providers: tuple[Provider, ...]
    processor: Processor
    memory: Memory
    graphics: Graphics
    environment: Mapping[str, str]
    bundle: BundleFacts | None


def examine(
    path: str | os.PathLike[str] | None = None,
    *,
    provider: str = "auto",
    variant: str | None = None,
    timeout: float = LOAD_SECONDS,
) -> Facts:
    """The facts of this box and, with `path`, of a bundle on it, loaded with `provider` and `variant` as `load` takes them.

    timeout: seconds until a provider that does not answer is given up. BundleError when there is no bundle at `path`, UsageError
    when it has no such variant; everything else that is wrong becomes a fact.
    """
    with nullcontext() if path is None else Bundle(path) as bundle:
        if bundle is not None and variant is not None:
            bundle.manifest.variant(variant)
        build = ask("build", timeout=timeout)
        software = _software(build)
        targets = dict.fromkeys((*EXECUTION_PROVIDERS, *([] if provider == "auto" else [provider])))
        providers = tuple(_provider(target, software, timeout) for target in targets)
        held = memory()
        facts = None if bundle is None else _bundle(bundle, providers, held, provider, variant)
    return Facts(software, providers, _processor(build), held, graphics(), environment(os.environ), facts)


def _software(build: Asked) -> Software:
    distributions, said = onnxruntime_distributions(), build.facts
    mixed: tuple[str, ...] = ()
    if len(distributions) == 1 and "folder" in said:
        name, version = next(iter(distributions.items()))
        mixed = mixture(name, version, Path(said["folder"]), said["version"])
    return Software(
        samescore=version_of("samescore"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        numpy=version_of("numpy"),
        tokenizers=version_of("tokenizers"),
        onnxruntime=said.get("version"),
        folder=said.get("folder"),
        distributions=distributions,
        plugins=plugin_distributions(),
        mixture=mixed,
        providers=tuple(said.get("providers", ())),
        max_ir=said.get("ir"),
        max_opset=said.get("opset"),
        problem=None if "version" in said else said.get("error") or build.died or "it said nothing",
    )


def _provider(target: str, software: Software, timeout: float) -> Provider:
    name = provider_name(target)
    if name not in software.providers:
        return Provider(target, name, "absent", {}, "not in this ONNX Runtime build", 0.0)
    asked = ask("load", target, timeout=timeout)
    said = asked.facts
    if said.get("product"):
        if said["first"] == name:
            return Provider(target, name, "ready", {}, "", asked.seconds)
    elif said.get("first") == name:
        wrong = "a product of two small matrices came out wrong"
        message = _words(said.get("error")) or asked.died or wrong
        return Provider(
            target, name, "loads", {}, f"a session can be made, but does not compute: {message}", asked.seconds
        )
    missing: dict[str, str] = {}
    library = Path(software.folder or "") / "capi" / PROVIDER_LIBRARIES.get(name, "")
    if name in PROVIDER_LIBRARIES and library.is_file():
        missing = dict(ask("libraries", str(library), target, timeout=timeout).facts.get("missing", {}))
    message = asked.died or _loader_words(asked.errors) or _words(said.get("error"))
    if not message:
        message = f"ONNX Runtime fell back to {said.get('first', 'nothing')} without saying why"
    return Provider(target, name, "fails", missing, message, asked.seconds)


def _processor(build: Asked) -> Processor:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Processor(
        model=cpu_model(),
        cores=os.cpu_count() or 1,
        affinity=affinity,
        limit=cpu_limits(),
        threads=available_threads(),
        int8_flags=int8_flags(),
        saturates=build.facts.get("saturates"),
    )


def computes(target: str, timeout: float = LOAD_SECONDS) -> bool:
    """Whether a provider of this ONNX Runtime really multiplies two small matrices here, tried in a process of its own."""
    said = ask("load", target, timeout=timeout).facts
    return bool(said.get("product")) and said["first"] == provider_name(target)


def _bundle(
    bundle: Bundle, providers: Sequence[Provider], held: Memory, provider: str, variant: str | None
) -> BundleFacts:
    manifest, path = bundle.manifest, os.fspath(bundle.path)
    damaged = _damaged(bundle)
    loading = [p.target for p in providers if p.state in ("loads", "ready")]
    variants = tuple(_variant(bundle, v, [] if damaged else loading, held) for v in manifest.variants)
    started = Asked({"error": "its files are damaged", "code": 3}, None, "", 0.0)
    if not damaged:
        started = ask("start", path, provider, variant or "", str(held.available), timeout=BUNDLE_SECONDS)
    said = started.facts
    chosen: tuple[str, str] | None = (said["variant"], said["target"]) if "variant" in said else None
    why = None if "canary" in said else said.get("error") or started.died
    return BundleFacts(
        path=path,
        digest=bundle.digest,
        profile=manifest.profile,
        files=len(manifest.files),
        size=sum(entry.size for entry in manifest.files.values()),
        generates=manifest.generation is not None,
        damaged=damaged,
        variants=variants,
        chosen=chosen,
        rejected=_rejected(manifest, providers, chosen, said, provider, variant),
        differs=_differs(said["certified"], said["here"]) if "here" in said else None,
        canary=said.get("canary"),
        problem=why,
        code=said.get("code") if why else None,
    )


def _damaged(bundle: Bundle) -> tuple[str, ...]:
    """What is wrong with each file, not only with the first."""
    wrong = []
    for name in bundle.manifest.files:
        try:
            bundle.map(name).close()
        except BundleError as error:
            wrong.append(str(error))
    return tuple(wrong)


def _variant(bundle: Bundle, variant: Variant, loading: Sequence[str], held: Memory) -> VariantFacts:
    size = sum(bundle.manifest.files[name].size for name in (variant.model, *variant.data))
    try:
        ir, opset = read_versions(bundle.read(variant.model))
    except SamescoreError:
        ir = opset = None
    placed = []
    for target in loading:
        if 0 < held.available < size:
            problem = f"not opened: it holds {size / 1e9:.1f} GB, and {held.available / 1e9:.1f} GB of memory are left"
            placed.append(PlacedNodes(target, None, {}, {}, problem))
        else:
            placed.append(_placed(os.fspath(bundle.path), variant.name, target))
    return VariantFacts(variant.name, variant.target, variant.precision, size, ir, opset, tuple(placed))


def _placed(path: str, variant: str, target: str) -> PlacedNodes:
    asked = ask("place", path, variant, target, timeout=BUNDLE_SECONDS)
    said = asked.facts
    problem = None
    if "first" not in said:
        problem = _words(said.get("error")) or asked.died or "no answer"
    elif said["first"] != provider_name(target):
        problem = f"ONNX Runtime fell back to {said['first']}"
    return PlacedNodes(target, said.get("nodes"), said.get("subgraphs", {}), said.get("strays", {}), problem)


def _rejected(
    manifest: Manifest,
    providers: Sequence[Provider],
    chosen: tuple[str, str] | None,
    said: Mapping[str, Any],
    provider: str,
    variant: str | None,
) -> dict[str, str]:
    """Why `load` does not take each other variant; what it gave up itself, it said itself."""
    state = {p.target: p for p in providers}
    reasons: dict[str, str] = dict(said.get("rejected", {}))
    if chosen is None and "tried" in said:
        reasons[said["tried"][0]] = f"{said['tried'][1]} was tried and failed"
    for other in manifest.variants:
        if other.name in reasons or (chosen is not None and other.name == chosen[0]):
            continue
        if variant is not None:
            reasons[other.name] = f"{variant} was asked for"
        elif chosen is not None and other.target == chosen[1]:
            reasons[other.name] = f"{chosen[0]} stands before it in the bundle; name it with --variant"
        elif provider != "auto" and (chosen is None or other.target != chosen[1]):
            reasons[other.name] = f"it is for {other.target}, and {provider} was asked for"
        elif state[other.target].state == "absent":
            reasons[other.name] = f"{other.target} is not in this ONNX Runtime build"
        elif state[other.target].state != "ready":
            reasons[other.name] = f"{other.target} is not ready: {state[other.target].message}"
        elif chosen is not None:
            reasons[other.name] = f"{chosen[1]} is preferred to {other.target}"
    return reasons


def read_versions(graph: bytes) -> tuple[int | None, int | None]:
    """IR version and opset of the standard domain of a serialized ModelProto (fields 1 and 8 of onnx.proto), None if absent."""
    ir = opset = None
    for field, value in _fields(graph):
        if field == 1 and isinstance(value, int):
            ir = value
        elif field == 8 and isinstance(value, bytes):
            entry = dict(_fields(value))
            if not entry.get(1) and isinstance(entry.get(2), int):
                opset = int(entry[2])
    return ir, opset


def _fields(message: bytes) -> list[tuple[int, int | bytes]]:
    """Field number and value of a protobuf message's own fields (varint and length-delimited ones), not of those inside."""
    found: list[tuple[int, int | bytes]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    try:
        while at < len(message):
            key = varint()
            value: int | bytes = varint()
            if key & 7 == 2:
                length = int(value)
                value, at = message[at : at + length], at + length
            elif key & 7 != 0:
                break
            found.append((key >> 3, value))
    except IndexError:
        pass
    return found


def _differs(there: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    def words(value: Any) -> str:
        return (", ".join(value) or "none") if isinstance(value, list | tuple) else str(value)

    return tuple(f"{name} {words(now[name])} (was {words(there[name])})" for name in there if there[name] != now[name])


def _words(error: str | None) -> str:
    """An error of ONNX Runtime without the place in its source: the loader's part where there is one, else its first line."""
    text = error or ""
    return (
        _loader_words(text)
        or re.sub(r"^.*?\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text.strip().partition("\n")[0])[:300]
    )


def _loader_words(text: str) -> str:
    found = re.search(r"with error: (.+)", text)
    return found.group(1).strip() if found else ""
