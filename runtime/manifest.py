"""`bundle.json`: what a bundle is, written and parsed strictly.

The manifest is dumb JSON of at most 1 MB. Every key is a field of a frozen dataclass below; an unknown key, a missing key
or a value of the wrong type is an error that names its place (`variants[0].target`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from samescore.runtime.contract import TextContract, template_error
from samescore.runtime.errors import BundleError, UsageError, did_you_mean
from samescore.runtime.recalibration import Recalibration, problem_of

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
MANIFEST_LIMIT = 1_000_000

Target = Literal["cpu", "cuda", "migraphx"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
Activation = Literal["softmax", "sigmoid"]

# The sampling defaults that a manifest may hold, and what each must be.
SAMPLING: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "do_sample": ("0 or 1", lambda value: value in (0, 1)),
    "temperature": ("at least 0", lambda value: value >= 0),
    "top_k": ("a whole number, at least 0", lambda value: value >= 0 and value == int(value)),
    "top_p": ("above 0, at most 1", lambda value: 0 < value <= 1),
    "min_p": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("above 0", lambda value: value > 0),
}
# Marks a field that older bundles lack.
OPTIONAL = "optional"

_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BaseSource:
    """The checkpoint that an adapter lies on; the fields are as in `Source`, the digest is the base's alone."""

    kind: Literal["hub", "folder"]
    name: str
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the weights came from. `revision` is a 40-hex commit for a hub source, else None.

    `sha256` digests the checkpoint's config, tokenizer and safetensors files, so that reference numbers made from one
    checkpoint are never taken for those of another. For an adapter, `name` ends in its subfolder if it has one, `base` is
    what it lies on, `sha256` digests both, and `notes` say what is known of how they belong together.
    """

    kind: Literal["hub", "folder", "embedded"]
    name: str
    revision: str | None
    sha256: str
    base: BaseSource | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """One ONNX file made by one recipe.

    `inputs` are the graph's inputs in order: `input_ids` int64 [batch, sequence]; where the graph can pad, `attention_mask`
    int64 of the same shape, or in a fused graph `lengths` int32 [batch], the count of real tokens (padding is on the right);
    where it can go on from a state, `past_*` float32 [batch, heads, tokens, head size]. The outputs are `logits` float32
    [batch, labels] and a `present_*` for each `past_*`.
    `max_tokens` is the longest text that the graph can read, None where memory alone decides.
    `recipe` says how the weights and activations are stored, for people and for rebuilding. `recalibration` corrects the
    logits before probabilities are computed, or is None.
    """

    name: str
    target: Target
    precision: Precision
    model: str
    data: tuple[str, ...]
    inputs: tuple[str, ...]
    opset: int
    max_tokens: int | None
    recipe: Mapping[str, str]
    recalibration: Recalibration | None = None


@dataclass(frozen=True)
class LabelToken:
    """A token of a language model's vocabulary that stands for a label: its id, and the text it is the token of."""

    id: int
    text: str


@dataclass(frozen=True)
class Generation:
    """What a bundle that generates text knows of its model.

    context: the most tokens of prompt and answer together. eos: the tokens that end an answer. bos, pad: these tokens, or
    None. vocabulary: the size of the logits. chat_template: the bundle's file with a Jinja template that makes one text of
    messages, or None. template_tokens: texts that the template calls by name (`bos_token`, `eos_token`, …). defaults: how
    the checkpoint's authors sample: `do_sample` (0 or 1), `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
    those that they named.
    """

    context: int
    eos: tuple[int, ...]
    bos: int | None
    pad: int | None
    vocabulary: int
    chat_template: str | None
    template_tokens: Mapping[str, str]
    defaults: Mapping[str, float]


@dataclass(frozen=True)
class Manifest:
    """The whole of `bundle.json`; `files` covers every other file of the bundle by its relative path.

    labels: in the order of the logits; none where text is generated. values: what each ordinal label counts as, for
    expected values, or None where labels are only names. label_tokens: for a language model read as a classifier, the token
    of each label, or None where the model has a trained head. generation: for a model that generates text, None for a
    classifier; bundles that were written before there were such models lack the key.
    """

    schema_version: int
    samescore_version: str
    profile: str | None
    architecture: str
    source: Source
    contract: TextContract
    labels: tuple[str, ...]
    values: tuple[float, ...] | None
    label_tokens: tuple[LabelToken, ...] | None
    activation: Activation
    variants: tuple[Variant, ...]
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    generation: Generation | None = field(default=None, metadata={OPTIONAL: True})

    def variant(self, name: str) -> Variant:
        """The variant of that name; UsageError (naming those there are) when the bundle does not hold it."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = [variant.name for variant in self.variants]
        raise UsageError(f"this bundle has no variant {name!r}; it has: {', '.join(known)}.{did_you_mean(name, known)}")

    def to_json(self) -> bytes:
        """The manifest as UTF-8 JSON, two spaces, keys in field order."""
        return (json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n").encode()


def parse_manifest(raw: bytes) -> Manifest:
    """Parse and check the bytes of `bundle.json`; BundleError names the first thing that is wrong."""
    if len(raw) > MANIFEST_LIMIT:
        raise BundleError(f"{MANIFEST_NAME} holds {len(raw)} bytes; the limit is {MANIFEST_LIMIT}")
    try:
        document = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise BundleError(
            f"{MANIFEST_NAME} has schema version {version!r}; this samescore reads {SCHEMA_VERSION}. "
            "Export the bundle again, or install the samescore that wrote it"
        )
    manifest = parse_as(Manifest, document, "")
    _check(manifest)
    return manifest


def _check(manifest: Manifest) -> None:
    """What the types cannot say: safe paths, known digests, no duplicates, nothing unlisted."""
    if manifest.generation is not None:
        _check_generation(manifest, manifest.generation)
    elif len(manifest.labels) < 1 or len(set(manifest.labels)) != len(manifest.labels):
        raise BundleError(f"{MANIFEST_NAME}: labels must be distinct and at least one, got {list(manifest.labels)}")
    contract = manifest.contract
    if wrong := template_error(contract):
        raise BundleError(f"{MANIFEST_NAME}: contract.template {wrong}")
    if (contract.kind == "instruction") != (contract.truncation == "article"):
        raise BundleError(
            f"{MANIFEST_NAME}: contract.truncation is {contract.truncation!r}, but contract.kind {contract.kind!r}: "
            "'article' and 'instruction' go together"
        )
    _check_scorer(manifest)
    names = [variant.name for variant in manifest.variants]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{MANIFEST_NAME}: variants must have distinct names and be at least one, got {names}")
    for path, entry in manifest.files.items():
        if not _PATH.fullmatch(path):
            raise BundleError(f"{MANIFEST_NAME}: {path!r} is not a plain relative path")
        if not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise BundleError(f"{MANIFEST_NAME}: {path} has no valid size and SHA-256")
    for variant in manifest.variants:
        for path in (variant.model, *variant.data):
            if path not in manifest.files:
                raise BundleError(
                    f"{MANIFEST_NAME}: variant {variant.name} names {path!r}, which `files` does not list"
                )
        correction = variant.recalibration
        if correction and (wrong := problem_of(correction, len(manifest.labels), manifest.activation)):
            raise BundleError(f"{MANIFEST_NAME}: the recalibration of variant {variant.name}: {wrong}")


def _check_generation(manifest: Manifest, generation: Generation) -> None:
    """Tokens inside the vocabulary, a template that is there, sampling defaults that mean something, and no labels."""
    where = f"{MANIFEST_NAME}: generation"
    if manifest.labels or manifest.label_tokens is not None or manifest.values is not None:
        raise BundleError(f"{where}: a model that generates text has no labels, got {list(manifest.labels)}")
    if generation.context < 1 or generation.vocabulary < 1:
        raise BundleError(
            f"{where}: context and vocabulary must be at least 1, got {generation.context} and {generation.vocabulary}"
        )
    tokens = [*generation.eos, *(token for token in (generation.bos, generation.pad) if token is not None)]
    if wrong := [token for token in tokens if not 0 <= token < generation.vocabulary]:
        raise BundleError(f"{where}: tokens {wrong} are outside the vocabulary of {generation.vocabulary}")
    if not generation.eos or len(set(generation.eos)) != len(generation.eos):
        raise BundleError(f"{where}: eos must be distinct tokens and at least one, got {list(generation.eos)}")
    if generation.chat_template is not None and generation.chat_template not in manifest.files:
        raise BundleError(f"{where}: chat_template names {generation.chat_template!r}, which `files` does not list")
    for name, value in generation.defaults.items():
        if name not in SAMPLING:
            raise BundleError(f"{where}: unknown default {name!r}.{did_you_mean(name, SAMPLING)}")
        wanted, holds = SAMPLING[name]
        if not math.isfinite(value) or not holds(value):
            raise BundleError(f"{where}: the default {name} must be {wanted}, got {value}")


def _check_scorer(manifest: Manifest) -> None:
    """One label token and one finite value per label, where there are any."""
    for name, entries in (("label_tokens", manifest.label_tokens), ("values", manifest.values)):
        if entries is not None and len(entries) != len(manifest.labels):
            raise BundleError(f"{MANIFEST_NAME}: {name} has {len(entries)} entries for {len(manifest.labels)} labels")
    tokens = manifest.label_tokens or ()
    if len({token.id for token in tokens}) != len(tokens) or any(token.id < 0 for token in tokens):
        raise BundleError(f"{MANIFEST_NAME}: label_tokens must have distinct ids, got {[token.id for token in tokens]}")
    if not all(map(math.isfinite, manifest.values or ())):
        raise BundleError(f"{MANIFEST_NAME}: values must be finite, got {list(manifest.values or ())}")


T = TypeVar("T")


def parse_as(kind: type[T], value: Any, where: str) -> T:
    """`value` (decoded JSON) as the dataclass, Literal, union, tuple, mapping or scalar `kind`, strictly."""
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments:
            return typing.cast(T, value)
        raise BundleError(f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return typing.cast(T, None)
        return typing.cast(T, parse_as(next(a for a in arguments if a is not type(None)), value, where))
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        return typing.cast(T, tuple(parse_as(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)))
    if origin is Mapping:
        _expect(isinstance(value, dict), where, "an object", value)
        return typing.cast(T, {key: parse_as(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()})
    if kind is float and type(value) is int:
        return typing.cast(T, float(value))
    _expect(type(value) is kind, where, kind.__name__, value)
    return typing.cast(T, value)


def _parse_dataclass(kind: type[T], value: Any, where: str) -> T:
    _expect(isinstance(value, dict), where or MANIFEST_NAME, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    known = {f.name for f in fields}
    for key in value:
        if key not in known:
            raise BundleError(f"{where or MANIFEST_NAME}: unknown key {key!r}.{did_you_mean(key, known)}")
    if missing := sorted({f.name for f in fields if OPTIONAL not in f.metadata} - value.keys()):
        raise BundleError(f"{where or MANIFEST_NAME}: missing {', '.join(map(repr, missing))}")
    prefix = f"{where}." if where else ""
    return kind(**{key: parse_as(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def _expect(holds: bool, where: str, wanted: str, value: Any) -> None:
    if not holds:
        raise BundleError(f"{where}: expected {wanted}, got {type(value).__name__} {str(value)[:60]!r}")
