"""ONNX Runtime sessions over verified bytes."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import ModelBytes
from samescore.runtime.cpu import u8s8_saturates
from samescore.runtime.errors import ProviderError
from samescore.runtime.opening import checked_placement, hand_over_weights, open_session, options_for
from samescore.runtime.placement import Placement
from samescore.runtime.providers import import_onnxruntime, provider_name

FORGET_SECONDS = 0.02
# What a decoder keeps of the tokens before, float32 by input name: KV caches [batch, heads, tokens, head size],
# convolution states [batch, channels, kernel - 1], recurrent states [batch, heads, key size, value size].
State = Mapping[str, npt.NDArray[np.float32]]


class StateInput(NamedTuple):
    """A state input: its shape, None for axes that a caller chooses, and its element type."""

    shape: tuple[int | None, ...]
    dtype: type[np.floating[Any]]


_ELEMENT_TYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Session:
    """One graph on one provider. `run` may be called from several threads at once.

    target: `cpu`, `cuda`, `migraphx`, or another provider by ONNX Runtime's name. dimensions: sizes of the graph's free
    dimensions by name (`batch`, `sequence`), which makes it static. options: the provider's own options, by ONNX Runtime's
    names; they go over `DEFAULT_OPTIONS`. `placement` says where the nodes lie, None on `cpu` and where ONNX Runtime does
    not tell.

    Raises ProviderError where the provider cannot be had, knows an option not, or leaves operators that compute to the CPU;
    BundleError where the graph cannot be read.
    """

    def __init__(
        self,
        model: ModelBytes,
        target: str,
        *,
        intra_op_threads: int,
        low_memory: bool = False,
        dimensions: Mapping[str, int] | None = None,
        options: Mapping[str, str] | None = None,
    ):
        ort = import_onnxruntime()
        # One token at a time is hundreds of operators that are shorter than waking a thread takes.
        decodes = b"total_lengths" in model.graph and intra_op_threads > 1
        session_options = options_for(ort, target, intra_op_threads, low_memory, spinning=decodes)
        for name, size in (dimensions or {}).items():
            session_options.add_free_dimension_override_by_name(name, size)
        if target == "cpu" and b"MatMulIntegerToFloat" in model.graph and u8s8_saturates():
            # Weights become uint8, whose kernels are exact and slower. ONNX Runtime would do it with VNNI too, for nothing.
            session_options.add_session_config_entry("session.x64quantprecision", "1")
        in_memory = hand_over_weights(session_options, model, target)
        # ONNX Runtime keeps using these buffers, or the copy that lives as long as the model's bytes.
        self._model = model
        repacked = in_memory and not low_memory
        self._mapped = [buffer for buffer in model.data.values() if isinstance(buffer, mmap.mmap)] if repacked else []
        with self._forgetting():
            self._session = open_session(ort, model.graph, session_options, target, options or {})
        self.target = target
        self.placement: Placement | None = checked_placement(ort, self._session, target)
        self.inputs: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self.outputs: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())
        # Axes that a caller chooses (batch, cache capacity) are None.
        self.state_inputs = {
            v.name: StateInput(
                tuple(size if isinstance(size, int) else None for size in v.shape),
                _ELEMENT_TYPES.get(v.type, np.float32),
            )
            for v in self._session.get_inputs()
            if v.name.startswith("past_")
        }
        # Before the first token the axes that grow with the text are empty, and the others hold zeros.
        self._states = {
            v.name: tuple(size if isinstance(size, int) else 0 for size in v.shape[1:])
            for v in self._session.get_inputs()
            if v.name.startswith("past_")
        }

    @property
    def has_state(self) -> bool:
        """Whether the graph takes and returns a state."""
        return bool(self._states)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], state: State | None = None) -> npt.NDArray[np.float32]:
        """The `logits` output, float32 [batch, labels]; `state`: of the tokens before these."""
        logits: npt.NDArray[np.float32] = self._run(["logits"], self._with_state(feeds, state))[0]
        return logits

    def advance(self, feeds: Mapping[str, npt.NDArray[Any]], state: State | None = None) -> State:
        """The state after these tokens."""
        names = [name.replace("past_", "present_", 1) for name in self._states]
        states = self._run(names, self._with_state(feeds, state))
        return dict(zip(self._states, states, strict=True))

    def forget(self) -> None:
        """Let go of mapped pages of weights that are repacked: they count as memory a second time.

        They stay in the page cache, and those that are read again (embedding rows) come back from there. A kernel that maps
        large folios may map a megabyte for a row of an embedding.
        """
        for buffer in self._mapped:
            buffer.madvise(mmap.MADV_DONTNEED)

    def binding(self) -> Any:
        """A fresh binding (onnxruntime.IOBinding) of inputs and outputs to buffers, for `run_bound`."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run once; outputs are where the binding says."""
        with self._telling():
            self._session.run_with_iobinding(binding)

    def _with_state(self, feeds: Mapping[str, npt.NDArray[Any]], state: State | None) -> dict[str, npt.NDArray[Any]]:
        if state is None:
            batch = len(next(iter(feeds.values())))
            state = {name: np.zeros((batch, *shape), np.float32) for name, shape in self._states.items()}
        return {**feeds, **state}

    def run_outputs(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """Several named outputs (for graphs that expose more than `logits`), with no tokens before these."""
        return self._run(list(names), self._with_state(feeds, None))

    def _run(self, names: list[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        with self._telling():
            return list(self._session.run(names, feeds))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """A GPU's failure, which may be of many types without a common base, as ProviderError."""
        try:
            yield
        except Exception as error:
            if self.target == "cpu":
                raise
            raise ProviderError(f"{provider_name(self.target)} failed while it ran this graph: {error}") from error

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Forget again and again while weights are repacked."""
        if not self._mapped:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(FORGET_SECONDS):
                self.forget()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.forget()
