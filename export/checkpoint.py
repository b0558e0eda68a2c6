"""A Hugging Face checkpoint folder, read lazily: config, tokenizer, and safetensors one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import CheckpointError, MissingDependencyError
from samescore.runtime.manifest import Activation

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")
INDEX_NAME = "model.safetensors.index.json"
# Architectures that number positions from pad_token_id + 1.
PADDED_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "esm",
    "ibert",
    "data2vec-text",
)
# Rows of a large table that are held in memory at once.
CHUNK_BYTES = 32 * 1024 * 1024

FloatArray = npt.NDArray[np.float32]


class Stored(NamedTuple):
    """Where a tensor lies: a safetensors file, and the tensor's name there."""

    path: Path
    key: str


class Checkpoint:
    """One checkpoint folder. CheckpointError names what is missing and how to make it.

    config: `config.json` as a dict. tokenizer_config: `tokenizer_config.json` as a dict, empty if absent.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"there is no checkpoint folder at {self.folder}")
        self.config = self._json("config.json", required=True)
        self.tokenizer_config = self._json("tokenizer_config.json", required=False)
        if not (self.folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{self.folder} holds no tokenizer.json (a fast tokenizer). Make one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        self._stored = self._find_tensors()

    @property
    def model_type(self) -> str:
        """`model_type` of the config, or `unknown`."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def architecture(self) -> str:
        """The first of the config's `architectures`, or `unknown`."""
        architectures = self.config.get("architectures") or ["unknown"]
        return str(architectures[0])

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in the order of the logits, from `id2label` (or LABEL_0 … as transformers names them)."""
        named = labels_of(self.folder, self.config)
        if named:
            return named
        return tuple(f"LABEL_{index}" for index in range(int(self.config.get("num_labels", 2))))

    @property
    def max_tokens(self) -> int:
        """The longest input, special tokens included: what the positions and the tokenizer allow."""
        positions = int(self.config.get("max_position_embeddings", 512))
        if self.model_type in PADDED_POSITIONS:
            positions -= int(self.config.get("pad_token_id", 1)) + 1
        limit = self.tokenizer_config.get("model_max_length")
        # transformers writes 1e30 for "no limit".
        return min(positions, int(limit)) if isinstance(limit, int | float) and limit < 1e9 else positions

    @property
    def activation(self) -> Activation:
        """What transformers' text-classification pipeline applies to the logits for this config."""
        problem = self.config.get("problem_type")
        if problem == "regression":
            raise CheckpointError(f"{self.folder} is a regression model; samescore exports classifiers")
        return "sigmoid" if problem == "multi_label_classification" or len(self.labels) == 1 else "softmax"

    def tokenizer_bytes(self) -> bytes:
        """`tokenizer.json` as it lies in the checkpoint."""
        return (self.folder / "tokenizer.json").read_bytes()

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._stored)

    def stored(self) -> dict[str, Stored]:
        """Where each tensor lies, by its name."""
        return dict(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return stored_shape(self._where(name))

    def tensor(self, name: str) -> FloatArray:
        """A whole tensor as float32, whatever it is stored as."""
        return stored_tensor(self._where(name))

    def row_chunks(self, name: str) -> Iterator[FloatArray]:
        """A matrix as float32 blocks of rows, so that a large table is never whole in memory."""
        path, key = self._where(name)
        with open_safetensors(path) as file:
            view = file.get_slice(key)
            rows, columns = view.get_shape()
            step = max(1, CHUNK_BYTES // (4 * columns))
            for start in range(0, rows, step):
                yield np.ascontiguousarray(view[start : min(start + step, rows)], dtype=np.float32)

    def sha256(self) -> str:
        """Digest of config, tokenizer and weights: which checkpoint reference numbers belong to."""
        outer = hashlib.sha256()
        for name in sorted({"config.json", "tokenizer.json", *(stored.path.name for stored in self._stored.values())}):
            outer.update(f"{name} {file_sha256(self.folder / name)}\n".encode())
        return outer.hexdigest()

    def _where(self, name: str) -> Stored:
        if name not in self._stored:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name!r}: it is not a {self.model_type} classifier, or incomplete"
            )
        return self._stored[name]

    def _json(self, name: str, *, required: bool) -> dict[str, Any]:
        path = self.folder / name
        if required and not path.is_file():
            raise CheckpointError(f"{self.folder} is no checkpoint: it holds no {name}")
        return read_json(path)

    def _find_tensors(self) -> dict[str, Stored]:
        """Where each tensor lies, from the index or by reading every file's header."""
        index = self._json(INDEX_NAME, required=False)
        if index:
            files = {str(tensor): str(file) for tensor, file in index.get("weight_map", {}).items()}
            for file in sorted(set(files.values())):
                if "/" in file or not (self.folder / file).is_file():
                    raise CheckpointError(f"{self.folder} lacks {file}, which {INDEX_NAME} lists")
            return {tensor: Stored(self.folder / file, tensor) for tensor, file in files.items()}
        present = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not present:
            raise CheckpointError(self._no_weights())
        tensors: dict[str, Stored] = {}
        for file in present:
            path = self.folder / file
            with open_safetensors(path) as opened:
                tensors.update((key, Stored(path, key)) for key in opened.keys())  # noqa: SIM118
        return tensors

    def _no_weights(self) -> str:
        pickles = [name for name in PICKLES if (self.folder / name).exists()]
        if pickles:
            return (
                f"{self.folder} holds its weights as a pickle ({', '.join(pickles)}), which can run code when it is read. "
                "Convert it where you trust it: AutoModelForSequenceClassification.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER, safe_serialization=True)"
            )
        return f"{self.folder} holds no *.safetensors"


def labels_of(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    """The labels of a config's `id2label` in the order of the logits; none when it has none."""
    id2label = config.get("id2label")
    if not isinstance(id2label, dict):
        return ()
    by_index = {int(index): str(label) for index, label in id2label.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise CheckpointError(f"{folder}: config.json's id2label has gaps: {sorted(by_index)}")
    return tuple(by_index[index] for index in range(len(by_index)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file; CheckpointError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return document


def file_sha256(path: Path) -> str:
    """The hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_shape(stored: Stored) -> tuple[int, ...]:
    """A tensor's shape, from the file's header."""
    with open_safetensors(stored.path) as file:
        return tuple(file.get_slice(stored.key).get_shape())


def stored_tensor(stored: Stored) -> FloatArray:
    """A whole tensor as float32."""
    with open_safetensors(stored.path) as file:
        return np.ascontiguousarray(file.get_tensor(stored.key), dtype=np.float32)


def open_safetensors(path: Path) -> Any:
    """A lazy safetensors reader; CheckpointError when the file is cut off or not safetensors."""
    try:
        import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy for safetensors)
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise MissingDependencyError(f"export needs {error.name}: pip install 'samescore[export]'") from error
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
