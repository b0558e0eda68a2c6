"""What a decoder keeps of the tokens before, in buffers that the graph reads and writes in place.

KV caches [batch, kv heads, capacity, head size]: one buffer bound as both past and present; a step writes only its own
    tokens' columns, so nothing is copied. The capacity is fixed; a full buffer is replaced by one twice as large.
convolution and recurrent states [batch, …]: two buffers that take turns as past and present.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.providers import import_onnxruntime
from samescore.runtime.session import StateInput

# Capacities are multiples of this, so that a few more tokens need no new buffer.
CAPACITY_STEP = 256
CAPACITY_AXIS = 2

Array = npt.NDArray[Any]


@dataclass
class State:
    """The buffers of some rows, and how many tokens each row has seen. Made and changed by a `Layout` and an engine.

    tokens: each row's ids so far. logits: float32 [batch, vocabulary] behind them; None before the first token.
    """

    tokens: list[list[int]]
    capacity: int
    past: dict[str, Any]
    spare: dict[str, Any]
    logits: npt.NDArray[np.float32] | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return len(self.tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.tokens]


@dataclass(frozen=True)
class Snapshot:
    """One row's state at one place, kept for texts that begin with these tokens: caches cut to their length."""

    tokens: npt.NDArray[np.int64]
    arrays: Mapping[str, Array]
    logits: npt.NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        logits = 0 if self.logits is None else self.logits.nbytes
        return self.tokens.nbytes + logits + sum(array.nbytes for array in self.arrays.values())


class Layout:
    """Makes, grows, copies, joins and splits states of one graph. `growing`: names of caches with a capacity axis."""

    def __init__(self, inputs: Mapping[str, StateInput], target: str, context: int):
        self._inputs, self._context = inputs, context
        self._device = "cuda" if target == "cuda" else "cpu"
        self._ort = import_onnxruntime()
        self.growing = frozenset(name for name, kind in inputs.items() if None in kind.shape[1:])

    @property
    def exact(self) -> bool:
        """Whether a state belongs to one position only, because some of it (recurrent states) cannot be cut back."""
        return len(self.growing) < len(self._inputs)

    def empty(self, tokens: int) -> State:
        """One row before its first token, with room for `tokens`."""
        return self._filled({}, [[]], self._capacity(tokens))

    def reserve(self, state: State, tokens: int) -> None:
        """Make room for rows of that many tokens: at least twice the capacity when it has to change."""
        if tokens <= state.capacity:
            return
        grown = self._filled(self._arrays(state), state.tokens, self._capacity(max(tokens, 2 * state.capacity)))
        state.capacity, state.past, state.spare = grown.capacity, grown.past, grown.spare

    def snapshot(self, state: State) -> Snapshot:
        """A copy of a one-row state."""
        arrays = {name: np.array(array) for name, array in self._arrays(state).items()}
        logits = None if state.logits is None else state.logits[0].copy()
        return Snapshot(np.array(state.tokens[0], np.int64), arrays, logits)

    def restore(self, snapshot: Snapshot, length: int, tokens: int) -> State:
        """A state of the snapshot's first `length` tokens with room for `tokens`."""
        arrays = {
            name: array[:, :, :length] if name in self.growing else array for name, array in snapshot.arrays.items()
        }
        state = self._filled(arrays, [snapshot.tokens[:length].tolist()], self._capacity(tokens))
        if length == len(snapshot.tokens) and snapshot.logits is not None:
            state.logits = snapshot.logits[None].copy()
        return state

    def join(self, states: Sequence[State]) -> State:
        """One-row states as the rows of one; their own buffers are not needed any more."""
        longest = max(max(state.lengths) for state in states)
        arrays = {}
        for name in self._inputs:
            parts = [self._arrays_of(state, name) for state in states]
            if name in self.growing:
                width = [(0, 0)] * parts[0].ndim
                parts = [
                    np.pad(part, [*width[:2], (0, longest - part.shape[CAPACITY_AXIS]), *width[3:]]) for part in parts
                ]
            arrays[name] = np.concatenate(parts)
        capacity = max(state.capacity for state in states)
        return self._filled(arrays, [list(state.tokens[0]) for state in states], capacity)

    def select(self, state: State, rows: Sequence[int]) -> State:
        """Some of the rows, as a state of their own."""
        arrays = {name: array[list(rows)] for name, array in self._arrays(state).items()}
        return self._filled(arrays, [state.tokens[row] for row in rows], state.capacity)

    def _capacity(self, tokens: int) -> int:
        return min(-(-tokens // CAPACITY_STEP) * CAPACITY_STEP, max(self._context, tokens))

    def _arrays(self, state: State) -> dict[str, Array]:
        return {name: self._arrays_of(state, name) for name in state.past}

    def _arrays_of(self, state: State, name: str) -> Array:
        """A state's buffer (on the CPU the memory itself), caches cut to the tokens that they hold."""
        array = self._view(state.past[name])
        return array[:, :, : max(state.lengths)] if name in self.growing else array

    def _filled(self, arrays: Mapping[str, Array], tokens: list[list[int]], capacity: int) -> State:
        """New buffers, zero but for `arrays` at their beginning."""
        past, spare = {}, {}
        for name, kind in self._inputs.items():
            shape = (len(tokens), *(capacity if size is None else size for size in kind.shape[1:]))
            buffer = np.zeros(shape, kind.dtype)
            if name in arrays:
                buffer[:, :, : arrays[name].shape[CAPACITY_AXIS]] = arrays[name]
            past[name] = self._value(buffer)
            if name not in self.growing:
                spare[name] = self._value(np.zeros_like(buffer))
        return State(tokens, capacity, past, spare)

    def _value(self, array: Array) -> Any:
        # On the CPU the OrtValue is this very memory; on a device it is a copy.
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)

    @staticmethod
    def _view(value: Any) -> Array:
        array: Array = value.numpy()
        return array
