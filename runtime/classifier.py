"""Score texts with a bundle: `Classifier(path)` and its calls."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import Bundle, ModelBytes
from samescore.runtime.canary import CanaryResult, Policy, check_canary, check_policy, read_canary
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import InputError, UsageError
from samescore.runtime.manifest import Manifest
from samescore.runtime.prediction import Prediction, predict
from samescore.runtime.prefill import Reader, common_prefix, state_after
from samescore.runtime.providers import choose
from samescore.runtime.scheduler import run_longest_first
from samescore.runtime.session import Session, State
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import Encoded, TextEncoder

log = logging.getLogger(__name__)

# Above this, a second copy of the repacked weights costs more than scoring two texts at a time gains.
LARGE_BYTES = 512 * 1024 * 1024

Message = Mapping[str, str]
Conversation = Sequence[Message]


class Classifier:
    """A loaded bundle. Thread-safe; scores do not depend on what else is scored beside them.

    path: the bundle folder. provider: `auto`, `cpu`, `cuda`, `migraphx` or `rocm`. variant: a variant's name, or None
    for the provider's first. threads: CPU threads to use in all (None: what affinity and the cgroup quota allow).
    workers: texts scored at the same time when several are handed in (default: one per thread; 1 for models of more than
    512 MiB, because single texts and several at once need a session each). max_tokens: where to cut longer texts, instead
    of the bundle's limit. low_memory: keep weights in the page cache instead of repacking them (loads faster, runs
    somewhat slower). raw: probabilities without the variant's recalibration, if it has one. canary: whether some golden texts
    are scored first, to see that this box gives the certified numbers: `flag` (where CPU, provider or ONNX Runtime are others
    than there; a warning is logged), `refuse` (always; CanaryError when they are others or cannot be had) or `off`. The
    attribute `canary` says what was found.

    Raises BundleError, ProviderError, CanaryError or UsageError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        workers: int | None = None,
        max_tokens: int | None = None,
        low_memory: bool = False,
        raw: bool = False,
        canary: Policy = "flag",
    ):
        check_policy(canary)
        for name, value in (("threads", threads), ("workers", workers)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self.threads = threads or available_threads()
        with Bundle(path) as bundle:
            self.manifest: Manifest = bundle.manifest
            self.digest = bundle.digest
            self.variant, self.target = choose(bundle.manifest, provider=provider, variant=variant)
            self.recalibration = None if raw else self.variant.recalibration
            contract = bundle.manifest.contract.with_max_tokens(max_tokens)
            limit = self.variant.max_tokens
            if limit is not None and contract.max_tokens > limit:
                raise UsageError(
                    f"{self.variant.name} was exported for texts of at most {limit} tokens, not {contract.max_tokens}: name "
                    "fewer, another variant, or export it again with --max-tokens"
                )
            self.encoder = TextEncoder(bundle.read("tokenizer.json"), contract)
            self._model: ModelBytes = bundle.model(self.variant)
            certified = None if canary == "off" else read_canary(bundle, self.variant.name)
        large = sum(map(len, self._model.data.values())) > LARGE_BYTES
        self.workers = workers or (1 if large else self.threads)
        self._low_memory = low_memory
        self._readers: dict[int, Reader] = {}
        self._lock = threading.Lock()
        # Only an explicit number of workers says that many texts will come at once.
        reader = self._reader(max(1, self.threads // (workers or 1)))
        self.canary: CanaryResult = check_canary(
            certified, self.variant.name, reader, self.manifest.activation, policy=canary
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the logits."""
        return self.manifest.labels

    @overload
    def __call__(self, item: str | Message, /) -> Prediction: ...

    @overload
    def __call__(self, item: Sequence[str] | Conversation | Sequence[Conversation], /) -> Any: ...

    def __call__(self, item: Any, /) -> Any:
        """Score one text, conversation or `{prompt, response}` (a Prediction), or a list of them (a list, in order).

        A conversation is a list of `{role, content}`; InputError names the first item that cannot be scored.
        """
        if isinstance(item, str | Mapping):
            return self.score([item])[0]
        if not isinstance(item, Sequence):
            raise InputError(f"expected a text, a conversation or a list of them, got {type(item).__name__}")
        conversation = self.manifest.contract.kind == "conversation"
        if conversation and item and all(isinstance(part, Mapping) for part in item):
            return self.score([item])[0]
        return self.score(item)

    @overload
    def score(
        self,
        items: Iterable[str | Message | Conversation],
        *,
        workers: int | None = None,
        allow_role_tokens: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> list[Prediction]: ...

    @overload
    def score(
        self,
        items: str,
        responses: Sequence[str],
        *,
        workers: int | None = None,
        progress: Callable[[], None] | None = None,
    ) -> list[Prediction]: ...

    def score(
        self,
        items: Any,
        responses: Sequence[str] | None = None,
        *,
        workers: int | None = None,
        allow_role_tokens: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> list[Prediction]:
        """Score texts, conversations or `{prompt, response}` objects; or `(prompt, [response, …])`. In input order.

        With a prompt and its responses, the tokens that all share are read once (where the graph keeps a KV cache).
        workers: texts run at the same time (default: the Classifier's). allow_role_tokens: leave role tokens inside
        message contents as they are. progress: called once per finished text, from worker threads.
        """
        if responses is not None:
            items = self._with_prompt(items, responses)
        elif isinstance(items, str | Mapping):
            raise InputError("score takes a list of texts; for one text call the classifier itself: classifier(text)")
        encoded = []
        for number, item in enumerate(items):
            try:
                encoded.append(self.encoder.encode(item, allow_role_tokens=allow_role_tokens))
            except InputError as error:
                raise InputError(f"item {number}: {error}") from error
        return self.score_encoded(encoded, workers=workers, share_prefix=responses is not None, progress=progress)

    def _with_prompt(self, prompt: Any, responses: Sequence[str]) -> list[dict[str, str]]:
        if self.manifest.contract.kind != "prompt-response":
            raise UsageError(
                f"this bundle reads a {self.manifest.contract.kind}, not a prompt and a response: score([text, …])"
            )
        if not isinstance(prompt, str) or isinstance(responses, str):
            raise InputError("score(prompt, responses) takes one prompt and a list of responses")
        return [{"prompt": prompt, "response": response} for response in responses]

    def score_records(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        workers: int | None = None,
        allow_role_tokens: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> list[Prediction | InputError]:
        """Score JSON objects by the contract's fields; one that cannot be scored yields its InputError in place."""
        encoded: dict[int, Encoded] = {}
        results: dict[int, Prediction | InputError] = {}
        for number, record in enumerate(records):
            try:
                text = text_of_record(record, self.manifest.contract, allow_role_tokens=allow_role_tokens)
                encoded[number] = self.encoder.encode(text)
            except InputError as error:
                results[number] = error
        scored = self.score_encoded(list(encoded.values()), workers=workers, progress=progress)
        results.update(zip(encoded, scored, strict=True))
        return [results[number] for number in range(len(records))]

    def score_encoded(
        self,
        encoded: Sequence[Encoded],
        *,
        workers: int | None = None,
        share_prefix: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> list[Prediction]:
        """Score already tokenized texts; Predictions in input order. share_prefix: as `logits`."""
        sequences = [item.input_ids for item in encoded]
        rows = self.logits(sequences, workers=workers, share_prefix=share_prefix, progress=progress)
        manifest = self.manifest
        return [
            predict(
                row,
                manifest.labels,
                manifest.activation,
                tokens=len(item.input_ids),
                truncated=item.truncated,
                values=manifest.values,
                recalibration=self.recalibration,
            )
            for row, item in zip(rows, encoded, strict=True)
        ]

    def logits(
        self,
        sequences: Sequence[npt.NDArray[np.int64]],
        *,
        workers: int | None = None,
        share_prefix: bool = False,
        progress: Callable[[], None] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Logits float32 [texts, labels] of token id sequences, each run alone and unpadded.

        share_prefix: read the tokens that all sequences begin with once, where the graph keeps a KV cache.
        """
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, got {workers}")
        count = min(workers or self.workers, len(sequences)) or 1
        reader = self._reader(max(1, self.threads // count))
        state: State | None = None
        if share_prefix and reader.session.has_state and (shared := common_prefix(sequences)):
            state = state_after(reader.session, sequences[0][:shared])
            sequences = [ids[shared:] for ids in sequences]

        def run(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            row = reader.logits(ids, state)
            if progress is not None:
                progress()
            return row

        rows = run_longest_first(sequences, len, run, workers=count)
        return np.stack(rows) if rows else np.zeros((0, len(self.labels)), dtype=np.float32)

    def _reader(self, intra_op_threads: int) -> Reader:
        """Reads on a session with that many threads per call, made on first use over the same verified bytes."""
        with self._lock:
            reader = self._readers.get(intra_op_threads)
            if reader is None:
                session = Session(
                    self._model, self.target, intra_op_threads=intra_op_threads, low_memory=self._low_memory
                )
                reader = self._readers[intra_op_threads] = Reader(session, self.encoder.prefix_ids)
            return reader


def load(path: str | os.PathLike[str], **options: Any) -> Classifier:
    """Open a bundle for scoring; `options` are those of Classifier."""
    return Classifier(path, **options)
