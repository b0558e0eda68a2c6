"""From token ids to logits: a graph's inputs, long texts in chunks, and prefixes that several texts share.

A graph that keeps state (KV cache, recurrent states) reads a text in chunks, so that memory grows with the length of the
text and not with its square, and reads what texts have in common once:

    common tokens → chunks → state ─┬→ rest of text 1 → logits
                                    └→ rest of text 2 → logits

What all texts of a bundle begin with (an instruction's prompt) is read once per session: see `Reader`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.session import Session, State

# Tokens read at a time by a graph that keeps state; about what a core's cache holds of the widest activations.
CHUNK = 256
# A shorter common prefix is not worth a call of its own.
SHORTEST_PREFIX = 16

Ids = npt.NDArray[np.int64]


class Reader:
    """Reads texts on one session: the one way from ids to logits, for scoring and for measuring alike.

    prefix: ids int64 [prefix] that texts begin with; where the graph keeps state and the prefix is worth a call, it is read
    once, when the first such text comes, and every text that begins with it goes on from there. How a text is read depends
    on its own ids alone, so its logits are bit for bit the same whatever was read before or beside it. Thread-safe.
    """

    # The longest text that it can read, in tokens; None where the graph sets no limit.
    longest: int | None = None

    def __init__(self, session: Session, prefix: Ids | None = None):
        self.session = session
        useful = prefix is not None and session.has_state and len(prefix) >= SHORTEST_PREFIX
        self.prefix: Ids = prefix if prefix is not None and useful else np.zeros(0, np.int64)
        self._state: State | None = None
        self._lock = threading.Lock()

    def logits(self, ids: Ids, state: State | None = None) -> npt.NDArray[np.float32]:
        """Logits float32 [labels] of one text's ids int64 [sequence]; `state`: of the tokens before these."""
        if state is not None or not self.knows(ids):
            return logits_of(self.session, ids, state)
        return logits_of(self.session, ids[len(self.prefix) :], self._prefix_state())

    def knows(self, ids: Ids) -> bool:
        """Whether these ids [sequence] begin with the prefix and have tokens of their own behind it."""
        length = len(self.prefix)
        return 0 < length < len(ids) and np.array_equal(ids[:length], self.prefix)

    def _prefix_state(self) -> State | None:
        with self._lock:
            if self._state is None:
                self._state = state_after(self.session, self.prefix)
            return self._state


def feeds_for(inputs: Sequence[str], input_ids: Ids, attention_mask: Ids | None = None) -> dict[str, npt.NDArray[Any]]:
    """The graph's inputs from ids int64 [batch, sequence]; without a mask (right padding) every position is real."""
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    feeds: dict[str, npt.NDArray[Any]] = {"input_ids": input_ids}
    if "attention_mask" in inputs:
        feeds["attention_mask"] = mask
    if "lengths" in inputs:
        feeds["lengths"] = mask.sum(axis=1, dtype=np.int32)
    if "token_type_ids" in inputs:
        feeds["token_type_ids"] = np.zeros_like(input_ids)
    return feeds


def logits_of(session: Session, ids: Ids, state: State | None = None) -> npt.NDArray[np.float32]:
    """Logits float32 [labels] of one text's ids int64 [sequence], which follow the tokens that `state` holds."""
    *before, last = chunks(ids) if session.has_state else [ids]
    for part in before:
        state = session.advance(feeds_for(session.inputs, part[None, :]), state)
    row: npt.NDArray[np.float32] = session.run(feeds_for(session.inputs, last[None, :]), state)[0]
    return row


def state_after(session: Session, ids: Ids) -> State | None:
    """The state that a graph is in after these ids [sequence]; None after none."""
    state: State | None = None
    for part in chunks(ids) if len(ids) else []:
        state = session.advance(feeds_for(session.inputs, part[None, :]), state)
    return state


def chunks(ids: Ids) -> list[Ids]:
    """The ids in pieces of nearly the same length, none longer than CHUNK."""
    return np.array_split(ids, -(-len(ids) // CHUNK))


def common_prefix(sequences: Sequence[Ids]) -> int:
    """How many first tokens all sequences share, leaving each at least one of its own; 0 if that is not worth a call."""
    if len(sequences) < 2:
        return 0
    shortest = min(map(len, sequences))
    same = np.all(np.stack([ids[:shortest] for ids in sequences]) == sequences[0][:shortest], axis=0)
    length = min(int(np.argmin(same)) if not same.all() else shortest, shortest - 1)
    return length if length >= SHORTEST_PREFIX else 0
