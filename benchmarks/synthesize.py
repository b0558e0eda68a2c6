"""Full-size checkpoints with random weights, of Llama-3.2-1B's shape and of Qwen3.5's, for measuring speed and memory.

    python benchmarks/synthesize.py OUT [--model NAME] [--seed N] [--tokenizer FOLDER] [--untied]

    realigned           OUT/ is a LlamaForSequenceClassification in bfloat16 with two labels (2.5 GB)
    news-bias           OUT/base is a LlamaForCausalLM, OUT/adapter/checkpoint-4506 a LoRA adapter on it with three labels
    political-leaning   OUT/ is a multimodal Qwen3_5ForConditionalGeneration in bfloat16 whose text model has Qwen3.5-4B's
                        shape (8.4 GB); its image tower is tiny, and it holds tensors of a draft head that nobody reads
    qwen-0.8b           the same with Qwen3.5-0.8B's shape (1.5 GB)

The weights are written row block by row block into shards: never more than one block is in memory. They are normal with
standard deviation 0.02, and have what trained models have and random ones lack: two residual channels far larger than
the rest, a few channels that the norms before attention and MLP magnify, and linear attention that forgets within a few
tokens in some heads and within hundreds in others. The probabilities vary with the text but mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ASSETS = Path(__file__).parent.parent / ".cache" / "assets"
STD = 0.02
SHARD_BYTES = 1_000_000_000
BLOCK_VALUES = 1 << 22
SPECIAL_TOKENS = 256  # the last of the vocabulary
RANK, ALPHA = 16, 64
LORA_B_STD = 0.01
CONV_STD = 0.4
LANGUAGE = "model.language_model."  # how a multimodal checkpoint names its text model's tensors
FULL_ATTENTION_EVERY = 4
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


@dataclass(frozen=True)
class QwenShape:
    """Qwen3.5-0.8B's text model, or another; the rest of the checkpoint is as small as it can be."""

    layers: int = 24
    hidden: int = 1024
    ffn: int = 3584
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 256
    linear_key_heads: int = 16
    linear_value_heads: int = 16
    linear_head_dim: int = 128
    vocabulary: int = 248320
    vision_hidden: int = 64
    tied: bool = True

    def linear_attention(self) -> dict[str, tuple[int, ...]]:
        """The tensors of a gated delta rule, [out, in]."""
        keys, values = self.linear_key_heads * self.linear_head_dim, self.linear_value_heads * self.linear_head_dim
        return {
            "linear_attn.in_proj_qkv.weight": (2 * keys + values, self.hidden),
            "linear_attn.in_proj_z.weight": (values, self.hidden),
            "linear_attn.in_proj_b.weight": (self.linear_value_heads, self.hidden),
            "linear_attn.in_proj_a.weight": (self.linear_value_heads, self.hidden),
            "linear_attn.conv1d.weight": (2 * keys + values, 1, 4),
            "linear_attn.A_log": (self.linear_value_heads,),
            "linear_attn.dt_bias": (self.linear_value_heads,),
            "linear_attn.norm.weight": (self.linear_head_dim,),
            "linear_attn.out_proj.weight": (self.hidden, values),
        }

    def full_attention(self) -> dict[str, tuple[int, ...]]:
        """The tensors of gated attention: each query head has its gate beside it."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (2 * queries, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, queries),
            "self_attn.q_norm.weight": (self.head_dim,),
            "self_attn.k_norm.weight": (self.head_dim,),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the text model, the image tower and a few of the draft head's."""
        found: dict[str, tuple[int, ...]] = {f"{LANGUAGE}embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer, kind in enumerate(self.layer_types()):
            tensors = {
                **(self.full_attention() if kind == "full_attention" else self.linear_attention()),
                "mlp.gate_proj.weight": (self.ffn, self.hidden),
                "mlp.up_proj.weight": (self.ffn, self.hidden),
                "mlp.down_proj.weight": (self.hidden, self.ffn),
                "input_layernorm.weight": (self.hidden,),
                "post_attention_layernorm.weight": (self.hidden,),
            }
            found |= {f"{LANGUAGE}layers.{layer}.{name}": shape for name, shape in tensors.items()}
        found[f"{LANGUAGE}norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        found |= {f"model.visual.{name}": shape for name, shape in self.vision().items()}
        return found | {"mtp.fc.weight": (self.hidden, 2 * self.hidden), "mtp.norm.weight": (self.hidden,)}

    def layer_types(self) -> list[str]:
        """Three layers of linear attention, one of full attention, and again."""
        kinds = ("linear_attention", "full_attention")
        return [kinds[(layer + 1) % FULL_ATTENTION_EVERY == 0] for layer in range(self.layers)]

    def vision(self) -> dict[str, tuple[int, ...]]:
        """An image tower of one block."""
        width = self.vision_hidden
        merged = 4 * width
        linears = {
            "blocks.0.attn.qkv": (3 * width, width),
            "blocks.0.attn.proj": (width, width),
            "blocks.0.mlp.linear_fc1": (2 * width, width),
            "blocks.0.mlp.linear_fc2": (width, 2 * width),
            "merger.linear_fc1": (merged, merged),
            "merger.linear_fc2": (self.hidden, merged),
        }
        found: dict[str, tuple[int, ...]] = {
            "patch_embed.proj.weight": (width, 3, 2, 16, 16),
            "patch_embed.proj.bias": (width,),
            "pos_embed.weight": (16, width),
        }
        for name in ("blocks.0.norm1", "blocks.0.norm2", "merger.norm"):
            found |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for name, (outputs, inputs) in linears.items():
            found |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        return found


QWEN_4B = QwenShape(layers=32, hidden=2560, ffn=9216, heads=16, kv_heads=4, linear_value_heads=32)


def channels(shares: tuple[float, ...], hidden: int) -> list[int]:
    """Channel numbers at this hidden size."""
    return [int(share * hidden) for share in shares]


def blocks(name: str, shape: tuple[int, ...], seed: int) -> Iterator[Any]:
    """The tensor's values float32, some rows at a time; the same for a name and a seed whatever else is written."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    rows = shape[0] if len(shape) == 1 else max(1, BLOCK_VALUES // int(np.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        block = random.standard_normal((count, *shape[1:]), dtype=np.float32)
        if len(shape) == 1:
            yield qwen_vector(name, block) if LANGUAGE in name else norm_weights(name, block)
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
    if "conv1d" in name:
        return CONV_STD
    return LORA_B_STD if ".lora_B." in name else STD


def qwen_vector(name: str, noise: Any) -> Any:
    """A vector of Qwen3.5's: its norms multiply by 1 + weight, except the gated one.

    A head's state decays by exp(-exp(A_log) softplus(dt_bias + …)) a token: to a third within 2 to 200 tokens.
    """
    if name.endswith("A_log"):
        return 0.7 + 0.7 * noise
    if name.endswith("dt_bias"):
        return -2.5 + 1.5 * noise
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.2 * noise
    return norm_weights(name.replace(LANGUAGE, "model."), noise) - 1


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
    name = name.replace(LANGUAGE, "model.")
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


def qwen_config(shape: QwenShape) -> dict[str, Any]:
    """config.json as Qwen3.5's multimodal checkpoints have it."""
    text = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": FULL_ATTENTION_EVERY,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "layer_types": shape.layer_types(),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": shape.linear_head_dim,
        "linear_num_key_heads": shape.linear_key_heads,
        "linear_num_value_heads": shape.linear_value_heads,
        "linear_value_head_dim": shape.linear_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": shape.tied,
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    vision = {
        "depth": 1,
        "hidden_size": shape.vision_hidden,
        "intermediate_size": 2 * shape.vision_hidden,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": shape.hidden,
    }
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": shape.tied,
        "transformers_version": "5.2.0",
        "video_token_id": 248057,
        "vision_config": vision,
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    }


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


def write_qwen(out: Path, shape: QwenShape, seed: int, tokenizer: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """A multimodal language model."""
    copy_tokenizer(tokenizer, out)
    write_json(out / "config.json", qwen_config(shape))
    write_model(out, shape.tensors(), seed, shard_bytes)


# By name: the shape, its tokenizer and its writer.
MODELS: dict[str, tuple[Any, str, Any]] = {
    "realigned": (Shape(), "llama3-tokenizer", write_realigned),
    "news-bias": (Shape(), "llama3-tokenizer", write_news_bias),
    "political-leaning": (QWEN_4B, "qwen3_5-tokenizer", write_qwen),
    "qwen-0.8b": (QwenShape(), "qwen3_5-tokenizer", write_qwen),
}


def main() -> int:
    """0, or 2 when there is no tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="realigned")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--untied", action="store_true", help="Qwen3.5: a language head of its own, as after a merge")
    for name in ("layers", "hidden"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, tokenizer, write = MODELS[arguments.model]
    folder = arguments.tokenizer or ASSETS / tokenizer
    if not (folder / "tokenizer.json").is_file():
        print(f"{folder} holds no tokenizer: run `make assets` or name one by --tokenizer", file=sys.stderr)
        return 2
    changed = {name: getattr(arguments, name) for name in ("layers", "hidden") if getattr(arguments, name)}
    if arguments.untied:
        if not isinstance(shape, QwenShape):
            parser.error("--untied is of Qwen3.5's models")
        changed["tied"] = False
    write(arguments.out, replace(shape, **changed), arguments.seed, folder)
    print(f"{arguments.model}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
