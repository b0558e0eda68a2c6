"""Generate text with a bundle: `Generator(path)` and its calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import Bundle
from samescore.runtime.chat import ChatEncoder, ChatTemplate, PromptEncoder
from samescore.runtime.errors import InputError, UsageError
from samescore.runtime.generation.answer import Answer, Completion, Piece
from samescore.runtime.generation.detokenizer import DetokenizerFactory
from samescore.runtime.generation.engine import CACHE_BYTES, Cancelled, Engine
from samescore.runtime.generation.sampling import Sampling, sampling_from
from samescore.runtime.generation.states import State
from samescore.runtime.manifest import Generation, Manifest, Variant
from samescore.runtime.providers import open_first
from samescore.runtime.session import Session
from samescore.runtime.threads import available_threads

# Prompts that are decoded together when several are handed in.
BATCH = 8

Ids = npt.NDArray[np.int64]
Messages = Sequence[Mapping[str, Any]]
Prompt = tuple[Ids, int]


class Generator:
    """A loaded bundle that writes. Thread-safe: calls from several threads take turns token by token.

    path: the bundle folder. provider: `auto`, `cpu`, `cuda`. variant: a variant's name, or None for the provider's first.
    threads: CPU threads (None: what affinity and the cgroup quota allow). cache_bytes: memory for states of earlier prompts,
    so that a chat's next turn or a shared system prompt is not read again; 0 keeps none. low_memory: as of a Classifier.

    Sampling options of every call are the fields of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty,
    presence_penalty, frequency_penalty, seed, max_tokens, stop, logprobs; what is not named comes from the checkpoint's
    generation_config.json.

    The attribute `rejected` says why `auto` gave up other variants, by name. Raises BundleError, ProviderError or UsageError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        low_memory: bool = False,
    ):
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        if cache_bytes < 0:
            raise UsageError(f"cache_bytes must be 0 (keep nothing) or more, got {cache_bytes}")
        self.threads = threads or available_threads()
        with Bundle(path) as bundle:
            self.manifest: Manifest = bundle.manifest
            self.digest = bundle.digest
            if bundle.manifest.generation is None:
                raise UsageError(
                    f"{path} is a classifier's bundle, it does not generate: samescore.Classifier({str(path)!r})"
                )
            self.generation: Generation = bundle.manifest.generation
            self._encoder = PromptEncoder(bundle.read("tokenizer.json"))
            name = self.generation.chat_template
            self._template_source = None if name is None else bundle.read(name).decode("utf-8")

            def attempt(chosen: Variant, target: str, last: bool) -> Session:
                model = bundle.model(chosen)
                return Session(model, target, intra_op_threads=self.threads, low_memory=low_memory)

            self.variant, self.target, session, self.rejected = open_first(bundle.manifest, provider, variant, attempt)
        context = min(self.generation.context, self.variant.max_tokens or self.generation.context)
        vocabulary = self.generation.vocabulary
        self.engine = Engine(session, context=context, vocabulary=vocabulary, cache_bytes=cache_bytes)
        self._detokenizer = DetokenizerFactory(self._encoder.tokenizer)
        self._chat_encoder: ChatEncoder | None = None

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self.engine.context

    def sampling(self, **options: Any) -> Sampling:
        """The bundle's generation defaults with these options over them; UsageError for an unknown one or a bad value."""
        return sampling_from(self.generation.defaults, options)

    @overload
    def generate(
        self,
        prompt: str,
        *,
        special_tokens: bool = False,
        cancel: threading.Event | None = None,
        batch: int = BATCH,
        **sampling: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str],
        *,
        special_tokens: bool = False,
        cancel: threading.Event | None = None,
        batch: int = BATCH,
        **sampling: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        special_tokens: bool = False,
        cancel: threading.Event | None = None,
        batch: int = BATCH,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Go on with a text as it is (no chat template), or with each of several, in input order.

        special_tokens: read control tokens that the text spells out as such. cancel: set it to stop; what was not finished
        then has finish_reason `cancelled`. batch: how many prompts are decoded together. The answers do not depend on each
        other, but for rounding. InputError names the first prompt that cannot be read, GenerationError says when the model
        gave no numbers.
        """
        chosen = self.sampling(**sampling)
        if isinstance(prompt, str):
            return self._complete([self._text_prompt(prompt, special_tokens)], chosen, cancel, batch)[0]
        texts = _named("prompt", prompt, lambda text: self._text_prompt(text, special_tokens))
        return self._complete(texts, chosen, cancel, batch)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        *,
        thinking: bool | None = None,
        template: Mapping[str, Any] | None = None,
        cancel: threading.Event | None = None,
        batch: int = BATCH,
        **sampling: Any,
    ) -> Any:
        """Answer a chat, a list of `{role, content}` (a Completion), or several chats (a list, in order).

        thinking: whether the model thinks first, where its template offers that; None leaves it to the template. template:
        more of the template's variables, such as `tools`. The rest is as for `generate`. UsageError when the bundle has no
        chat template.
        """
        chosen, encoder = self.sampling(**sampling), self._chat()
        if _is_many(messages):
            chats = _named("chat", messages, lambda one: encoder.encode(one, thinking=thinking, variables=template))
            return self._complete(chats, chosen, cancel, batch)
        prompt = encoder.encode(messages, thinking=thinking, variables=template)  # type: ignore[arg-type]
        return self._complete([prompt], chosen, cancel, batch)[0]

    def stream(
        self,
        prompt: str | Messages,
        *,
        thinking: bool | None = None,
        template: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
        cancel: threading.Event | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """The answer to a text or a chat in pieces, as they come; the last one holds the completion.

        Bad input is an error of this call, not of the first piece. Closing the iterator, or setting `cancel`, stops.
        """
        chosen = self.sampling(**sampling)
        if isinstance(prompt, str):
            if thinking is not None or template is not None:
                raise UsageError("thinking and template are for chats: stream([{role, content}, …])")
            encoded = self._text_prompt(prompt, special_tokens)
        else:
            encoded = self._chat().encode(prompt, thinking=thinking, variables=template)
        self._limit(encoded[0], chosen)
        return self._stream(encoded, chosen, cancel)

    def encode(self, prompt: str | Messages, **options: Any) -> Ids:
        """Token ids int64 [sequence] of a text (`special_tokens`) or a chat (`thinking`, `variables`), as generation reads it."""
        if isinstance(prompt, str):
            return self._encoder.text(prompt, **options)
        return self._chat().encode(prompt, **options)[0]

    def _stream(self, prompt: Prompt, sampling: Sampling, cancel: threading.Event | None) -> Iterator[Piece]:
        ids, keep = prompt
        answer = self._answer(ids, sampling)
        state = self._start(ids, keep, cancel)
        if state is None:
            yield answer.finish("cancelled")
            return
        assert state.logits is not None
        logits = state.logits[0]
        try:
            while True:
                piece = answer.advance(logits)
                if piece.text or piece.finish_reason:
                    yield piece
                if answer.finish_reason:
                    return
                if cancel is not None and cancel.is_set():
                    yield answer.finish("cancelled")
                    return
                logits = self.engine.step(state, [answer.last])
        finally:
            # The next turn of a chat begins with this one.
            if state.lengths[0] > len(ids):
                self.engine.remember(state)

    def _complete(
        self, prompts: list[Prompt], sampling: Sampling, cancel: threading.Event | None, batch: int
    ) -> list[Completion]:
        if batch < 1:
            raise UsageError(f"batch must be at least 1, got {batch}")
        for number, (ids, _) in enumerate(prompts):
            try:
                self._limit(ids, sampling)
            except InputError as error:
                raise InputError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
        done = []
        for start in range(0, len(prompts), batch):
            group = prompts[start : start + batch]
            if len(group) == 1:
                (*_, last) = self._stream(group[0], sampling, cancel)
                assert last.completion is not None
                done.append(last.completion)
            else:
                done += self._complete_together(group, sampling, cancel)
        return done

    def _complete_together(
        self, prompts: list[Prompt], sampling: Sampling, cancel: threading.Event | None
    ) -> list[Completion]:
        """Each prompt is read alone; then all rows take each step together, and a finished row is dropped."""
        answers = [self._answer(ids, sampling) for ids, _ in prompts]
        running: list[tuple[Answer, State]] = []
        for answer, (ids, keep) in zip(answers, prompts, strict=True):
            state = self._start(ids, keep, cancel)
            if state is None:
                answer.finish("cancelled")
                continue
            assert state.logits is not None
            answer.advance(state.logits[0])
            if answer.finish_reason is None:
                running.append((answer, state))
        if running:
            self._decode_together([answer for answer, _ in running], self.engine.join([s for _, s in running]), cancel)
        return [answer.completion() for answer in answers]

    def _decode_together(self, rows: list[Answer], state: State, cancel: threading.Event | None) -> None:
        while rows:
            if cancel is not None and cancel.is_set():
                for answer in rows:
                    answer.finish("cancelled")
                return
            logits = self.engine.step_rows(state, [answer.last for answer in rows])
            for answer, row in zip(rows, logits, strict=True):
                answer.advance(row)
            left = [number for number, answer in enumerate(rows) if answer.finish_reason is None]
            if left and len(left) < len(rows):
                state = self.engine.select(state, left)
            rows = [rows[number] for number in left]

    def _start(self, ids: Ids, keep: int, cancel: threading.Event | None) -> State | None:
        """The state behind a prompt; None when it was cancelled before."""
        try:
            return self.engine.start(ids, keep=keep, cancel=cancel)
        except Cancelled:
            return None

    def _answer(self, ids: Ids, sampling: Sampling) -> Answer:
        limit = self._limit(ids, sampling)
        return Answer(ids, sampling, self._detokenizer(), end=self.generation.eos, limit=limit)

    def _limit(self, ids: Ids, sampling: Sampling) -> int:
        """The most tokens of an answer; InputError when the prompt leaves no room for one."""
        if not len(ids):
            raise InputError("the prompt is empty: the tokenizer finds no token in it")
        room = self.context - len(ids)
        if room < 1:
            raise InputError(
                f"the prompt is {len(ids)} tokens long, and the model's context of {self.context} has to hold an answer too: "
                "shorten it"
            )
        # The last token of an answer is not read any more, so it needs no place of its own.
        return min(sampling.max_tokens, room)

    def _text_prompt(self, text: Any, special_tokens: bool) -> Prompt:
        if not isinstance(text, str):
            raise InputError(f"expected a text, got {type(text).__name__}; chats go to chat(messages)")
        return self._encoder.text(text, special_tokens=special_tokens), 0

    def _chat(self) -> ChatEncoder:
        if self._template_source is None:
            raise UsageError(
                "this bundle has no chat template: its checkpoint had none. generate(text) goes on with a text as it is"
            )
        if self._chat_encoder is None:
            template = ChatTemplate(self._template_source, self.generation.template_tokens)
            self._chat_encoder = ChatEncoder(self._encoder, template)
        return self._chat_encoder


def _is_many(messages: Any) -> bool:
    """Whether these are several chats: a list of lists."""
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and not isinstance(messages, str)
        and all(isinstance(part, Sequence) and not isinstance(part, str) for part in messages)
    )


def _named(what: str, items: Sequence[Any], encode: Any) -> list[Prompt]:
    """Each item encoded; an InputError says which one it was."""
    encoded = []
    for number, item in enumerate(items):
        try:
            encoded.append(encode(item))
        except InputError as error:
            raise InputError(f"{what} {number}: {error}") from error
    return encoded
