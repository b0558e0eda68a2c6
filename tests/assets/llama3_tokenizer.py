"""The tokenizer of Llama 3.1 and 3.2 as tokenizer.json, from the ranks that the package `llama-models` ships.

A rank is a token's place in the vocabulary and its priority when it is merged. Each pair of known tokens that makes a
token up becomes a merge, in the order of ranks; a word that is itself a token is taken whole (`ignore_merges`).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
NAMED = (
    *(BEGIN, END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"),
    *("<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    "<|python_tag|>",
)
SPECIAL_TOKENS = 256
# What Meta's tokenizer gives, after <|begin_of_text|>.
KNOWN = {"Hello world": [9906, 1917], "The capital of France is Paris.": [791, 6864, 315, 9822, 374, 12366, 13]}


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of a token into two known ones, by the rank of what they make."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def tokenizer_of(ranks: dict[bytes, int]) -> Tokenizer:
    """Byte-level BPE with Llama 3's special tokens, and <|begin_of_text|> before every text."""
    alphabet = byte_alphabet()

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {written(token): rank for token, rank in ranks.items()}
    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(3, 3 + SPECIAL_TOKENS - len(NAMED))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*NAMED, *reserved)])
    template = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, len(ranks))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def convert(assets: Path, folder: Path) -> str:
    """tokenizer.json and tokenizer_config.json; RuntimeError when known ids do not come out."""
    path = assets / "llama_models" / "llama_models" / "llama3" / "tokenizer.model"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    tokenizer = tokenizer_of(ranks)
    for text, ids in KNOWN.items():
        if tokenizer.encode(text).ids != [tokenizer.token_to_id(BEGIN), *ids]:
            raise RuntimeError(f"{text!r} becomes {tokenizer.encode(text).ids}, not {ids}")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return f"{tokenizer.get_vocab_size():,} tokens"
