"""Padded batches, run on the CPU provider: what a GPU is handed, and that its rows are those of texts read alone."""

from dataclasses import astuple

import numpy as np
import pytest

from samescore.runtime import InputError, UsageError, load
from samescore.runtime.batches import Bucket, bucket_batches
from samescore.runtime.errors import BundleError
from samescore.runtime.padded import open_buckets, padded
from samescore.runtime.session import Session

TEXTS = [
    "<|user|>bread?<|assistant|>" + "here is a clear recipe " * repeat + word
    for repeat in (0, 1, 2, 5)
    for word in ("sorry", "danke", "我不能", "flour water salt", "?!", "yeast " * 9)
]
BUCKETS = "4x16,1x32,3x40,1x64,5x64"
VARIANT = "migraphx-fp16"
# Float16 may round otherwise where a shape makes a kernel sum in another order; on the CPUs at hand it does not.
NOISE = 1e-3


@pytest.fixture(scope="module", params=[{"buckets": BUCKETS}, {"batch_tokens": 160}], ids=["buckets", "budget"])
def classifier(request, bert_bundle):
    return load(bert_bundle, provider="cpu", variant=VARIANT, **request.param)


@pytest.fixture(scope="module")
def alone(bert_bundle):
    return load(bert_bundle, provider="cpu", variant=VARIANT)


@pytest.fixture
def shapes(monkeypatch):
    """Rows and tokens of each call of a session."""
    seen, original = [], Session.run
    monkeypatch.setattr(
        Session, "run", lambda self, feeds, *more: seen.append(feeds["input_ids"].shape) or original(self, feeds, *more)
    )
    return seen


def rows(predictions):
    return np.array([p.logits for p in predictions])


def test_rows_of_batches_are_those_of_texts_read_alone(classifier, alone, shapes):
    expected = rows(alone.score(TEXTS))
    assert set(shapes) == {(1, size) for _, size in shapes} and len(shapes) == len(TEXTS)
    shapes.clear()
    together = classifier.score(TEXTS)
    assert len(shapes) < len(TEXTS) / 2 and max(shapes)[0] > 1
    np.testing.assert_allclose(rows(together), expected, atol=NOISE)
    assert len({p.logits for p in together}) > len(TEXTS) // 2
    assert [p.tokens for p in together] == [p.tokens for p in alone.score(TEXTS)]


def test_padding_that_is_read_would_be_seen(classifier, alone, monkeypatch):
    """The control: with padding taken for text, or rows mixed up, the comparison above fails."""
    expected = rows(alone.score(TEXTS))
    with monkeypatch.context() as patch:
        patch.setattr(
            "samescore.runtime.padded.padded",
            lambda texts, shape: (padded(texts, shape)[0], np.ones(astuple(shape), int)),
        )
        assert np.abs(rows(classifier.score(TEXTS)) - expected).max() > 20 * NOISE
    assert np.abs(np.roll(expected, 1, axis=0) - expected).max() > 20 * NOISE


def test_what_is_beside_a_text_changes_only_rounding(classifier):
    first = rows(classifier.score(TEXTS))
    np.testing.assert_allclose(rows(classifier.score(TEXTS[::-1]))[::-1], first, atol=NOISE)
    np.testing.assert_allclose(rows([classifier(text) for text in TEXTS]), first, atol=NOISE)
    other = rows(classifier.score([TEXTS[0], "<|user|>" + "unrelated words " * 20, "?"]))
    np.testing.assert_allclose(other[0], first[0], atol=NOISE)


def test_each_bucket_runs_in_its_own_shape(bert_bundle, shapes):
    classifier = load(bert_bundle, provider="cpu", variant=VARIANT, buckets=BUCKETS)
    named = {(int(b), int(s)) for b, s in (part.split("x") for part in BUCKETS.split(","))}
    assert set(shapes) == named and len(shapes) == len(named), "each was run once, before the first text"
    shapes.clear()
    classifier.score(TEXTS)
    assert set(shapes) <= named
    planned = bucket_batches(
        [len(classifier.encoder.encode(text).input_ids) for text in TEXTS], classifier._padded.buckets
    )
    assert shapes == [(batch.shape.batch, batch.shape.sequence) for batch in planned]


def test_a_session_of_a_bucket_takes_no_other_shape(bert_bundle):
    classifier = load(bert_bundle, provider="cpu", variant=VARIANT, buckets="2x16,1x64")
    session = classifier._padded._sessions[Bucket(2, 16)]
    assert session.shapes["input_ids"] == session.shapes["attention_mask"] == (2, 16)
    ids = np.ones((1, 16), np.int64)
    with pytest.raises(Exception, match="Expected: 2"):
        session.run({"input_ids": ids, "attention_mask": ids})


def test_rows_behind_the_texts_are_real_ones():
    """A row of nothing but padding is a softmax over nothing."""
    ids, mask = padded([np.array([5, 6, 7]), np.array([8])], Bucket(4, 5))
    assert ids.tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0], [5, 6, 7, 0, 0], [5, 6, 7, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_a_text_longer_than_every_bucket_is_refused_by_name(bert_bundle):
    classifier = load(bert_bundle, provider="cpu", variant=VARIANT, buckets="4x16,1x48", canary="off")
    long = "<|user|>" + "flour and water " * 30
    with pytest.raises(
        InputError, match=r"item 1: 63 tokens are more than the longest bucket, 1x48.*warmup.*1x63.*max_tokens=48"
    ):
        classifier.score(["bread", long])
    good, bad = classifier.score_records([{"text": "bread"}, {"text": long}])
    assert good.label and isinstance(bad, InputError)
    cut = load(bert_bundle, provider="cpu", variant=VARIANT, buckets="1x48", max_tokens=48, canary="off")
    assert cut(long).truncated


def test_no_texts_and_progress(classifier):
    assert classifier.score([]) == []
    told = []
    classifier.score(TEXTS, progress=lambda: told.append(1))
    assert len(told) == len(TEXTS)


def test_padding_is_not_for_sharing_a_state(classifier):
    with pytest.raises(UsageError, match="no state"):
        classifier._padded.logits(np.array([0, 5, 2]), {"past_key.0": np.zeros((1, 1, 1, 1), np.float32)})


@pytest.mark.parametrize("name", ["cpu-fp32", "cpu-int8"])
def test_a_decoder_in_batches(llama_bundle, name):
    """`lengths` instead of a mask; with one prompt too, which is then read with each response."""
    alone = load(llama_bundle, provider="cpu", variant=name, raw=True)
    batched = load(llama_bundle, provider="cpu", variant=name, raw=True, batch_tokens=256)
    responses = ["bread", "flour and salt and water", "yeast " * 12, "我不能"]
    atol = 3e-6 if name == "cpu-fp32" else 2e-2
    expected = rows(alone.score("which bread?", responses))
    np.testing.assert_allclose(rows(batched.score("which bread?", responses)), expected, atol=atol)


def test_arguments_that_do_not_go_together(bert_bundle):
    cpu = {"provider": "cpu", "variant": VARIANT}
    with pytest.raises(UsageError, match="name one of them"):
        load(bert_bundle, **cpu, buckets="1x64", batch_tokens=64)
    with pytest.raises(UsageError, match="batch_tokens must be at least 1"):
        load(bert_bundle, **cpu, batch_tokens=0)
    with pytest.raises(UsageError, match="no bucket"):
        load(bert_bundle, **cpu, buckets="64")


@pytest.mark.parametrize("asked", [{"buckets": "2x16"}, {"batch_tokens": 64}])
def test_a_graph_that_cannot_pad_is_refused(bert_bundle, asked):
    with pytest.raises(UsageError, match="neither attention_mask nor lengths"):
        load(bert_bundle, provider="cpu", variant="cpu-fp32", **asked)


def test_axes_of_other_names_are_refused(bert_bundle, monkeypatch):
    """Dimensions that no axis has are passed over by ONNX Runtime; MIGraphX would compile during requests."""
    classifier = load(bert_bundle, provider="cpu", variant=VARIANT)
    original = Session.__init__
    monkeypatch.setattr(
        Session, "__init__", lambda self, *a, dimensions, **k: original(self, *a, dimensions={"n": 1, "m": 2}, **k)
    )
    with pytest.raises(BundleError, match="not named batch and sequence"):
        open_buckets(classifier._model, "cpu", [Bucket(2, 16)], {}, threads=1)
