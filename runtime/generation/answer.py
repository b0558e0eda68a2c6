"""One answer while it grows: tokens are chosen, become text, and stop where they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from samescore.runtime.generation.detokenizer import Detokenizer, StopFilter
from samescore.runtime.generation.sampling import Logits, Sampler, Sampling, TokenLogprob, logprob_of

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Completion:
    """An answer.

    text: without special tokens, and without the stop string that ended it. token_ids: every token that was generated, the
    end token or the tokens of a stop string included. finish_reason: `stop` (end token or stop string), `length` (max_tokens
    or a full context) or `cancelled`. logprobs: one for each token, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What one step of a stream adds: text, and the tokens read since the piece before.

    Together the pieces' texts are the answer's. The last one has a `finish_reason` and the whole `completion`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    completion: Completion | None = field(default=None, repr=False)


class Answer:
    """The answer to one prompt. limit: the most tokens it may have, by max_tokens and the room in the context."""

    def __init__(
        self,
        prompt: npt.NDArray[np.int64],
        sampling: Sampling,
        detokenizer: Detokenizer,
        *,
        end: Sequence[int],
        limit: int,
    ):
        self._prompt_tokens, self._sampling, self._end = len(prompt), sampling, frozenset(end)
        self._limit = limit
        self._sampler = Sampler(sampling, prompt)
        self._detokenizer, self._filter = detokenizer, StopFilter(sampling.stop)
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._reported = 0
        self.finish_reason: FinishReason | None = None

    @property
    def last(self) -> int:
        """The newest token."""
        return self._tokens[-1]

    def advance(self, logits: Logits) -> Piece:
        """Choose the next token from logits float32 [vocabulary]. GenerationError when they are not finite."""
        token = self._sampler.choose(logits)
        if self._sampling.logprobs is not None:
            self._logprobs.append(logprob_of(logits, token, self._sampling.logprobs))
        self._tokens.append(token)
        if token in self._end:
            return self.finish("stop")
        text = self._filter.feed(self._detokenizer.feed(token))
        if self._filter.stopped:
            return self.finish("stop", text)
        if len(self._tokens) >= self._limit:
            return self.finish("length", text)
        return self._piece(text)

    def finish(self, reason: FinishReason, text: str = "") -> Piece:
        """The last piece: what was held back, and the completion."""
        text += self._filter.feed(self._detokenizer.flush())
        # A stop string can be complete only with what the detokenizer still held.
        self.finish_reason = "stop" if self._filter.stopped else reason
        return self._piece(text + self._filter.flush())

    def completion(self) -> Completion:
        """The whole answer, once it is finished."""
        assert self.finish_reason is not None
        return Completion(
            "".join(self._texts),
            tuple(self._tokens),
            self.finish_reason,
            self._prompt_tokens,
            len(self._tokens),
            None if self._sampling.logprobs is None else tuple(self._logprobs),
        )

    def _piece(self, text: str) -> Piece:
        self._texts.append(text)
        if self.finish_reason is None and not text:
            return Piece("", ())  # its token is reported with the text that it begins
        new, self._reported = tuple(self._tokens[self._reported :]), len(self._tokens)
        if self.finish_reason is None:
            return Piece(text, new)
        return Piece(text, new, self.finish_reason, self.completion())
