"""Which kind of fault makes a variant fail: asked of its logits, of probes of the graph, then of its layers.

    logits ──→ labels in another order, softmax or sigmoid twice ──┐
    probes ──→ pooled position ────────────────────────────────────┼→ one sentence
    layers (with the checkpoint) ──→ the first that stands out ────┘

A diagnosis explains a verdict and never changes it. Where nothing is recognised it says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.certify import Certified, SessionMaker
from samescore.calibrate.golden import GoldenSet
from samescore.calibrate.head_faults import constant_fault, output_fault, output_note, pooled_position, position_fault
from samescore.calibrate.localize import localize
from samescore.calibrate.reference import position_logits
from samescore.export.build import architecture_of
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import MissingDependencyError
from samescore.runtime.manifest import Activation, Precision
from samescore.runtime.prefill import Ids
from samescore.runtime.threads import available_threads

# Golden texts that probes run, those on which layers are compared, and the tokens that such a text has at most.
PROBED, LAYER_TEXTS, LAYER_TOKENS = 16, 4, 512


@dataclass(frozen=True)
class Diagnosis:
    """What a failing variant is diagnosed with.

    checkpoint: with it layers are compared too. workspace: where graphs are built for that (default: the system's place).
    """

    golden: GoldenSet
    labels: Sequence[str]
    activation: Activation
    checkpoint: Checkpoint | None = None
    workspace: Path | None = None

    def told(self, certified: Certified, open_session: SessionMaker, precision: Precision) -> Certified:
        """What `certify` has found, with a diagnosis if the variant failed. open_session: what it was found with."""
        if certified.parity.verdict.passed:
            return certified
        try:
            # Faults are the same on every provider, and probing new lengths is cheap on the CPU alone.
            said = self.of(certified.logits, replace(open_session, target="cpu"), precision)
        except Exception as error:  # a probe must not hide the numbers that failed
            said = f"could not be found: {type(error).__name__}: {error}"
        return certified._replace(parity=replace(certified.parity, diagnosis=said))

    def of(self, logits: npt.NDArray[np.float32], open_session: SessionMaker, precision: Precision) -> str:
        """What is wrong with one variant, whose logits float32 [texts, labels] these are."""
        sequences, reference = self.golden.input_ids(), self.golden.logits()
        few = _shortest(sequences, PROBED)
        short = [sequences[i] for i in few]
        said = [
            output_fault(reference, logits, self.labels, self.activation)
            or position_fault(
                open_session(available_threads()),
                short,
                reference[few],
                logits[few],
                longest=max(map(len, sequences)),
            )
            or self._pooled(short, reference[few], logits[few])
        ]
        if said == [None]:
            worst = _worst(sequences, reference, logits)
            layers = self._layers(open_session, [sequences[i] for i in worst], precision)
            said = [constant_fault(reference, logits), layers or self._unknown()]
        named = "; ".join(filter(None, said))
        note = output_note(reference, logits)
        return f"{named}; {note}" if note else named

    def _pooled(
        self, sequences: Sequence[Ids], reference: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]
    ) -> str | None:
        """Needs PyTorch; without it nothing is said."""
        if self.checkpoint is None or self.checkpoint.model_type != "bert":
            return None
        try:
            by_position = position_logits(self.checkpoint, sequences)
        except MissingDependencyError:
            return None
        return pooled_position(by_position, reference, logits, self.labels) if by_position else None

    def _layers(self, open_session: SessionMaker, sequences: Sequence[Ids], precision: Precision) -> str | None:
        if self.checkpoint is None or architecture_of(self.checkpoint) is None:
            return None
        found = localize(
            open_session.model,
            open_session.target,
            self.checkpoint,
            sequences,
            precision=precision,
            workspace=self.workspace,
        )
        return None if found is None else str(found)

    def _unknown(self) -> str:
        if self.checkpoint is None:
            return "no known fault of the head; samescore verify BUNDLE --reference CKPT looks for the layer"
        return "no known fault of the head; its graph does not name its layers, so where the drift enters is not known"


def _shortest(sequences: Sequence[Ids], count: int) -> list[int]:
    """Indices of texts to run again: short ones, for diagnosing must not take long."""
    return sorted(sorted(range(len(sequences)), key=lambda i: len(sequences[i]))[:count])


def _worst(sequences: Sequence[Ids], reference: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> list[int]:
    """Indices of the texts whose logits are furthest off, long ones left out where there are others."""
    short = [i for i, ids in enumerate(sequences) if len(ids) <= LAYER_TOKENS] or _shortest(sequences, 1)
    off = np.nan_to_num(np.abs(logits - reference).max(axis=1), nan=np.inf)
    return sorted(short, key=lambda i: -off[i])[:LAYER_TEXTS]
