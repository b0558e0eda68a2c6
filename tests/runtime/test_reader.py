"""The prompt that all texts of a bundle begin with: read once, and never seen in a score."""

import threading

import numpy as np
import pytest

from samescore.runtime import load
from samescore.runtime.prefill import CHUNK, Reader, logits_of
from samescore.runtime.session import Session

ARTICLES = ["bread", "here is a clear recipe for bread with flour", "我不能帮助你", "{text}", "salt and yeast " * 120]


@pytest.fixture(scope="module", params=["cpu-fp32", "cpu-int8"])
def classifier(request, scorer_bundle):
    return load(scorer_bundle, variant=request.param, threads=2)


@pytest.fixture
def seen(monkeypatch):
    """Tokens of each call of a session, in order."""
    sizes = []
    for name in ("run", "advance"):
        original = getattr(Session, name)
        monkeypatch.setattr(
            Session,
            name,
            lambda self, feeds, state=None, f=original: sizes.append(feeds["input_ids"].size) or f(self, feeds, state),
        )
    return sizes


def test_the_prompt_is_read_once_per_session(scorer_bundle, seen):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    prefix = len(classifier.encoder.prefix_ids)
    assert prefix > 20
    tokens = [classifier(article).tokens for article in ARTICLES]
    assert sum(seen) == sum(tokens) - (len(ARTICLES) - 1) * prefix
    before = sum(seen)
    tokens = [prediction.tokens for prediction in classifier.score(ARTICLES)]
    assert sum(seen) - before == sum(tokens) - len(ARTICLES) * prefix


def test_scores_do_not_depend_on_company_or_order(classifier, scorer_bundle):
    """Bit for bit: the first text of a session, a later one, one of many, one of many at once."""
    alone = [load(scorer_bundle, variant=classifier.variant.name, threads=2)(a).logits for a in ARTICLES]
    assert [classifier(article).logits for article in reversed(ARTICLES)] == alone[::-1]
    assert [p.logits for p in classifier.score(ARTICLES)] == alone
    assert [p.logits for p in classifier.score(ARTICLES[::-1], workers=2)] == alone[::-1]
    lines = classifier.score_records([{"text": article} for article in ARTICLES])
    assert [p.logits for p in lines] == alone
    assert len(set(alone)) == len(ARTICLES)


def test_the_prefix_changes_nothing_but_the_order_of_sums(scorer_bundle):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    session = classifier._reader(1).session
    with_prefix = Reader(session, classifier.encoder.prefix_ids)
    without = Reader(session)
    for article in ARTICLES:
        ids = classifier.encoder.encode(article).input_ids
        assert with_prefix.knows(ids) and not without.knows(ids)
        np.testing.assert_allclose(with_prefix.logits(ids), without.logits(ids), atol=1e-5)
        np.testing.assert_array_equal(without.logits(ids), logits_of(session, ids))
    assert len(ids) > CHUNK


def test_ids_that_begin_otherwise_are_read_whole(scorer_bundle, seen):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    reader = Reader(classifier._reader(1).session, classifier.encoder.prefix_ids)
    ids = classifier.encoder.encode("bread").input_ids
    others = [np.concatenate([ids[1:], ids[:1]]), ids[:10], ids[: len(reader.prefix)]]
    for other in others:
        assert not reader.knows(other)
        np.testing.assert_array_equal(reader.logits(other), Reader(reader.session).logits(other))
    assert seen == [len(other) for other in others for _ in range(2)]


def test_a_prefix_that_is_too_short_or_of_a_graph_without_state_is_not_used(scorer_bundle, bert_bundle):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    assert len(Reader(classifier._reader(1).session, classifier.encoder.prefix_ids[:15]).prefix) == 0
    bert = load(bert_bundle, variant="cpu-fp32", threads=1)
    assert len(Reader(bert._reader(1).session, np.arange(20)).prefix) == 0


def test_a_given_state_goes_before_the_prefix(scorer_bundle):
    """Ids behind a state are never taken for the beginning of a text, even if they look like one."""
    from samescore.runtime.prefill import state_after

    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    reader = classifier._reader(1)
    ids = classifier.encoder.encode("bread").input_ids
    state = state_after(reader.session, ids[:5])
    np.testing.assert_array_equal(reader.logits(ids, state), logits_of(reader.session, ids, state))


def test_many_threads_read_the_prompt_once(scorer_bundle, seen):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    reader = Reader(classifier._reader(1).session, classifier.encoder.prefix_ids)
    ids = classifier.encoder.encode("bread and salt").input_ids
    rows, barrier = [], threading.Barrier(8)

    def score():
        barrier.wait()
        rows.append(reader.logits(ids))

    threads = [threading.Thread(target=score) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count(len(reader.prefix)) == 1 and len(rows) == 8
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_a_failed_reading_is_tried_again(scorer_bundle, monkeypatch):
    classifier = load(scorer_bundle, variant="cpu-fp32", threads=1)
    reader = Reader(classifier._reader(1).session, classifier.encoder.prefix_ids)
    ids = classifier.encoder.encode("bread").input_ids
    with monkeypatch.context() as patch:
        patch.setattr(Session, "advance", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            reader.logits(ids)
    np.testing.assert_array_equal(reader.logits(ids), classifier("bread").logits)
