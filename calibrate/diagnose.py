"""Which kind of fault makes a variant fail: asked of its logits, of probes of the graph, then of its layers.

    logits ──→ labels in another order, softmax or sigmoid twice ──┐
    probes ──→ pooled position ────────────────────────────────────┼→ one sentence
    layers (with the checkpoint) ──→ the first that stands out ────┘

A diagnosis explains a verdict and never changes it. Where nothing is recognised it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from samescore.calibrate.certificate import Certificate, VariantParity
from samescore.calibrate.certify import SessionMaker, score_all
from samescore.calibrate.golden import GoldenSet
from samescore.calibrate.head_faults import constant_fault, output_fault, output_note, pooled_position, position_fault
from samescore.calibrate.localize import localize
from samescore.calibrate.reference import position_logits
from samescore.export.build import architecture_of
from samescore.export.checkpoint import Checkpoint
from samescore.runtime.errors import MissingDependencyError
from samescore.runtime.manifest import Activation, Precision
from samescore.runtime.prefill import Ids, Reader
from samescore.runtime.threads import available_threads

# Golden texts that are scored again, and those on which layers are compared.
TEXTS, LAYER_TEXTS = 32, 4


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

    def of_all(self, certificate: Certificate, variant: Callable[[str], tuple[SessionMaker, Precision]]) -> Certificate:
        """The certificate with a diagnosis under each variant that failed. variant: by its name."""
        told: dict[str, VariantParity] = {}
        for name, parity in certificate.variants.items():
            told[name] = parity if parity.verdict.passed else replace(parity, diagnosis=self.of(*variant(name)))
        return replace(certificate, variants=told)

    def of(self, open_session: SessionMaker, precision: Precision) -> str:
        """What is wrong with one variant."""
        chosen = _spread(self.golden.input_ids(), TEXTS)
        sequences = [self.golden.input_ids()[i] for i in chosen]
        reference = self.golden.logits()[chosen]
        session = open_session(1)
        logits = score_all(Reader(session), sequences, workers=available_threads())
        said = [
            output_fault(reference, logits, self.labels, self.activation)
            or position_fault(session, sequences, reference, logits)
            or self._pooled(sequences, reference, logits)
        ]
        if said == [None]:
            layers = self._layers(open_session, sequences, precision)
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
        few = [sequences[i] for i in _spread(sequences, LAYER_TEXTS)]
        found = localize(
            open_session.model,
            open_session.target,
            self.checkpoint,
            few,
            precision=precision,
            workspace=self.workspace,
        )
        return None if found is None else str(found)

    def _unknown(self) -> str:
        if self.checkpoint is None:
            return "no known fault of the head; samescore verify BUNDLE --reference CKPT looks for the layer"
        return "no known fault of the head; its graph does not name its layers, so where the drift enters is not known"


def _spread(sequences: Sequence[Ids], count: int) -> list[int]:
    """Evenly spread indices, those of the shorter texts where there are many: diagnosing must not take long."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    return sorted(order[:: max(1, len(order) // count)][:count])
