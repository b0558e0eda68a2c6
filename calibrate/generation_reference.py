"""The reference of a generator: transformers' own language model, greedy answers and the logits that decided them.

One sequence at a time, so that no more than its logits [positions, vocabulary] are ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from samescore.calibrate.generation_metrics import Ids, Logits
from samescore.calibrate.reference import DType, import_torch, load_reference, quiet
from samescore.export.generator import Generator


class GreedyReference:
    """A checkpoint in PyTorch. eos: the tokens that end an answer."""

    def __init__(self, checkpoint: Generator, eos: Sequence[int], *, dtype: DType = "float32"):
        self.eos = frozenset(eos)
        self._torch = import_torch()
        self._model: Any = load_reference(checkpoint, dtype=dtype)

    def answer(self, prompt: Ids, tokens: int) -> tuple[Ids, Logits]:
        """At most `tokens` greedy tokens int64 [n] behind a prompt's ids, with each one's logits float32 [n, vocabulary].

        An answer's last token is the end token, where the model gives one.
        """
        found: list[int] = []
        logits: list[Logits] = []
        with self._torch.inference_mode(), quiet():
            step = self._model(input_ids=self._tensor(prompt), use_cache=True, logits_to_keep=1)
            while True:
                row: Logits = step.logits[0, -1].float().numpy()
                logits.append(row)
                found.append(int(row.argmax()))
                if len(found) == tokens or found[-1] in self.eos:
                    return np.array(found, np.int64), np.stack(logits)
                last = self._tensor(np.array(found[-1:], np.int64))
                step = self._model(input_ids=last, past_key_values=step.past_key_values, use_cache=True)

    def along(self, prompt: Ids, following: Ids) -> Logits:
        """Logits float32 [positions, vocabulary] of each of the tokens that follow the prompt, all read at once."""
        ids = np.concatenate([prompt, following[:-1]])
        with self._torch.inference_mode(), quiet():
            rows = self._model(input_ids=self._tensor(ids), use_cache=False, logits_to_keep=len(following)).logits[0]
        result: Logits = rows.float().numpy()
        return result

    def _tensor(self, ids: Ids) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(ids)[None, :])
