"""A PEFT LoRA adapter over its base checkpoint, read as one checkpoint: the delta is folded in as tensors are read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samescore.export.checkpoint import (
    Checkpoint,
    FloatArray,
    Stored,
    file_sha256,
    labels_of,
    open_safetensors,
    read_json,
    stored_shape,
    stored_tensor,
)
from samescore.export.hub import is_hub_id
from samescore.runtime.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
CLASSIFIER = "ForSequenceClassification"
# The last linear layer of a classifier, in transformers' naming: its rows are the labels.
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
# The first part of names that a base of another task has and its classifier has not.
OTHER_HEADS = ("lm_head", "cls")
# Options of LoRA that compute something else than W + scaling * B A, or on other modules than the keys say.
VARIANTS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# Ways to begin training that leave the base as it was; the others (pissa, olora, corda, loftq …) subtract from it.
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
LISTED = 4

_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.\w+)?")
_EMBEDDING_LORA = ".lora_embedding_"
_REPLACED = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)\.(.+)")
_TASK = re.compile(r"(.+?)(?:For[A-Z]\w*|LMHeadModel|Model)")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says of the arithmetic and of the base."""

    base: str | None
    revision: str | None
    rank: int
    alpha: float
    rslora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """From an adapter folder; CheckpointError for an adapter that this module cannot fold. Reads no weights."""
        config = read_json(folder / CONFIG_NAME)
        if not config:
            raise CheckpointError(f"{folder} is no adapter: it holds no {CONFIG_NAME}")
        _refuse_others(folder, config)
        if not (folder / WEIGHTS_NAME).is_file():
            raise CheckpointError(_no_weights(folder))
        rank = config.get("r", 8)
        alpha = config.get("lora_alpha", 8)
        patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
        ranks = [rank, *(patterns[0].values() if isinstance(patterns[0], dict) else [None])]
        alphas = [alpha, *(patterns[1].values() if isinstance(patterns[1], dict) else [None])]
        if not all(type(r) is int and r > 0 for r in ranks) or not all(type(a) in (int, float) for a in alphas):
            raise CheckpointError(
                f"{folder / CONFIG_NAME}: r and lora_alpha and their patterns must be numbers, r above 0"
            )
        return cls(
            base=str(config["base_model_name_or_path"]) if config.get("base_model_name_or_path") else None,
            revision=str(config["revision"]) if config.get("revision") else None,
            rank=rank,
            alpha=float(alpha),
            rslora=bool(config.get("use_rslora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            rank_pattern=patterns[0],
            alpha_pattern=patterns[1],
            modules_to_save=tuple(map(str, config.get("modules_to_save") or ())),
        )

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its name in the classifier."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """What the product of B and A of one module is multiplied by."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether a tensor belongs to a module that `modules_to_save` names."""
        return any(f".{module}." in f".{name}" for module in self.modules_to_save)


@dataclass(frozen=True)
class _Delta:
    """scaling * left [rows, r] @ right [r, columns], as A and B are stored or transposed."""

    a: Stored
    b: Stored
    scaling: float
    transposed: bool

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """Left and right, float32."""
        a, b = stored_tensor(self.a), stored_tensor(self.b)
        return (a.T, b.T) if self.transposed else (b, a)


class AdaptedCheckpoint(Checkpoint):
    """The classifier that a LoRA adapter makes of a base checkpoint.

    `tensor` and `row_chunks` give float32 W + scaling * B A, one matrix (or block of rows) at a time; a tensor that the
    adapter stores whole (the head) takes the base's place. folder: the adapter's; its tokenizer and labels go before the
    base's.

    Raises CheckpointError for everything that is not plain LoRA, for a classifier without a trained head, and where
    adapter and base do not fit.
    """

    def __init__(self, base: Checkpoint, folder: str | Path):
        self.base = base
        self.folder = Path(folder)
        self.adapter = AdapterConfig.read(self.folder)
        self._refuse_base()
        own = self.folder if (self.folder / "tokenizer.json").is_file() else base.folder
        self._tokenizer = own / "tokenizer.json"
        self.tokenizer_config = (
            read_json(own / "tokenizer_config.json") if own != base.folder else base.tokenizer_config
        )
        self.config = {**base.config, "architectures": [_classifier_of(base)]}
        self.supplied: frozenset[str] = frozenset()
        self._deltas: dict[str, _Delta] = {}
        self._read_adapter()
        self._name_labels()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is known of how base and adapter belong together, for people."""
        named = self.adapter.base
        # A path would tell of the machine that trained.
        known = named if named is None or is_hub_id(named) else Path(named).name
        said = f"{CONFIG_NAME} names the base {known}" if known else f"{CONFIG_NAME} names no base"
        revision = f"revision {self.adapter.revision}" if self.adapter.revision else "no revision of it"
        notes = [
            f"{said} and {revision}",
            "an adapter does not record whether its base was quantized in training; here it lies on full precision",
        ]
        if self._labels_unknown:
            notes.append("neither adapter nor base names the labels")
        return tuple(notes)

    def tokenizer_bytes(self) -> bytes:
        """`tokenizer.json` of the adapter, or else of the base."""
        return self._tokenizer.read_bytes()

    def tensor(self, name: str) -> FloatArray:
        """A whole tensor as float32, with its delta."""
        weight = super().tensor(name)
        if name not in self._deltas:
            return weight
        delta = self._deltas[name]
        left, right = delta.factors()
        return _folded(weight, left, right, delta.scaling)

    def row_chunks(self, name: str) -> Iterator[FloatArray]:
        """A matrix as float32 blocks of rows, with its delta."""
        blocks = super().row_chunks(name)
        if name not in self._deltas:
            yield from blocks
            return
        delta = self._deltas[name]
        left, right = delta.factors()
        start = 0
        for block in blocks:
            stop = start + len(block)
            yield _folded(block, left[start:stop], right, delta.scaling)
            start = stop

    def adapter_keys(self) -> set[str]:
        """The adapter's own keys, as PEFT writes them today (older versions put `modules_to_save.default` into them)."""
        keys = set(_shapes(self.folder / WEIGHTS_NAME))
        return keys | {f"base_model.model.{name}" for name in self.supplied}

    def sha256(self) -> str:
        """Digest of the base, the adapter and the tokenizer in use."""
        outer = hashlib.sha256(f"base {self.base.sha256()}\n".encode())
        paths = [self.folder / CONFIG_NAME, self.folder / WEIGHTS_NAME, self.folder / "config.json", self._tokenizer]
        for path in paths:
            if path.is_file():
                outer.update(f"{path.name} {file_sha256(path)}\n".encode())
        return outer.hexdigest()

    def _refuse_base(self) -> None:
        if isinstance(self.base, AdaptedCheckpoint):
            raise CheckpointError(f"{self.base.folder} is itself an adapter; --base names a whole checkpoint")
        quantization = self.base.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            named = self.adapter.base or ""
            full = re.sub(r"(-unsloth)?-bnb-[48]bit$", "", named)
            which = f" (by its name, {full})" if full != named else ""
            raise CheckpointError(
                f"the base {named or self.base.folder} is itself quantized ({method}), so its weights cannot take the "
                f"adapter exactly. Name the full-precision model that it was made from{which}: --base FOLDER or HUB_ID"
            )

    def _read_adapter(self) -> None:
        """Sort the adapter's keys into deltas and whole tensors; check that every one has its place in the base."""
        shapes = _shapes(self.folder / WEIGHTS_NAME)
        factors: dict[str, dict[str, str]] = {}
        whole: dict[str, str] = {}
        for key in shapes:
            name = key.removeprefix("base_model.model.")
            if match := _LORA.fullmatch(name.removesuffix(".weight")):
                factors.setdefault(match[1], {})[match[2]] = key
            elif ".lora_" in name:
                raise CheckpointError(
                    f"{self.folder}: {key} is of no LoRA that samescore can fold ({_refused_names()})"
                )
            elif match := _REPLACED.fullmatch(name):
                whole[f"{match[1]}.{match[2]}"] = key
            else:
                whole[name] = key
        stored = _base_tensors(self.base, self.config["architectures"][0], factors)
        self._replace(stored, whole, shapes)
        self._require_head(stored)
        self._stored = stored
        self._add_deltas(factors, shapes)

    def _replace(
        self, stored: dict[str, Stored], whole: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Put the adapter's whole tensors in the place of the base's."""
        heads = {head.partition(".")[0] for head in HEADS}
        strange = []
        for name, key in whole.items():
            is_head = name.partition(".")[0] in heads
            if name in stored and not is_head and stored_shape(stored[name]) != shapes[key]:
                raise CheckpointError(
                    f"{self.folder}: {key} has shape {list(shapes[key])}, the base's {list(stored_shape(stored[name]))}: "
                    "another base, or a resized vocabulary, which samescore does not resize. Name the right one with --base"
                )
            if name not in stored and not is_head and not self.adapter.saves(name):
                strange.append(key)
            stored[name] = Stored(self.folder / WEIGHTS_NAME, key)
        self._refuse_strange(strange)
        self.supplied = frozenset(whole)

    def _require_head(self, stored: Mapping[str, Stored]) -> None:
        """The base's own head counts only where the base is a classifier already."""
        heads = [name for name in HEADS if name in stored]
        if not heads or (heads[0] not in self.supplied and not self.base.architecture.endswith(CLASSIFIER)):
            raise CheckpointError(
                f"{self.folder} holds no trained head ({' or '.join(HEADS[:2])}), and the base {self.base.architecture} has "
                'none: its scores would be random. Train with modules_to_save=["score"] (task_type SEQ_CLS adds it) and '
                "save the adapter again"
            )
        self._head = heads[0]

    def _add_deltas(self, factors: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._refuse_strange(
            [key for module, pair in factors.items() if f"{module}.weight" not in self._stored for key in pair.values()]
        )
        path = self.folder / WEIGHTS_NAME
        for module, pair in factors.items():
            if sorted(pair) != ["A", "B"]:
                raise CheckpointError(
                    f"{self.folder}: {module} has only one of lora_A and lora_B; the adapter is incomplete"
                )
            name, a, b = f"{module}.weight", shapes[pair["A"]], shapes[pair["B"]]
            transposed = self.adapter.fan_in_fan_out or _EMBEDDING_LORA in pair["A"]
            rank, base = self.adapter.rank_of(module), stored_shape(self._stored[name])
            wanted = base[::-1] if transposed else base
            if len(base) != 2 or a != (rank, wanted[1]) or b != (wanted[0], rank):
                raise CheckpointError(
                    f"{self.folder}: {module} has lora_A {list(a)} and lora_B {list(b)}, which with r = {rank} do not fit "
                    f"the base's {list(base)}. Is it another base? Name the right one with --base"
                )
            scaling = self.adapter.scaling_of(module)
            self._deltas[name] = _Delta(Stored(path, pair["A"]), Stored(path, pair["B"]), scaling, transposed)

    def _refuse_strange(self, keys: list[str]) -> None:
        if keys:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            raise CheckpointError(
                f"{self.folder}: {', '.join(keys[:LISTED])}{more} belong to no tensor of the base {self.base.folder} "
                f"({self.base.architecture}). Is it another base? Name the right one with --base"
            )

    def _name_labels(self) -> None:
        """Write the labels, and what the head's outputs mean, into the config."""
        rows = self.shape(self._head)[0]
        own = read_json(self.folder / "config.json")
        self._labels_unknown = False
        labels = labels_of(self.folder, own)
        if not labels:
            of_base = labels_of(self.base.folder, self.base.config)
            self._labels_unknown = len(of_base) != rows
            labels = tuple(f"LABEL_{index}" for index in range(rows)) if self._labels_unknown else of_base
        if len(labels) != rows:
            raise CheckpointError(
                f"{self.folder}: {len(labels)} labels ({', '.join(labels)}) for a head of {rows} rows ({self._head}). "
                "Name as many as there are rows, in their order, as id2label of a config.json beside the adapter"
            )
        self.config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        if "problem_type" in own:
            self.config["problem_type"] = own["problem_type"]


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter. A whole checkpoint that only kept its `adapter_config.json` is none."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        return False
    if (folder / WEIGHTS_NAME).is_file() or (folder / PICKLE_NAME).is_file():
        return True
    return not (folder / "config.json").is_file()


def adapters_below(folder: str | Path) -> list[str]:
    """The names of the subfolders that hold adapters, as training leaves them (`checkpoint-500` …)."""
    names = [path.parent.name for path in Path(folder).glob(f"*/{CONFIG_NAME}")]
    return sorted(names, key=lambda name: (len(name), name))


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError for what is not LoRA, or not the plain kind, by the name that PEFT gives it."""
    kind, task = str(config.get("peft_type")), config.get("task_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is a PEFT adapter of type {kind}; samescore folds LORA only. {MERGE_FIRST}")
    if task not in (None, "SEQ_CLS"):
        raise CheckpointError(f"{folder} is an adapter for {task}; samescore exports sequence classifiers (SEQ_CLS)")
    for key, what in VARIANTS.items():
        if config.get(key):
            raise CheckpointError(f"{folder} uses {what} ({key}), which is not plain LoRA. {MERGE_FIRST}")
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{folder} trained biases too (bias={config['bias']!r}); samescore folds bias='none'. {MERGE_FIRST}"
        )
    init = config.get("init_lora_weights", True)
    if init not in HARMLESS_INITS:
        raise CheckpointError(
            f"{folder} was begun with init_lora_weights={init!r}, which changes the base's weights as well. {MERGE_FIRST}"
        )


MERGE_FIRST = (
    "Merge it with PEFT, and export the result: PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER)"
)


def _refused_names() -> str:
    return ", ".join(VARIANTS.values())


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE_NAME).is_file():
        return (
            f"{folder} holds its weights as a pickle ({PICKLE_NAME}), which can run code when it is read. Convert it where "
            "you trust it: PeftModel.from_pretrained(MODEL, ADAPTER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    return f"{folder} holds {CONFIG_NAME} but no {WEIGHTS_NAME}"


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    """PEFT's rule: the first pattern that, as a regular expression, matches the module's name from a dot to its end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _classifier_of(base: Checkpoint) -> str:
    """The sequence classifier of a base's family: LlamaForCausalLM → LlamaForSequenceClassification."""
    if base.architecture.endswith(CLASSIFIER):
        return base.architecture
    match = _TASK.fullmatch(base.architecture)
    if match is None:
        raise CheckpointError(
            f"{base.folder}: no sequence classifier is known for the architecture {base.architecture}"
        )
    return f"{match[1]}{CLASSIFIER}"


def _base_tensors(base: Checkpoint, architecture: str, modules: Iterable[str]) -> dict[str, Stored]:
    """Where the base's tensors lie, by their names in the classifier; heads of other tasks are left out."""
    stored = base.stored()
    if base.architecture == architecture:
        return stored
    stored = {name: where for name, where in stored.items() if name.partition(".")[0] not in OTHER_HEADS}
    for module in modules:
        prefix, _, rest = module.partition(".")
        if f"{module}.weight" not in stored and f"{rest}.weight" in stored:
            # A model saved without a head has no prefix: `layers.0…`, not `model.layers.0…`.
            return {f"{prefix}.{name}": where for name, where in stored.items()}
    return stored


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its key, from the header."""
    with open_safetensors(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _folded(weight: FloatArray, left: FloatArray, right: FloatArray, scaling: float) -> FloatArray:
    product = left @ right
    product *= np.float32(scaling)
    product += weight
    return np.ascontiguousarray(product)
