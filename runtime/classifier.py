"""Score texts with a bundle: `Classifier(path)` and its calls."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from samescore.runtime.batches import BATCH_TOKENS, Bucket, parse_buckets
from samescore.runtime.bundle import Bundle, ModelBytes
from samescore.runtime.cache import file_digests
from samescore.runtime.canary import CanaryResult, Policy, check_canary, check_policy, read_canary
from samescore.runtime.contract import text_of_record
from samescore.runtime.errors import BundleError, InputError, ProviderError, UsageError
from samescore.runtime.manifest import Manifest, Variant
from samescore.runtime.padded import PaddedReader, can_pad, open_buckets, require_padding
from samescore.runtime.prediction import Prediction, predict
from samescore.runtime.prefill import Reader, common_prefix, state_after
from samescore.runtime.providers import normalize_provider, open_first
from samescore.runtime.scheduler import run_longest_first
from samescore.runtime.session import Session, State
from samescore.runtime.threads import available_threads
from samescore.runtime.tokenizer import Encoded, TextEncoder
from samescore.runtime.warmup import buckets_of

log = logging.getLogger(__name__)

# Above this, a second copy of the repacked weights costs more than scoring two texts at a time gains.
LARGE_BYTES = 512 * 1024 * 1024

Message = Mapping[str, str]
Conversation = Sequence[Message]


class Classifier:
    """A loaded bundle. Thread-safe; on CPUs scores do not depend on what else is scored beside them.

    path: the bundle folder. provider: `auto`, `cpu`, `cuda`, `migraphx`, `rocm`, or another that this ONNX Runtime lists
    (`openvino`; see `samescore.runtime.providers.candidates`). One that is named is used or ProviderError is raised; `auto`
    logs a warning for each that does not work here and takes the next. variant: a variant's name, or None for the provider's
    first. threads: CPU threads to use in all (None: what affinity and the cgroup quota allow).
    workers: texts scored at the same time when several are handed in (default: one per thread; 1 for models of more than
    512 MiB, because single texts and several at once need a session each). max_tokens: where to cut longer texts, instead
    of the bundle's limit. low_memory: keep weights in the page cache instead of repacking them (loads faster, runs
    somewhat slower). raw: probabilities without the variant's recalibration, if it has one. canary: whether some golden texts
    are scored first, to see that this box gives the certified numbers: `flag` (where CPU, provider or ONNX Runtime are others
    than there; a warning is logged), `refuse` (always; CanaryError when they are others or cannot be had) or `off`. The
    attribute `canary` says what was found. provider_options: options of a named provider, by ONNX Runtime's names
    (`{"device_id": 1, "gpu_mem_limit": 8 << 30}` for CUDA).
    On cuda and migraphx texts run in padded batches, and scores depend on what is beside them as far as rounding does.
    buckets: the shapes to compile, `8x128,1x512` or (batch, sequence) pairs (migraphx; default: those of `samescore warmup`,
    else planned from the golden texts); longer texts are refused. batch_tokens: padded tokens of one call (cuda; default: 8192).
    Either also makes the cpu pad, which is slower, to see what a GPU would be handed. What is padded shares no prefix, and
    `workers` do not count. The attribute `rejected` says why `auto` gave up other variants, by name.

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
        provider_options: Mapping[str, str | int] | None = None,
        buckets: str | Iterable[Bucket | tuple[int, int]] | None = None,
        batch_tokens: int | None = None,
    ):
        check_policy(canary)
        if buckets is not None and batch_tokens is not None:
            raise UsageError("buckets say how many tokens a call has, and batch_tokens too: name one of them")
        for name, value in (("threads", threads), ("workers", workers), ("batch_tokens", batch_tokens)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        self.threads = threads or available_threads()
        self._low_memory = low_memory
        self._options = _options_for(provider, provider_options)
        self._shapes = (buckets, batch_tokens)
        self._readers: dict[int, Reader] = {}
        self._lock = threading.Lock()
        with Bundle(path) as bundle:
            self.manifest: Manifest = bundle.manifest
            if bundle.manifest.generation is not None:
                raise UsageError(f"{path} holds a model that generates text: open it with samescore.load or Generator")
            self.digest = bundle.digest
            contract = bundle.manifest.contract.with_max_tokens(max_tokens)
            self.encoder = TextEncoder(bundle.read("tokenizer.json"), contract)
            # Only an explicit number of workers says that many texts will come at once.
            reader = self._open(bundle, provider, variant, max(1, self.threads // (workers or 1)))
            certified = None if canary == "off" else read_canary(bundle, self.variant.name)
        self.recalibration = None if raw else self.variant.recalibration
        large = sum(map(len, self._model.data.values())) > LARGE_BYTES
        self.workers = workers or (1 if large else self.threads)
        self.canary: CanaryResult = check_canary(
            certified, self.variant.name, reader, self.manifest.activation, policy=canary
        )

    def _open(self, bundle: Bundle, provider: str, variant: str | None, intra_op_threads: int) -> Reader:
        """Open the first candidate that works here, as `variant` on `target`; what reads single texts on it."""

        def attempt(chosen: Variant, target: str, last: bool) -> Reader:
            # A session that could be made but not run belongs to a provider that was given up.
            self._readers.clear()
            self._padded: PaddedReader | None = None
            self.variant, self.target = chosen, target
            self._model: ModelBytes = bundle.model(chosen)
            try:
                check_limit(chosen, self.encoder.contract.max_tokens)
                self._padded = self._padded_reader(bundle)
                reader = self._padded or self._reader(intra_op_threads)
                if not last:
                    # Only a run shows that a GPU computes at all, and there is something else to take.
                    reader.logits(np.zeros(1, np.int64))
            except (BundleError, UsageError) as error:
                if last:
                    raise
                raise ProviderError(str(error)) from error
            return reader

        _, _, reader, self.rejected = open_first(bundle.manifest, provider, variant, attempt)
        return reader

    def _padded_reader(self, bundle: Bundle) -> PaddedReader | None:
        """What reads padded batches; None where each text is read alone."""
        _, batch_tokens = self._shapes
        if buckets := self._buckets(bundle):
            files = file_digests(self.manifest, self.variant)
            return open_buckets(
                self._model,
                self.target,
                buckets,
                files,
                threads=self.threads,
                low_memory=self._low_memory,
                options=self._options,
            )
        if batch_tokens is None and not (self.target == "cuda" and can_pad(self.variant.inputs)):
            return None
        session = self._reader(self.threads).session
        longest = self.encoder.contract.max_tokens
        return PaddedReader(session, batch_tokens=batch_tokens or BATCH_TOKENS, longest=longest)

    def _buckets(self, bundle: Bundle) -> tuple[Bucket, ...]:
        """The shapes that get a session of their own; none where one session takes any shape."""
        asked, batch_tokens = self._shapes
        if self.target == "cuda" and asked is not None:
            raise UsageError("buckets are for migraphx; cuda runs any shape: name batch_tokens instead, if anything")
        if self.target == "migraphx" and batch_tokens is not None:
            raise UsageError("migraphx runs compiled shapes only: name buckets, or samescore warmup --batch-tokens")
        if asked is None and self.target != "migraphx":
            return ()
        require_padding(self.variant.inputs)
        if asked is not None:
            return parse_buckets(asked)
        return buckets_of(bundle, self.variant, self.target, self.encoder.contract.max_tokens)

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
                encoded.append(self._encode(item, allow_role_tokens=allow_role_tokens))
            except InputError as error:
                raise InputError(f"item {number}: {error}") from error
        return self.score_encoded(encoded, workers=workers, share_prefix=responses is not None, progress=progress)

    def _encode(self, item: Any, *, allow_role_tokens: bool = False) -> Encoded:
        encoded = self.encoder.encode(item, allow_role_tokens=allow_role_tokens)
        if self._padded is not None:
            self._padded.check_length(len(encoded.input_ids))
        return encoded

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
                encoded[number] = self._encode(text)
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
        """Logits float32 [texts, labels] of token id sequences, each run alone and unpadded, on GPUs in padded batches.

        share_prefix: read the tokens that all sequences begin with once, where the graph keeps a KV cache.
        """
        if workers is not None and workers < 1:
            raise UsageError(f"workers must be at least 1, got {workers}")
        if self._padded is not None:
            return self._stacked(self._padded.read(sequences, progress))
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
        return self._stacked(rows)

    def _stacked(self, rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        return np.stack(rows) if rows else np.zeros((0, len(self.labels)), dtype=np.float32)

    def _reader(self, intra_op_threads: int) -> Reader:
        """Reads on a session with that many threads per call, made on first use over the same verified bytes."""
        if self.target != "cpu":
            intra_op_threads = self.threads  # one session, and one copy of the weights on the device
        with self._lock:
            reader = self._readers.get(intra_op_threads)
            if reader is None:
                session = Session(
                    self._model,
                    self.target,
                    intra_op_threads=intra_op_threads,
                    low_memory=self._low_memory,
                    options=self._options,
                )
                reader = self._readers[intra_op_threads] = Reader(session, self.encoder.prefix_ids)
            return reader


def check_limit(variant: Variant, max_tokens: int) -> None:
    """UsageError where a variant cannot read texts of so many tokens."""
    limit = variant.max_tokens
    if limit is not None and max_tokens > limit:
        raise UsageError(
            f"{variant.name} was exported for texts of at most {limit} tokens, not {max_tokens}: name "
            "fewer, another variant, or export it again with --max-tokens"
        )


def _options_for(provider: str, options: Mapping[str, str | int] | None) -> dict[str, str]:
    """Provider options as ONNX Runtime takes them; UsageError where no provider is named that they are for."""
    if options and normalize_provider(provider) == "auto":
        raise UsageError(
            f"provider_options ({', '.join(options)}) need the provider that they are for: provider='cuda'"
        )
    return {name: str(value) for name, value in (options or {}).items()}
