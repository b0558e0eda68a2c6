"""ONNX Runtime sessions over verified bytes."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from samescore.runtime.bundle import ModelBytes
from samescore.runtime.cpu import u8s8_saturates
from samescore.runtime.errors import BundleError, ProviderError
from samescore.runtime.manifest import Target
from samescore.runtime.providers import EXECUTION_PROVIDERS, import_onnxruntime

FORGET_SECONDS = 0.02
# What a decoder keeps of the tokens before, float32 by input name: KV caches [batch, heads, tokens, head size],
# convolution states [batch, channels, kernel - 1], recurrent states [batch, heads, key size, value size].
State = Mapping[str, npt.NDArray[np.float32]]


class Session:
    """One graph on one provider. `run` may be called from several threads at once."""

    def __init__(self, model: ModelBytes, target: Target, *, intra_op_threads: int, low_memory: bool = False):
        ort = import_onnxruntime()
        options = _session_options(ort, target, intra_op_threads, low_memory)
        if target == "cpu" and b"MatMulIntegerToFloat" in model.graph and u8s8_saturates():
            # Weights become uint8, whose kernels are exact and slower. ONNX Runtime would do it with VNNI too, for nothing.
            options.add_session_config_entry("session.x64quantprecision", "1")
        # ONNX Runtime reads the external data from these very buffers, not from the paths, and keeps using them.
        self._buffers = model.data
        options.add_external_initializers_from_files_in_memory(
            list(model.data), list(model.data.values()), [len(buffer) for buffer in model.data.values()]
        )
        provider = EXECUTION_PROVIDERS[target]
        try:
            with _forgetting(() if low_memory else model.data.values()):
                self._session = ort.InferenceSession(
                    model.graph, options, providers=_provider_options(target), enable_fallback=0
                )
        except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
            raise BundleError(f"ONNX Runtime {ort.__version__} cannot load this graph on {target}: {error}") from error
        used = self._session.get_providers()[0]
        if used != provider:
            raise ProviderError(
                f"{provider} was asked for, but ONNX Runtime {ort.__version__} fell back to {used}: "
                f"a library that {target} needs could not be loaded. Start python with ORT's log on to see which"
            )
        self.inputs: tuple[str, ...] = tuple(value.name for value in self._session.get_inputs())
        self.outputs: tuple[str, ...] = tuple(value.name for value in self._session.get_outputs())
        self.target = target
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
        logits: npt.NDArray[np.float32] = self._session.run(["logits"], self._with_state(feeds, state))[0]
        return logits

    def advance(self, feeds: Mapping[str, npt.NDArray[Any]], state: State | None = None) -> State:
        """The state after these tokens."""
        names = [name.replace("past_", "present_", 1) for name in self._states]
        states = self._session.run(names, self._with_state(feeds, state))
        return dict(zip(self._states, states, strict=True))

    def _with_state(self, feeds: Mapping[str, npt.NDArray[Any]], state: State | None) -> dict[str, npt.NDArray[Any]]:
        if state is None:
            batch = len(next(iter(feeds.values())))
            state = {name: np.zeros((batch, *shape), np.float32) for name, shape in self._states.items()}
        return {**feeds, **state}

    def run_outputs(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        """Several named outputs (for graphs that expose more than `logits`), with no tokens before these."""
        return list(self._session.run(list(names), self._with_state(feeds, None)))


@contextmanager
def _forgetting(buffers: Iterable[Any]) -> Iterator[None]:
    """Let go of mapped pages while a session repacks the weights in them: they would count as memory a second time.

    They stay in the page cache, and those that are read again (embedding rows) come back from there.
    """
    mapped = [buffer for buffer in buffers if isinstance(buffer, mmap.mmap)]
    if not mapped:
        yield
        return
    done = threading.Event()

    def forget() -> None:
        for buffer in mapped:
            buffer.madvise(mmap.MADV_DONTNEED)

    def watch() -> None:
        while not done.wait(FORGET_SECONDS):
            forget()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        forget()


def _session_options(ort: Any, target: Target, intra_op_threads: int, low_memory: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    # Spinning pools of several sessions, or next to other work, slow each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Borrow the mapped weights instead of copying them (ONNX Runtime >= 1.31; older ones ignore the entry).
    options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
    if low_memory:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if target == "migraphx":
        # Folded constants would be inlined into the graph handed to MIGraphX, which caps it at 2 GiB.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _provider_options(target: Target) -> list[tuple[str, dict[str, str]]]:
    return [(EXECUTION_PROVIDERS[target], {})]
