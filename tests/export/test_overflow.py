"""No float16 file overflows where trained models have massive activations: measured on the graph's float32 twin, and run."""

import json

import numpy as np
import pytest

from samescore.calibrate.activations import collect_statistics
from samescore.calibrate.reference import load_reference, reference_logits
from samescore.calibrate.stages import read_model
from samescore.export.build import MODEL_NAME, build_graph
from samescore.export.checkpoint import Checkpoint
from samescore.export.graphs import bert, llama, qwen3_5
from samescore.export.recipes import variant_spec
from samescore.export.scorer import TokenScorer
from samescore.runtime.prefill import feeds_for, logits_of
from samescore.runtime.session import Session

from ..conftest import label_tokens

pytest.importorskip("torch")
from . import outliers
from .half_edges import largest_half_values

pytestmark = pytest.mark.torch

FLOAT16_MAX = 65504
# The largest |Δp| of a text that a precision's gate allows.
TOLERANCE = {"fp16": 5e-3, "int8": 5e-2}
GRAPHS = {"bert": (bert, outliers.BERT), "llama": (llama, outliers.LLAMA), "qwen3_5": (qwen3_5, outliers.QWEN)}
CASES = [
    (architecture, kind, variant)
    for architecture, (graph, kinds) in GRAPHS.items()
    for kind in kinds
    for variant in graph.VARIANTS
    # No kernel for the chunked delta rule here; but for it the file is cuda-fp16's.
    if variant_spec(variant).recipe.half and not variant_spec(variant).recipe.chunked
]


def texts(architecture, vocabulary, lengths, seed):
    """Random ids with the mark where this architecture reads it and the pooled token is another."""
    random = np.random.default_rng(seed)
    found = []
    for length in lengths:
        ids = random.integers(5, vocabulary, size=length)
        ids[-1 if architecture == "bert" else 0] = outliers.MARK
        found.append(ids)
    return found


def probabilities(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory):
    """By architecture and kind of outlier: the checkpoint, texts, the reference's logits, statistics of activations."""
    made = {}

    def make(architecture, kind):
        if (architecture, kind) not in made:
            source = request.getfixturevalue(f"{architecture}_checkpoint")
            folder = outliers.with_outliers(source, tmp_path_factory.mktemp(architecture) / kind, kind)
            checkpoint = Checkpoint(folder)
            if architecture == "qwen3_5":
                checkpoint = TokenScorer(checkpoint, label_tokens(folder))
            vocabulary = int(json.loads((folder / "config.json").read_text())["vocab_size"])
            lengths = [2, 9, 33, 60] if architecture == "bert" else [2, 9, 33, 70, 150]
            ids = texts(architecture, vocabulary, lengths, seed=3)
            peak = outliers.residual_peak(load_reference(checkpoint), ids)
            known = collect_statistics(checkpoint, texts(architecture, vocabulary, [5, 20, 40], seed=4)).statistics
            made[architecture, kind] = checkpoint, ids, peak, reference_logits(checkpoint, ids), known
        return made[architecture, kind]

    return make


def built(checkpoint, variant, folder, statistics):
    folder.mkdir(exist_ok=True)
    build_graph(checkpoint, variant_spec(variant).recipe, folder, statistics=statistics)
    return Session(read_model(folder), "cpu", intra_op_threads=1)


@pytest.mark.parametrize(("architecture", "kind"), sorted({case[:2] for case in CASES}))
def test_the_reference_has_massive_activations(subject, architecture, kind):
    """In PyTorch, where another text still gives other probabilities."""
    _, _, peak, expected, _ = subject(architecture, kind)
    assert GRAPHS[architecture][1][kind] <= peak <= 3e5
    assert np.isfinite(expected).all()
    assert probabilities(expected).std(axis=0).max() > 0.02


@pytest.mark.parametrize(("architecture", "kind", "variant"), CASES)
def test_nothing_overflows(subject, tmp_path, architecture, kind, variant):
    checkpoint, ids, _, expected, statistics = subject(architecture, kind)
    session = built(checkpoint, variant, tmp_path / "model", statistics)
    batches = [feeds_for(session.inputs, sequence[None]) for sequence in ids]
    largest = largest_half_values(tmp_path / "model" / MODEL_NAME, batches)
    assert len(largest) > 10
    beyond = {name: f"{x:.3g}" for name, x in largest.items() if not x <= FLOAT16_MAX}
    assert not beyond, f"float16 values beyond {FLOAT16_MAX}: {beyond}"
    got = np.stack([logits_of(session, sequence) for sequence in ids])
    assert np.isfinite(got).all()
    moved = np.abs(probabilities(got) - probabilities(expected)).max()
    assert moved <= TOLERANCE[variant_spec(variant).precision], f"{moved:.2e}"
