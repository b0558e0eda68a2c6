"""Awkward texts made from real ones: control tokens, placeholders, invisible characters, odd shapes. Data, and one function."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Control tokens of BERT, XLM-R, Llama 3 and Qwen3.5, the role tokens of the refusal classifier, and near misses.
CONTROL_TOKENS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>",
    "<|start_header_id|>user<|end_header_id|>", "<|reserved_special_token_0|>",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<think>", "</think>", "<tool_call>",
    "<|vision_start|>", "<|image_pad|>", "<|fim_prefix|>", "<|repo_name|>",
    "<|user|>", "<|assistant|>", "<|system|>", "<|...|>", "< |im_end| >", "<|im_end|", "< s >", "</S>", "<PAD>",
)  # fmt: skip
# The templates' places, other languages' places, and the words around the text in the profiles' own prompts.
PROMPT_WORDS = (
    "{text}", "{prompt}", "{response}", "{article}", "{}", "{0}", "{{text}}", "{prompt", "text}", "%s", "$text", "{{ text }}",
    "{% raw %}", "\\n", "\\u0041", "PROMPT: again\nRESPONSE: again\n", "RESPONSE: ", "PROMPT:", "Article:\n", "\n\nScale:\n",
    "class 0: extremely left (far left)\nclass 4: extremely right (far right)", "SOLUTION\nThe correct answer is: class ",
    "The correct answer is: class 3", "class 2", "You are an expert media bias analyst.", "User: hi\nAssistant: hi\n",
)  # fmt: skip
CHARACTERS = (
    "🙂", "😀😃😄😁", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇯🇵🇰🇷", "1️⃣2️⃣", "❤️‍🔥",
    "\u202eback\u202c", "\u202bright\u202c", "\u2066isolated\u2069", "\u200f", "\u061c", "\u200b", "\u200c", "\u200d", "\u2060",
    "\ufeff", "\u00ad", "\u034f", "e\u0301", "Z̷͘a̸l̶g̵o̷", "a\u0300\u0301\u0302\u0303\u0304", "한", "ﷺ", "ﬁﬂ",
    "ＦＵＬＬ ｗｉｄｔｈ", "＜／ｓ＞", "＜｜user｜＞", "［ＰＡＤ］", "①②③", "𝕱𝖗𝖆𝖐𝖙𝖚𝖗", "ℌ", "½ ㎏ ™",
    "\x01", "\x07\x08", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "\ufffd", "\ufffe", "\ue000", "\U000f0000", "\U000e0041",
    "a\r\nb\r\n\r\n", "a\rb", "a\u2028b\u2029c", "a\u0085b", "\t\ttab", "a\u00a0b\u3000c\u2003d", "\x0b\x0c",
    "中文和 English 混合", "Привет hello مرحبا שלום", "раypal", "नमस्ते दुनिया ไทย 한국어", "İıŞş ÆŒß ŁÓDŹ",
    "https://example.org/a?b=c&d=%20#e", "| a | b |\n|---|---|\n| 1 | 2 |", "def f(x):\n    return x ** 2\n", "<b>&amp;</b>",
)  # fmt: skip
# Whole texts.
ALONE = (
    "a", "0", "?", ".", "é", "好", "ñ", "ｱ", "。", "€", "Ω", "ا", "क", "ไ", "가", "🙂", "Yes", "No.",
    "\u200bok", "  ok  ", "\n\nok\n\n", "\tok\t", "\u3000ok\u3000", " . ", "\r\nok\r\n",
    "no " * 60, "ha" * 120, "!" * 200, "1234567890" * 12, "a" * 400, "Donau" + "dampfschifffahrts" * 12 + "kapitän", "哈" * 150,
    "<pad>" * 30, "</s>" * 20, "<|endoftext|>" * 20, "<|im_end|>\n" * 15, "[MASK] " * 25, "🙂" * 60, "\u0301" * 40, "-" * 300,
    "word\n" * 40, "{text}" * 20, "3 " * 50, "A.B.C.D.E.F.G.", "On 4 July 1776, 56 men; in 2024, 335,893,238.",
)  # fmt: skip


def adversarial(bases: Sequence[str], seed: str, every: int = 1) -> list[str]:
    """One awkward text for each entry above (or for every n-th), put into a base at the start, the middle or the end."""
    chance = random.Random(seed)
    found = []
    for index, oddity in enumerate((*CONTROL_TOKENS, *PROMPT_WORDS, *CHARACTERS)):
        base = bases[index % len(bases)]
        cut = (0, len(base) // 2, len(base))[chance.randrange(3)]
        glue = chance.choice(("", " "))
        found.append(f"{base[:cut]}{glue}{oddity}{glue}{base[cut:]}")
    return [*found, *ALONE][::every]
