"""States that are kept for the next prompt: the turns of a chat, a system prompt that many share."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from samescore.runtime.generation.states import Snapshot
from samescore.runtime.prefill import SHORTEST_PREFIX

Ids = npt.NDArray[np.int64]


class SnapshotCache:
    """Snapshots by their tokens, the least recently used thrown away beyond `limit` bytes. Not thread-safe by itself.

    exact: a snapshot serves only texts that begin with all of its tokens (recurrent states cannot be cut back); else any
    part that a text shares with it.
    """

    def __init__(self, limit: int, *, exact: bool):
        self._limit, self._exact = limit, exact
        self._kept: OrderedDict[bytes, Snapshot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of all snapshots, in bytes."""
        return sum(snapshot.nbytes for snapshot in self._kept.values())

    @property
    def enabled(self) -> bool:
        """Whether anything is kept at all."""
        return self._limit > 0

    def put(self, snapshot: Snapshot) -> None:
        """Keep a snapshot; one that is larger than the limit is not kept."""
        if snapshot.nbytes > self._limit or len(snapshot.tokens) < SHORTEST_PREFIX:
            return
        key = snapshot.tokens.tobytes()
        if snapshot.logits is not None or key not in self._kept:
            self._kept[key] = snapshot
        self._kept.move_to_end(key)
        while self.nbytes > self._limit:
            self._kept.popitem(last=False)

    def best(self, ids: Ids) -> tuple[Snapshot, int] | None:
        """The snapshot that holds most of the first tokens of ids [sequence], and how many of them to take from it."""
        found: tuple[bytes, int] | None = None
        for key, snapshot in self._kept.items():
            length = self._usable(snapshot, ids)
            if length >= SHORTEST_PREFIX and (found is None or length > found[1]):
                found = key, length
        if found is None:
            return None
        self._kept.move_to_end(found[0])
        return self._kept[found[0]], found[1]

    def shared(self, ids: Ids) -> int:
        """The most first tokens that ids [sequence] share with any snapshot, whether its state stands there or not."""
        return max((common_length(snapshot.tokens, ids) for snapshot in self._kept.values()), default=0)

    def _usable(self, snapshot: Snapshot, ids: Ids) -> int:
        """Tokens of the snapshot to take; the last token of ids has to be read again unless its logits are known."""
        same, size = common_length(snapshot.tokens, ids), len(snapshot.tokens)
        if same == size and (size < len(ids) or snapshot.logits is not None):
            return size
        return 0 if self._exact else min(same, len(ids) - 1)


def common_length(one: Ids, other: Ids) -> int:
    """How many first tokens two texts share."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
