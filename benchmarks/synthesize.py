"""Full-size checkpoints of Llama-3.2-1B's shape with random weights, for measuring speed and memory.

    python benchmarks/synthesize.py OUT [--model realigned|news-bias] [--seed N] [--tokenizer FOLDER]

    realigned    OUT/ is a LlamaForSequenceClassification in bfloat16 with two labels
    news-bias    OUT/base is a LlamaForCausalLM, OUT/adapter/checkpoint-4506 a LoRA adapter on it with three labels

The weights are written row block by row block into shards: never more than one block is in memory. They are normal with
standard deviation 0.02, and have what trained models have and random ones lack: two residual channels far larger than
the rest, and a few channels that the norms before attention and MLP magnify. The probabilities vary with the text but
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

TOKENIZER = Path(__file__).parent.parent / ".cache" / "assets" / "llama3-tokenizer"
STD = 0.02
SHARD_BYTES = 1_000_000_000
BLOCK_VALUES = 1 << 22
SPECIAL_TOKENS = 256  # the last of the vocabulary
RANK, ALPHA = 16, 64
LORA_B_STD = 0.01
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
# Channels as a share of the hidden size, so that small shapes have them too: 788 and 1384 of 2048, and four for the norms.
MASSIVE = (788 / 2048, 1384 / 2048)
MAGNIFIED = (100 / 2048, 500 / 2048, 900 / 2048, 1500 / 2048)
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}


@dataclass(frozen=True)
class Shape:
    """Llama-3.2-1B, or smaller with the same proportions."""

    layers: int = 16
    hidden: int = 2048
    vocabulary: int = 128256
    head_dim: int = 64

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.hidden // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return max(1, self.heads // 4)

    @property
    def ffn(self) -> int:
        """Width of the MLP."""
        return 4 * self.hidden

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block, [out, in]."""
        keys = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def tensors(self, labels: int | None = None) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the model, with a score head for `labels`; the language head is tied."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            for name, shape in self.linears().items():
                found[f"model.layers.{layer}.{name}.weight"] = shape
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{layer}.{name}.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        return found | ({"score.weight": (labels, self.hidden)} if labels else {})

    def adapter(self, labels: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the adapter, as PEFT writes them."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            for name, (outputs, inputs) in self.linears().items():
                if name.endswith(ADAPTED):
                    start = f"base_model.model.model.layers.{layer}.{name}"
                    found[f"{start}.lora_A.weight"] = (RANK, inputs)
                    found[f"{start}.lora_B.weight"] = (outputs, RANK)
        return found | {"base_model.model.score.weight": (labels, self.hidden)}


def channels(shares: tuple[float, ...], hidden: int) -> list[int]:
    """Channel numbers at this hidden size."""
    return [int(share * hidden) for share in shares]


def blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Any]:
    """The tensor's values float32, some rows at a time; the same for a name and a seed whatever else is written."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    rows = shape[0] if len(shape) == 1 else max(1, BLOCK_VALUES // shape[1])
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        block = random.standard_normal((count, *shape[1:]), dtype=np.float32)
        if len(shape) == 1:
            yield norm_weights(name, block)
        else:
            block *= spread(name, shape)
            enlarge(name, block, first, shape)
            yield block


def spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation: logits of about 1.5 for a hidden state of unit size, LoRA A as PEFT starts it."""
    if name.endswith("score.weight"):
        return float(1.5 / np.sqrt(shape[1]))
    if ".lora_A." in name:
        return float(1 / np.sqrt(3 * shape[1]))
    return LORA_B_STD if ".lora_B." in name else STD


def norm_weights(name: str, noise: Any) -> Any:
    """About 1; large in a few channels and small in the massive ones, as trained norms are."""
    weights = 1 + 0.1 * noise
    layer = int(name.split(".")[2]) if ".layers." in name else None
    if layer is None or layer > 1:
        weights[channels(MASSIVE, weights.size)] *= 0.05
    if layer is not None:
        weights[channels(MAGNIFIED, weights.size)] *= 6
    return weights


def enlarge(name: str, block: Any, first: int, shape: tuple[int, ...]) -> None:
    """The massive channels: already in the embedding, and written by the second layer's MLP."""
    if name == "model.embed_tokens.weight":
        block[:, channels(MASSIVE, shape[1])] *= 3
    if name == "model.layers.1.mlp.down_proj.weight":
        for channel in channels(MASSIVE, shape[0]):
            if first <= channel < first + len(block):
                block[channel - first] *= 20


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """One safetensors file, written from the first byte to the last."""
    width = np.dtype(DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            for block in blocks(name, shape, seed):
                file.write(block.astype(DTYPES[dtype]).tobytes())


def write_model(folder: Path, tensors: dict[str, tuple[int, ...]], seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """bfloat16 shards of at most `shard_bytes` and their index; one plain file when one is enough."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= size
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, "BF16", seed)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, "BF16", seed)
        places |= dict.fromkeys(shard, file)
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def model_config(shape: Shape, labels: tuple[str, ...] | None) -> dict[str, Any]:
    """config.json as Llama-3.2-1B has it, of the language model or of a classifier made from it."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": shape.vocabulary - SPECIAL_TOKENS,
        "eos_token_id": shape.vocabulary - SPECIAL_TOKENS + 1,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    if labels:
        config["architectures"] = ["LlamaForSequenceClassification"]
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
        config["pad_token_id"] = config["eos_token_id"]
    return config


def adapter_config(base: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA sequence classifier; PEFT itself repeats `score`."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "modules_to_save": ["score", "classifier", "score"],
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(ADAPTED),
        "task_type": "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
    }


def write_json(path: Path, value: Any) -> None:
    """An indented JSON file."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def write_realigned(out: Path, shape: Shape, seed: int, tokenizer: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A merged classifier with two labels."""
    labels = ("China-biased", "Western-biased")
    copy_tokenizer(tokenizer, out)
    write_json(out / "config.json", model_config(shape, labels))
    write_model(out, shape.tensors(len(labels)), seed, shard_bytes)


def write_news_bias(out: Path, shape: Shape, seed: int, tokenizer: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A language model, and an adapter that makes a classifier with three labels of it."""
    base, checkpoint = out / "base", out / "adapter" / "checkpoint-4506"
    for folder in (base, checkpoint):
        copy_tokenizer(tokenizer, folder)
    write_json(base / "config.json", model_config(shape, None))
    write_model(base, shape.tensors(), seed, shard_bytes)
    write_json(checkpoint / "adapter_config.json", adapter_config(base.resolve()))
    write_safetensors(checkpoint / "adapter_model.safetensors", shape.adapter(3), "F32", seed)


WRITERS = {"realigned": write_realigned, "news-bias": write_news_bias}


def main() -> int:
    """0, or 2 when there is no tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(WRITERS), default="realigned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER)
    for name in ("layers", "hidden"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Shape, name), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.tokenizer / "tokenizer.json").is_file():
        print(
            f"{arguments.tokenizer} holds no tokenizer: run `make assets` or name one by --tokenizer", file=sys.stderr
        )
        return 2
    shape = Shape(layers=arguments.layers, hidden=arguments.hidden)
    WRITERS[arguments.model](arguments.out, shape, arguments.seed, arguments.tokenizer)
    print(f"{arguments.model}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
