"""Texts read in padded batches: the way of GPUs. On CPUs one text runs per call, without padding; see `prefill.py`.

    texts → batches.py: which texts in which shape → ids and mask, padded on the right → session(s) → rows in input order

A row's logits depend on the other rows only as far as a kernel's order of sums depends on the shape of the call.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from samescore.runtime.batches import BATCH_TOKENS, Batch, Bucket, bucket_batches, budget_batches, in_order
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.cache import alone_in, program_folder
from samescore.runtime.errors import BundleError, InputError, UsageError
from samescore.runtime.prefill import Ids, Reader, feeds_for
from samescore.runtime.session import Session, State

log = logging.getLogger(__name__)

Planner = Callable[[Sequence[int]], list[Batch]]
CACHE_OPTION = "migraphx_model_cache_dir"


class PaddedReader(Reader):
    """Reads texts in padded batches. Thread-safe.

    sessions: one per bucket, of that very shape; or a single one under None, which takes any shape, with `batch_tokens` padded
    tokens to a call and texts of at most `longest` tokens in the usual case. UsageError for a graph that cannot pad.
    """

    def __init__(
        self,
        sessions: Mapping[Bucket, Session] | Session,
        *,
        batch_tokens: int = BATCH_TOKENS,
        longest: int = 1,
    ):
        if isinstance(sessions, Session):
            super().__init__(sessions)
            self.buckets: tuple[Bucket, ...] = ()
            self._plan: Planner = lambda lengths: budget_batches(lengths, longest=longest, batch_tokens=batch_tokens)
            self._sessions: Mapping[Bucket, Session] = {}
        else:
            self.buckets = in_order(sessions)
            super().__init__(sessions[self.buckets[-1]])
            self.longest = self.buckets[-1].sequence
            self._plan = lambda lengths: bucket_batches(lengths, self.buckets)
            self._sessions = sessions
        require_padding(self.session.inputs)

    def logits(self, ids: Ids, state: State | None = None) -> npt.NDArray[np.float32]:
        """Logits float32 [labels] of one text's ids int64 [sequence]; UsageError with a state, which no batch takes."""
        if state is not None:
            raise UsageError("padded batches go on from no state")
        row: npt.NDArray[np.float32] = self.read([ids])[0]
        return row

    def check_length(self, tokens: int) -> None:
        """InputError when no bucket holds so many tokens.

        A bucket for it is not compiled on the way: that takes minutes in the middle of a request, and memory for another copy of
        the weights.
        """
        if self.longest is not None and tokens > self.longest:
            raise InputError(
                f"{tokens} tokens are more than the longest bucket, {self.buckets[-1]}, holds. Warm up with a longer one "
                f"(samescore warmup BUNDLE --buckets …,1x{tokens}, or buckets= where they were named so), or cut texts with "
                f"max_tokens={self.longest}"
            )

    def read(
        self, sequences: Sequence[Ids], progress: Callable[[], None] | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Logits float32 [labels] of each text's ids int64 [sequence], in the order of the texts."""
        lengths = [len(ids) for ids in sequences]
        self.check_length(max(lengths, default=0))
        rows: dict[int, npt.NDArray[np.float32]] = {}
        for batch in self._plan(lengths):
            ids, mask = padded([sequences[index] for index in batch.rows], batch.shape)
            session = self._sessions.get(batch.shape, self.session)
            logits = session.run(feeds_for(session.inputs, ids, mask))
            for index, row in zip(batch.rows, logits, strict=False):  # rows behind the texts are padding
                rows[index] = row
                if progress is not None:
                    progress()
        return [rows[index] for index in range(len(sequences))]


def can_pad(inputs: Sequence[str]) -> bool:
    """Whether a graph with these inputs can tell padding from text."""
    return "attention_mask" in inputs or "lengths" in inputs


def require_padding(inputs: Sequence[str]) -> None:
    """UsageError unless the graph can pad."""
    if not can_pad(inputs):
        raise UsageError(
            f"this graph reads {', '.join(inputs)}: neither attention_mask nor lengths, so its texts cannot be padded"
        )


def padded(sequences: Sequence[Ids], shape: Bucket) -> tuple[Ids, Ids]:
    """Ids and mask, both int64 [batch, sequence], padded on the right with id 0.

    Rows behind the texts repeat the first one: a row of nothing but padding would be a softmax over nothing.
    """
    ids, mask = np.zeros((2, shape.batch, shape.sequence), np.int64)
    for row in range(shape.batch):
        text = sequences[row if row < len(sequences) else 0]
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    return ids, mask


def open_buckets(
    model: ModelBytes,
    target: str,
    buckets: Sequence[Bucket],
    files: Mapping[str, str],
    *,
    threads: int,
    low_memory: bool = False,
    options: Mapping[str, str] | None = None,
    opened: Callable[[Bucket, float], None] | None = None,
) -> PaddedReader:
    """A session for each bucket, compiled (or taken from the cache) and run once, the longest first.

    files: SHA-256 of the variant's files, see `cache.file_digests`. options: of the provider. opened: told each bucket and the
    seconds it took. Raises BundleError, ProviderError or UsageError.
    """
    sessions = {}
    for bucket in reversed(in_order(buckets)):
        started = time.monotonic()
        kept, waiting = dict(options or {}), contextlib.ExitStack()
        if CACHE_OPTION in kept:
            raise UsageError(f"{CACHE_OPTION} is samescore's to choose: set SAMESCORE_CACHE for another folder")
        if target == "migraphx":
            folder = program_folder(files, bucket, kept)
            kept[CACHE_OPTION] = str(folder)
            waiting.enter_context(alone_in(folder))
        with waiting:
            session = Session(
                model,
                target,
                intra_op_threads=threads,
                low_memory=low_memory,
                dimensions={"batch": bucket.batch, "sequence": bucket.sequence},
                options=kept,
            )
            if session.shapes["input_ids"] != (bucket.batch, bucket.sequence):
                raise BundleError(
                    f"this graph's axes are not named batch and sequence (input_ids is {session.shapes['input_ids']}), so it "
                    "cannot be compiled for a bucket: export the bundle again"
                )
            run_once(session, bucket)
        sessions[bucket] = session
        seconds = time.monotonic() - started
        log.info("bucket %s ready after %.1f s", bucket, seconds)
        if opened is not None:
            opened(bucket, seconds)
    return PaddedReader(sessions)


def run_once(session: Session, bucket: Bucket) -> None:
    """One call of that shape, for what a provider does at the first."""
    ids, mask = padded([np.zeros(bucket.sequence, np.int64)], bucket)
    session.run(feeds_for(session.inputs, ids, mask))
