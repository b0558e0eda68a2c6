"""Text to token ids, torch-free: the `tokenizers` library plus the contract's truncation.

Token ids equal those of the Hugging Face tokenizer on the contract's string. The one difference is on purpose: where a text
would yield a control token (a literal `</s>`, or a full-width one that normalises to it), the text is broken by a space
there (`< /s>`), so that what a user writes never becomes a control token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from samescore.runtime.contract import TextContract, around_article, join_around_middle, render
from samescore.runtime.errors import BundleError, InputError, UsageError

# Characters looked at first per token that is kept; more are read when a stretch of text yields fewer tokens.
CHARACTERS_PER_TOKEN = 16
# Fewer tokens of text than this are no text.
LEAST_TEXT = 8
# How an article may begin: what it does to the tokens before it shows which of them it cannot touch.
BEGINNINGS = ("The", "a", "42", '"', "(", "--", ".", "#", "…", "我", "É", "\u0301", "👩", "{", "<", "`", "_", "$")


@dataclass(frozen=True)
class Encoded:
    """Token ids int64 [sequence] of one text, and whether something was cut to fit."""

    input_ids: npt.NDArray[np.int64]
    truncated: bool


class TextEncoder:
    """A tokenizer that applies one text contract. Safe to call from several threads."""

    def __init__(self, tokenizer_json: bytes, contract: TextContract):
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json cannot be read by the tokenizers library: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.tokenizer.encode_special_tokens = True
        self.contract = contract
        self.special_tokens = self.tokenizer.num_special_tokens_to_add(False)
        unknown = self.tokenizer.token_to_id("<unk>"), self.tokenizer.token_to_id("[UNK]")
        special = (number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)
        self._control = frozenset(special) - frozenset(unknown)
        if contract.max_tokens <= self.special_tokens + LEAST_TEXT:
            raise BundleError(f"the contract's limit of {contract.max_tokens} tokens leaves no room for text")
        self.prefix_ids = self._instruction_prefix() if contract.kind == "instruction" else np.zeros(0, np.int64)

    def encode(self, item: Any, *, allow_role_tokens: bool = False) -> Encoded:
        """Token ids of a text or a conversation; InputError when it is empty or of the wrong shape."""
        article = render(item, self.contract, allow_role_tokens=allow_role_tokens)
        text = self._whole(article)
        limit = self.contract.max_tokens
        window = limit * CHARACTERS_PER_TOKEN
        if len(text) <= 2 * window or self._head(text, limit) == len(text):
            ids = self._ids(text)
            if len(ids) <= limit:
                return self._encoded(ids, truncated=False)
        fit = {"middle": self._fit_middle, "right": self._fit_right, "article": self._fit_article}
        return self._encoded(fit[self.contract.truncation](article), truncated=True)

    def spell(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def string(self, item: Any) -> str:
        """What the tokenizer reads of a text that is not cut, before control tokens in it are broken; see `encode`."""
        return self._whole(render(item, self.contract))

    def _whole(self, text: str) -> str:
        """The string that is tokenized: of an instruction, the template around the article."""
        if self.contract.kind != "instruction":
            return text
        before, after = around_article(self.contract)
        return before + text + after

    def _instruction_prefix(self) -> npt.NDArray[np.int64]:
        """The tokens that every text of an instruction begins with, int64 [prefix].

        Tokens can merge across the border of template and article, so a token counts only if articles that begin in many
        ways leave it as it is. UsageError when the prompt leaves no room for an article.
        """
        prompt = "".join(around_article(self.contract))
        self._refuse_control_tokens(prompt)
        needed = len(self._ids(prompt)) + LEAST_TEXT
        if self.contract.max_tokens < needed:
            raise UsageError(
                f"max_tokens {self.contract.max_tokens} leaves no room for an article: the prompt alone is "
                f"{needed - LEAST_TEXT} tokens; name at least {needed}"
            )
        texts = [np.asarray(self._ids(self._whole(beginning)), dtype=np.int64) for beginning in BEGINNINGS]
        shortest = min(map(len, texts))
        same = np.all(np.stack([ids[:shortest] for ids in texts]) == texts[0][:shortest], axis=0)
        return texts[0][: shortest if same.all() else int(np.argmin(same))]

    def _refuse_control_tokens(self, prompt: str) -> None:
        """Control tokens are read as plain text everywhere, so a template that needs them would not be what it looks like."""
        self.tokenizer.encode_special_tokens = False
        encoding = self.tokenizer.encode(prompt, add_special_tokens=False)
        self.tokenizer.encode_special_tokens = True
        found = [token for token, number in zip(encoding.tokens, encoding.ids, strict=True) if number in self._control]
        if found:
            raise BundleError(
                f"the contract's template holds the control token {found[0]!r}; templates are plain text: leave it away"
            )

    def _encoded(self, ids: list[int], *, truncated: bool) -> Encoded:
        if len(ids) <= self.special_tokens:
            raise InputError("the text is empty: the tokenizer finds no token in it")
        return Encoded(np.asarray(ids, dtype=np.int64), truncated)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.post_process(self._plain(text)).ids)

    def _plain(self, text: str) -> Any:
        """The encoding without special tokens; what would yield a control token is broken until nothing does."""
        while True:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token in self._control]
            if not spans:
                return encoding
            for start, end in reversed(spans):
                if end - start < 2:
                    raise InputError(f"character {start} of the text is a control token: {text[start:end]!r}")
                text = f"{text[: start + 1]} {text[start + 1 :]}"

    def _fit_right(self, text: str) -> list[int]:
        """The first tokens, special tokens around them."""
        keep = self.contract.max_tokens - self.special_tokens
        window = self._head(text, keep + 1)
        encoding = self._plain(text[:window])
        encoding.truncate(keep)
        return list(self.tokenizer.post_process(encoding).ids)

    def _fit_middle(self, text: str) -> list[int]:
        """Head, ellipsis, tail. Tokens at the joints can merge differently, so the budget shrinks until it fits."""
        limit = self.contract.max_tokens
        budget = limit - len(self._ids(self.contract.ellipsis))
        while budget > 0:
            tail = budget // 2
            head_end = self._head(text, budget - tail)
            tail_start = max(head_end, self._tail(text, tail))
            ids = self._ids(join_around_middle(text, head_end, tail_start, self.contract))
            if len(ids) <= limit:
                return ids
            budget -= len(ids) - limit
        raise InputError(f"the text cannot be cut to {limit} tokens")

    def _fit_article(self, article: str) -> list[int]:
        """The template around the article's first tokens; at the cut they can merge otherwise, so the budget shrinks."""
        limit = self.contract.max_tokens
        budget = limit - len(self._ids(self._whole("")))
        while budget > 0:
            ids = self._ids(self._whole(article[: self._head(article, budget)]))
            if len(ids) <= limit:
                return ids
            budget -= len(ids) - limit
        raise InputError(f"the text cannot be cut to {limit} tokens")

    def _head(self, text: str, count: int) -> int:
        """Where the first `count` tokens of `text` end (in characters), reading no more of it than that takes."""
        window = count * CHARACTERS_PER_TOKEN
        while True:
            offsets = self.tokenizer.encode(text[:window], add_special_tokens=False).offsets
            if len(offsets) > count:
                return int(offsets[count - 1][1])
            if window >= len(text):
                return len(text)
            window *= 4

    def _tail(self, text: str, count: int) -> int:
        """Where the last `count` tokens of `text` begin (in characters)."""
        if count <= 0:
            return len(text)
        window = count * CHARACTERS_PER_TOKEN
        while True:
            start = max(0, len(text) - window)
            offsets = self.tokenizer.encode(text[start:], add_special_tokens=False).offsets
            if len(offsets) > count:
                return start + int(offsets[-count][0])
            if start == 0:
                return 0
            window *= 4
