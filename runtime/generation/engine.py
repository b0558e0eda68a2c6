"""The engine below generation: token ids in, the next token's logits out, with states that are kept and reused.

start(ids):  nearest snapshot ─► rest of the prompt in chunks ─► State with logits
step(state, ids):  one token (or some) more ─► logits
join / select:  one-row states as a batch, and back
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from samescore.runtime.errors import InputError
from samescore.runtime.generation.cache import SnapshotCache
from samescore.runtime.generation.states import Layout, State
from samescore.runtime.prefill import SHORTEST_PREFIX, chunks
from samescore.runtime.session import Session

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

CACHE_BYTES = 256 * 1024 * 1024
# Tokens after which pages of the embedding are let go.
FORGET_TOKENS = 128


class Cancelled(Exception):
    """The caller's event was set while a prompt was read."""


class Engine:
    """Runs one graph. Thread-safe: calls take turns, a State belongs to one thread.

    context: the most tokens that a row may hold. vocabulary: ids are below it. cache_bytes: memory for snapshots of states;
    0 keeps none. A state that was reused holds the same numbers but for rounding, because chunks begin elsewhere.
    """

    def __init__(self, session: Session, *, context: int, vocabulary: int, cache_bytes: int = CACHE_BYTES):
        self.session, self.context, self.vocabulary = session, context, vocabulary
        self._layout = Layout(session.state_inputs, session.target, context)
        self.cache = SnapshotCache(cache_bytes, exact=self._layout.exact)
        self._lock = threading.Lock()
        self._unforgotten = 0

    def start(self, ids: Sequence[int] | Ids, *, keep: int = 0, cancel: threading.Event | None = None) -> State:
        """A state behind the ids [sequence] of a prompt, its `logits` [1, vocabulary] those of the next token.

        keep: a place in the prompt that later prompts will share (a snapshot is made there). cancel: set it to stop between
        two chunks; Cancelled is raised then. InputError when the prompt is empty, longer than the context or no ids.
        """
        prompt = self._checked(ids)
        if not len(prompt):
            raise InputError("the prompt is empty: it holds no token")
        if len(prompt) > self.context:
            raise InputError(f"the prompt is {len(prompt)} tokens long; the model's context is {self.context}")
        with self._lock:
            state, stops = self._resume(prompt, keep)
        for stop in stops:
            for part in chunks(prompt[state.lengths[0] : stop]) if state.lengths[0] < stop else []:
                if cancel is not None and cancel.is_set():
                    raise Cancelled
                self._run(state, part[None, :])
            self.remember(state)
        return state

    def step(self, state: State, ids: Sequence[int] | Ids) -> Logits:
        """Logits float32 [vocabulary] behind more ids [tokens] of a one-row state, which moves on.

        InputError when the context is full.
        """
        if state.batch != 1:
            raise ValueError(f"step takes a state of one row, not of {state.batch}: step_rows takes a batch")
        more = self._checked(ids)
        if not len(more):
            raise ValueError("step takes at least one token")
        self._make_room(state, len(more))
        for part in chunks(more):
            self._run(state, part[None, :])
        assert state.logits is not None
        row: Logits = state.logits[0]
        return row

    def step_rows(self, state: State, ids: Sequence[int] | Ids) -> Logits:
        """Logits float32 [batch, vocabulary] behind one more token of each row: ids [batch]. InputError as `step`."""
        more = self._checked(ids)
        if len(more) != state.batch:
            raise ValueError(f"step_rows takes one token for each of {state.batch} rows, not {len(more)}")
        self._make_room(state, 1)
        return self._run(state, more[:, None])

    def join(self, states: Sequence[State]) -> State:
        """One-row states as one batch for `step_rows`."""
        return states[0] if len(states) == 1 else self._layout.join(states)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """The state of some rows of a batch."""
        return self._layout.select(state, rows)

    def remember(self, state: State) -> None:
        """Keep a snapshot of a one-row state for later prompts, unless its logits are no numbers."""
        sound = state.logits is not None and bool(np.isfinite(state.logits).all())
        if self.cache.enabled and state.batch == 1 and sound:
            with self._lock:
                self.cache.put(self._layout.snapshot(state))

    def _resume(self, prompt: Ids, keep: int) -> tuple[State, list[int]]:
        """The best state to go on from, and the places to read to, the end last; a snapshot belongs at each."""
        found = self.cache.best(prompt)
        state = self._layout.restore(*found, len(prompt) + 1) if found else self._layout.empty(len(prompt) + 1)
        at = state.lengths[0]
        # Others began like this and parted here; the next one may do the same. Caches alone can be cut back to any place.
        places = {keep, self.cache.shared(prompt)} if self._layout.exact else set()
        stops = sorted(p for p in places if max(at, SHORTEST_PREFIX - 1) < p < len(prompt))
        return state, stops if at == len(prompt) else [*stops, len(prompt)]

    def _make_room(self, state: State, tokens: int) -> None:
        needed = max(state.lengths) + tokens
        if needed > self.context:
            raise InputError(f"{needed} tokens do not fit: the model's context is {self.context}")

    def _checked(self, ids: Sequence[int] | Ids) -> Ids:
        array = np.asarray(ids, np.int64).reshape(-1)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocabulary:
            raise InputError(
                f"token ids are from 0 to {self.vocabulary - 1}; these reach from {array.min()} to {array.max()}"
            )
        return array

    def _run(self, state: State, ids: Ids) -> Logits:
        """One call of the graph on ids [batch, tokens]; the state moves on only when it succeeds."""
        with self._lock:
            lengths = np.array(state.lengths, np.int32) + np.int32(ids.shape[1])
            self._layout.reserve(state, int(lengths.max()))
            binding = self.session.binding()
            binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
            binding.bind_cpu_input("total_lengths", lengths)
            binding.bind_output("logits")
            for name, value in state.past.items():
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(name.replace("past_", "present_", 1), state.spare.get(name, value))
            self.session.run_bound(binding)
            logits: Logits = np.array(binding.get_outputs()[0].numpy(), np.float32)
            self._forget(ids.size)
        for name in state.spare:
            state.past[name], state.spare[name] = state.spare[name], state.past[name]
        for row, more in zip(state.tokens, ids.tolist(), strict=True):
            row.extend(more)
        state.logits = logits
        return logits

    def _forget(self, tokens: int) -> None:
        """Keep memory flat: rows of the embedding that are read map pages of its file, in the end all of them."""
        self._unforgotten += tokens
        if self._unforgotten >= FORGET_TOKENS:
            self.session.forget()
            self._unforgotten = 0
