"""Run a variant over a golden set and hold it against its tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from samescore.calibrate.certificate import Invariance, VariantParity
from samescore.calibrate.gate import TOLERANCES, Tolerance, judge
from samescore.calibrate.golden import GoldenSet
from samescore.calibrate.metrics import Drift, measure
from samescore.calibrate.progress import Tick
from samescore.calibrate.recalibrate import judged_pair
from samescore.calibrate.resume import Row, Rows
from samescore.calibrate.shipped import ShippedSet
from samescore.runtime.bundle import ModelBytes
from samescore.runtime.manifest import Activation, Precision
from samescore.runtime.prefill import Ids, Reader, feeds_for, logits_of, state_after
from samescore.runtime.recalibration import Recalibration
from samescore.runtime.scheduler import run_longest_first
from samescore.runtime.session import Session

# What the invariance checks score again, at most.
INVARIANCE_TEXTS, INVARIANCE_TOKENS = 32, 2048


@dataclass(frozen=True)
class SessionMaker:
    """Makes sessions of one graph on one target, with a given number of threads per call."""

    model: ModelBytes
    target: str

    def __call__(self, intra_op_threads: int) -> Session:
        """A new session."""
        return Session(self.model, self.target, intra_op_threads=intra_op_threads)


class Certified(NamedTuple):
    """A variant's certificate, and the logits float32 [texts, labels] that it was made from."""

    parity: VariantParity
    logits: npt.NDArray[np.float32]


def certify(
    open_session: SessionMaker,
    golden: GoldenSet,
    *,
    labels: Sequence[str],
    activation: Activation,
    precision: Precision,
    threads: int,
    prefix: Ids | None = None,
    recalibration: Recalibration | None = None,
    rows: Rows | None = None,
    progress: Tick | None = None,
) -> Certified:
    """Measure one variant against the golden set's reference logits, and judge it.

    open_session: makes a session with that many threads per call. threads: CPU threads to use in all. prefix: the ids that
    the bundle's texts begin with (`TextEncoder.prefix_ids`): texts are read exactly as the runtime reads them.
    recalibration: the variant's; what is judged are the probabilities after it. rows: as in `score_all`.
    """
    sequences = golden.input_ids()
    rows = Rows() if rows is None else rows
    if any(rows.get(ids) is None for ids in sequences):
        score_all(Reader(open_session(1), prefix), sequences, workers=threads, rows=rows, progress=progress)
    logits = np.stack([row.logits for ids in sequences if (row := rows.get(ids)) is not None])
    invariance = check_invariance(Reader(open_session(threads), prefix), sequences, logits)
    parity = parity_of(
        logits,
        golden,
        labels=labels,
        activation=activation,
        tolerance=TOLERANCES[precision],
        invariance=invariance,
        recalibration=recalibration,
    )
    return Certified(parity, logits)


def parity_of(
    logits: npt.NDArray[np.float32],
    golden: GoldenSet | ShippedSet,
    *,
    labels: Sequence[str],
    activation: Activation,
    tolerance: Tolerance,
    invariance: Invariance,
    recalibration: Recalibration | None,
) -> VariantParity:
    """What a variant's raw logits [texts, labels] say: the drift of what its user gets, the verdict, the drift before."""
    reference = golden.reference

    def to_labels(correction: Recalibration | None) -> bool:
        """Then the yardstick, measured without the correction, is none."""
        return correction is not None and correction.fitted_to == "labels"

    def drift_with(correction: Recalibration | None) -> Drift:
        return measure(
            *judged_pair(golden.logits(), logits, correction),
            labels,
            activation,
            truth=golden.labels(),
            bf16_mean_abs_dp=reference.bf16_mean_abs_dp if reference and not to_labels(correction) else None,
        )

    drift = drift_with(recalibration)
    before = None if recalibration is None else drift_with(None)
    verdict = judge(drift, tolerance)
    if before is not None and to_labels(recalibration):
        # It changes the reference too, so that a flatter curve would hide what quantization does.
        verdict = max(verdict, judge(before, tolerance), key=lambda entry: len(entry.failures))
    return VariantParity(drift, invariance, tolerance, verdict, before)


def score_all(
    reader: Reader,
    sequences: Sequence[npt.NDArray[np.int64]],
    *,
    workers: int,
    rows: Rows | None = None,
    progress: Tick | None = None,
) -> npt.NDArray[np.float32]:
    """Logits [texts, labels], each text alone.

    rows: what is known already and need not be computed; gets what is computed. progress: called with the tokens of each
    computed text, from worker threads.
    """
    known = Rows() if rows is None else rows

    def run(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if (row := known.get(ids)) is not None:
            return row.logits
        logits = reader.logits(ids)
        known.keep(ids, Row(logits))
        if progress is not None:
            progress(len(ids))
        return logits

    return np.stack(run_longest_first(sequences, len, run, workers=workers))


def check_invariance(
    reader: Reader, sequences: Sequence[npt.NDArray[np.int64]], logits: npt.NDArray[np.float32]
) -> Invariance:
    """Score a sample again: alone on this session, beside another text, and with other tokens read before."""
    session = reader.session
    workers = neighbours = prefix = 0.0
    chosen = _sample(sequences)
    for place, index in enumerate(chosen):
        ids, other = sequences[index], sequences[chosen[place - 1]]
        alone = reader.logits(ids)
        whole = logits_of(session, ids) if reader.knows(ids) else alone
        workers = max(workers, float(np.abs(alone - logits[index]).max()))
        both, mask = pair(ids, other, can_pad=bool({"attention_mask", "lengths"} & set(session.inputs)))
        beside = session.run(feeds_for(session.inputs, both, mask))[0]
        neighbours = max(neighbours, float(np.abs(beside - whole).max()))
        prefix = max(prefix, float(np.abs(whole - alone).max()))
        if session.has_state and len(ids) > 1:
            half = len(ids) // 2
            behind = logits_of(session, ids[half:], state_after(session, ids[:half]))
            prefix = max(prefix, float(np.abs(behind - alone).max()))
    return Invariance(neighbours=neighbours, workers=workers, prefix=prefix if session.has_state else None)


def _sample(sequences: Sequence[npt.NDArray[np.int64]]) -> list[int]:
    """Indices of texts for the invariance checks: evenly spread, at least two where there are, few tokens in all."""
    step = max(1, len(sequences) // INVARIANCE_TEXTS)
    chosen: list[int] = []
    tokens = 0
    for index in range(0, len(sequences), step)[:INVARIANCE_TEXTS]:
        tokens += len(sequences[index])
        if len(chosen) >= 2 and tokens > INVARIANCE_TOKENS:
            break
        chosen.append(index)
    return chosen


def pair(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], *, can_pad: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and mask int64 [2, sequence]: right-padded to the longer one, or else the second repeated or cut to fit."""
    if not can_pad:
        return np.stack([first, np.resize(second, len(first))]), np.ones((2, len(first)), np.int64)
    width = max(len(first), len(second))
    ids, mask = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    for row, sequence in enumerate((first, second)):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return ids, mask
