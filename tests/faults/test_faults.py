"""One planted fault after another in every architecture; the diagnosis must name it."""

from pathlib import Path

import numpy as np
import pytest

from samescore.export.checkpoint import Checkpoint
from samescore.export.scorer import TokenScorer

from ..conftest import label_tokens
from .planting import (
    after_logits,
    build,
    changed,
    diagnosis_of,
    edit_weight,
    exact_logits,
    flip_bit,
    random_texts,
    weights_of,
)

pytestmark = pytest.mark.torch

ARCHITECTURES = ("bert", "llama", "qwen3_5")
VARIANTS = ("cpu-fp32", "cpu-int8", "migraphx-fp16")
HEAD = {"bert": "classifier", "llama": "score", "qwen3_5": "score"}
LAYERS = {"bert": 3, "llama": 3, "qwen3_5": 4}


class Subject:
    """A tiny checkpoint, texts, and what it says of them."""

    def __init__(self, name: str, checkpoint: Checkpoint, folder: Path):
        self.name = name
        self.checkpoint = checkpoint
        self.sequences = random_texts(int(checkpoint.config["vocab_size"]))
        self.reference = exact_logits(checkpoint, self.sequences, folder)

    def build(self, variant, folder, checkpoint=None):
        return build(checkpoint or self.checkpoint, variant, folder, self.sequences)

    def said(self, built, variant, *, known=True):
        return diagnosis_of(built, variant, self.checkpoint, self.sequences, self.reference, known=known)


@pytest.fixture(scope="session")
def subjects(bert_checkpoint, llama_checkpoint, qwen3_5_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("subjects")
    scorer = TokenScorer(Checkpoint(qwen3_5_checkpoint), label_tokens(qwen3_5_checkpoint))
    checkpoints = (Checkpoint(bert_checkpoint), Checkpoint(llama_checkpoint), scorer)
    return {n: Subject(n, c, folder / n) for n, c in zip(ARCHITECTURES, checkpoints, strict=True)}


@pytest.fixture(params=ARCHITECTURES)
def subject(request, subjects):
    return subjects[request.param]


@pytest.mark.parametrize("variant", VARIANTS)
def test_swapped_labels(subject, variant, tmp_path):
    head = HEAD[subject.name]
    swap = {f"{head}__weight": lambda w: w[::-1], f"{head}__bias": lambda b: b[::-1]}
    built = subject.build(variant, tmp_path, changed(subject.checkpoint, **swap))
    said = subject.said(built, variant, known=False)
    first, last = subject.checkpoint.labels[0], subject.checkpoint.labels[-1]
    assert said.startswith(f"the labels are in another order: output 0 holds {last!r}, not {first!r}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ("Softmax", "the graph already applies softmax: its outputs are probabilities that sum to 1"),
        ("Sigmoid", "the graph already applies sigmoid"),
    ],
)
def test_an_activation_too_many(subject, variant, operator, words, tmp_path):
    built = subject.build(variant, tmp_path)
    after_logits(built, operator)
    assert subject.said(built, variant, known=False).startswith(words)


def test_log_softmax_is_a_note(subject, tmp_path):
    built = subject.build("cpu-fp32", tmp_path)
    after_logits(built, "LogSoftmax", axis=-1)
    said = subject.said(built, "cpu-fp32", known=False)
    assert said.endswith("log-probabilities (log_softmax): that alone changes no probability")


def pool(monkeypatch, place):
    """Decoders pool `place(builder, last)` and see no later tokens."""
    from samescore.export.graphs import decoder

    original = decoder.TokenRows.__init__

    def other(self, g, source, **options):
        original(self, g, source, **options)
        self.last = place(g, self.last)
        if self.mask is not None:
            before = g.op("CumSum", self.mask, g.constant(1, np.int64))
            seen = g.op("LessOrEqual", before, g.op("Unsqueeze", g.op("Add", self.last, g.ints(1)), g.ints(1)))
            self.mask = g.op("Cast", seen, to=7)

    monkeypatch.setattr(decoder.TokenRows, "__init__", other)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
def test_the_position_before_the_last(subjects, name, variant, tmp_path, monkeypatch):
    pool(monkeypatch, lambda g, last: g.op("Sub", last, g.constant([1], np.int64)))
    built = subjects[name].build(variant, tmp_path)
    monkeypatch.undo()
    said = subjects[name].said(built, variant, known=False)
    assert said.startswith("the graph pools the position before the last real token")


@pytest.mark.parametrize("variant", VARIANTS)
def test_bert_at_the_second_position(subjects, variant, tmp_path, monkeypatch):
    from samescore.export.graphs import bert

    def second(self, rows):
        return self.g.op("Gather", self._unflatten(rows, 1), self.g.constant(1, np.int64), axis=1)

    monkeypatch.setattr(bert._Bert, "_first_rows", second)
    built = subjects["bert"].build(variant, tmp_path)
    monkeypatch.undo()
    said = subjects["bert"].said(built, variant)
    assert said.startswith("the graph pools position 1, where the reference pools position 0")


def test_a_position_that_all_texts_share(subjects, tmp_path, monkeypatch):
    pool(monkeypatch, lambda g, last: g.op("Mul", last, g.constant([0], np.int64)))
    built = subjects["llama"].build("migraphx-fp16", tmp_path)
    monkeypatch.undo()
    said = subjects["llama"].said(built, "migraphx-fp16", known=False)
    assert said.startswith("every text gets the same logits: the graph pools a position that all texts share")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_flipped_bit_before_the_digests(subject, variant, tmp_path):
    """The highest exponent bit that leaves the value finite, of one weight or scale in layer 1."""
    built = subject.build(variant, tmp_path)
    name = next(
        n
        for n in weights_of(built)
        if ("layers.1.mlp" in n or "layer.1.output.dense" in n) and (variant != "cpu-int8" or n.endswith(".scale"))
    )

    def flip(array):
        bit = 30 if array.dtype == np.float32 else 14
        index = int(np.argmin(np.abs(array.reshape(-1).astype(np.float64) - 0.05)))
        flip_bit(array, index, bit)

    edit_weight(built, name, flip)
    said = subject.said(built, variant)
    assert f"the drift enters at layer 1 of {LAYERS[subject.name]} (counted from 0), its feed-forward" in said


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_smoothing_scale_that_is_not_undone(subject, variant, tmp_path):
    """What a norm (or the centring) divides by and the weights behind it do not multiply by."""
    built = subject.build(variant, tmp_path)
    names = weights_of(built)
    bert = "bert.encoder.layer.2.attention.self"
    wanted = ("model.layers.2.input_layernorm.weight", f"{bert}.key_value.smoothing", f"{bert}.key_value.weight")
    name = next(w for w in wanted if w in names)

    def scale(array):
        array[:] = array * np.asarray(8, array.dtype)

    edit_weight(built, name, scale)
    said = subject.said(built, variant)
    assert f"the drift enters at layer 2 of {LAYERS[subject.name]} (counted from 0), its attention" in said


def test_honest_rounding_is_spread(subject, tmp_path):
    for variant in ("cpu-int8", "cpu-int4", "migraphx-fp16", "migraphx-int8"):
        built = subject.build(variant, tmp_path)
        said = subject.said(built, variant)
        assert said.startswith("spread over all layers: rounding"), (variant, said)
