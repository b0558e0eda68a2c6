"""Run variants that generate over a golden set, teacher-forced token by token, and hold each against its tolerance.

    reference ──► one sequence's logits ──► every variant's engine along the same tokens ──► statistics per position

The engine reads each prompt in chunks and then one token per step, with the buffers that generation uses, so that what is
measured is what will write. Of the reference's logits the likeliest tokens are kept, of the variants' only statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from samescore.calibrate.generation_certificate import GenerationDrift, GenerationParity
from samescore.calibrate.generation_gate import GENERATION_TOLERANCES, failures_of
from samescore.calibrate.generation_golden import (
    TOP,
    GenerationGolden,
    GenerationReference,
    GoldenSequence,
    Kind,
    with_rows,
)
from samescore.calibrate.generation_metrics import (
    Ids,
    Logits,
    Positions,
    Rows,
    compare,
    greedy_agreement,
    token_drift,
)
from samescore.calibrate.generation_reference import GreedyReference
from samescore.calibrate.progress import Reporter
from samescore.calibrate.reference import reference_versions
from samescore.export.generator import Generator
from samescore.runtime.errors import InputError
from samescore.runtime.generation.engine import Engine
from samescore.runtime.manifest import Precision

Found = dict[Kind, list[Positions]]


@dataclass(frozen=True)
class Measured:
    """What a variant's positions are along answers and texts, and the reference's own bfloat16's."""

    positions: Mapping[str, Found]
    bfloat16: Found = field(default_factory=lambda: {"answer": [], "text": []})


def forced(engine: Engine, prompt: Ids, following: Ids) -> Logits:
    """The engine's logits float32 [positions, vocabulary] of each of the tokens that follow a prompt."""
    state = engine.start(prompt)
    assert state.logits is not None
    rows = [np.array(state.logits[0])]
    rows.extend(np.array(engine.step(state, [token])) for token in following[:-1].tolist())
    return np.stack(rows)


def measure_against_torch(
    checkpoint: Generator,
    sequences: Sequence[GoldenSequence],
    engines: Mapping[str, Engine],
    *,
    eos: Sequence[int],
    tokens: int,
    report: Reporter,
) -> tuple[GenerationGolden, Measured]:
    """PyTorch answers every prompt greedily (`tokens` at most) and reads every text; each engine follows.

    sequences: answers without what follows, and texts. InputError where PyTorch's logits are no numbers.
    """
    reference = GreedyReference(checkpoint, eos)
    half = GreedyReference(checkpoint, eos, dtype="bfloat16")
    kept = []
    measured = Measured({name: {"answer": [], "text": []} for name in engines})
    answers = sum(one.kind == "answer" for one in sequences)
    title = f"PyTorch and {', '.join(engines)}: {answers} answers, {len(sequences) - answers} texts"
    with report(title, len(sequences)) as tick:
        for one in sequences:
            following = one.following
            if one.kind == "answer":
                following, logits = reference.answer(one.prompt, tokens)
            else:
                logits = reference.along(one.prompt, following)
            if not np.isfinite(logits).all():
                raise InputError("the reference's own logits are NaN or infinite: the checkpoint is damaged")
            rows = Rows.whole(logits, following)
            measured.bfloat16[one.kind].append(compare(rows, half.along(one.prompt, following)))
            for name, engine in engines.items():
                measured.positions[name][one.kind].append(compare(rows, forced(engine, one.prompt, following)))
            kept.append(with_rows(one, following, rows.top(TOP)))
            tick()
    torch, transformers = reference_versions()
    info = GenerationReference(
        checkpoint.sha256(),
        "float32",
        torch,
        transformers,
        bf16_answers_kld=token_drift(measured.bfloat16["answer"]).mean_kld,
        bf16_texts_kld=token_drift(measured.bfloat16["text"]).mean_kld,
    )
    return GenerationGolden(info, tuple(kept), (answers, len(sequences) - answers)), measured


def measure_against_stored(golden: GenerationGolden, engine: Engine, name: str, report: Reporter) -> Measured:
    """One engine along the golden set's tokens, against the likeliest tokens that it stores."""
    found: Found = {"answer": [], "text": []}
    with report(f"measuring {name} on {len(golden.sequences)} sequences", len(golden.sequences)) as tick:
        for one in golden.sequences:
            assert one.rows is not None  # `read_generation_golden` has read them
            found[one.kind].append(compare(one.rows, forced(engine, one.prompt, one.following)))
            tick()
    return Measured({name: found})


def judge_generation(
    measured: Measured, name: str, precision: Precision, golden: GenerationGolden, *, whole: bool
) -> GenerationParity:
    """A variant's statistics and verdict. whole: whether the whole vocabulary was compared."""
    tolerance, found = GENERATION_TOLERANCES[precision], measured.positions[name]
    answers, texts = token_drift(found["answer"]), token_drift(found["text"])
    greedy = greedy_agreement(found["answer"], [one.following for one in golden.of("answer")], tolerance.tie)
    info = golden.reference
    drift = GenerationDrift(
        "whole" if whole else "top",
        answers,
        texts,
        greedy,
        _ratio(answers.mean_kld, info.bf16_answers_kld if info else None),
        _ratio(texts.mean_kld, info.bf16_texts_kld if info else None),
    )
    failures = failures_of(answers, texts, greedy, tolerance)
    return GenerationParity("FAIL" if failures else "PASS", failures, tolerance, drift)


def _ratio(measured: float, noise: float | None) -> float | None:
    return measured / noise if noise else None
