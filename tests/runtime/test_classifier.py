import threading

import numpy as np
import pytest

from samescore.runtime import InputError, Prediction, UsageError, load
from samescore.runtime.prediction import probabilities_of

TEXTS = [
    "<|user|>bread?<|assistant|>" + "here is a clear recipe " * repeat + word
    for repeat in (0, 1, 2, 5)
    for word in ("sorry", "danke", "我不能", "flour water salt", "?!", "yeast " * 9)
]


@pytest.fixture(scope="module", params=["cpu-int8", "cpu-fp32"])
def classifier(request, bert_bundle):
    return load(bert_bundle, variant=request.param)


def test_one_text(classifier):
    prediction = classifier("<|user|>Hi<|assistant|>the model refuses")
    assert isinstance(prediction, Prediction)
    assert prediction.label in classifier.labels == ("Non-refusal", "Refusal")
    assert prediction.probability == max(prediction.probabilities.values())
    assert sum(prediction.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert not prediction.truncated
    logits = np.array(prediction.logits, np.float32)
    assert list(prediction.probabilities.values()) == probabilities_of(logits, "softmax").tolist()


def test_a_conversation_scores_as_its_role_token_string(classifier):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the model refuses"}]
    assert classifier(messages) == classifier("<|user|>Hi<|assistant|>the model refuses")
    assert classifier([messages, "x"]) == [classifier(messages), classifier("x")]


def test_many_equal_one_by_one_bit_for_bit(classifier):
    """More than one worker and other texts beside it change nothing."""
    together = classifier.score(TEXTS, workers=2)
    assert [p.logits for p in together] == [classifier(text).logits for text in TEXTS]
    assert [p.logits for p in classifier.score(TEXTS[::-1], workers=3)] == [p.logits for p in together[::-1]]
    assert len({p.logits for p in together}) > len(TEXTS) // 2


def test_calls_from_many_threads(classifier):
    expected = [p.logits for p in classifier.score(TEXTS)]
    results: dict[int, list[tuple[float, ...]]] = {}

    def work(number):
        results[number] = [classifier(text).logits for text in TEXTS]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == expected for i in range(4))


def test_low_memory_scores_the_same(classifier, bert_bundle):
    lean = load(bert_bundle, variant=classifier.variant.name, low_memory=True)
    for text in TEXTS[:6]:
        np.testing.assert_allclose(lean(text).logits, classifier(text).logits, atol=1e-6)


def test_threads_do_not_change_scores(bert_bundle):
    one, three = (load(bert_bundle, variant="cpu-int8", threads=n) for n in (1, 3))
    assert [one(t).logits for t in TEXTS] == [three(t).logits for t in TEXTS]


def test_empty_list(classifier):
    assert classifier([]) == []


def test_bad_items_are_named(classifier):
    with pytest.raises(InputError, match="item 1: the text is empty"):
        classifier.score(["x", ""])
    with pytest.raises(InputError, match="got int"):
        classifier(7)


def test_records_report_errors_in_place(classifier):
    results = classifier.score_records([{"text": "bread"}, {"text": ""}, {"id": 7}, {"text": "salt"}])
    assert [type(r) for r in results] == [Prediction, InputError, InputError, Prediction]
    assert results[3] == classifier("salt")


@pytest.mark.parametrize("options", [{"threads": 0}, {"workers": 0}, {"workers": -1}])
def test_senseless_counts(bert_bundle, options):
    with pytest.raises(UsageError, match="at least 1"):
        load(bert_bundle, **options)
    with pytest.raises(UsageError, match="at least 1"):
        load(bert_bundle).score(["x"], workers=0)


def test_long_texts_are_cut_to_the_contract(classifier):
    prediction = classifier("<|user|>" + "bread and salt " * 500)
    assert prediction.truncated
    assert prediction.tokens <= 64


@pytest.mark.parametrize("logits", [[1000.0, -1000.0], [0.0, 0.0], [-1e30, 1e30]])
def test_probabilities_of_extreme_logits(logits):
    for activation in ("softmax", "sigmoid"):
        row = probabilities_of(np.array(logits, np.float32), activation)
        assert np.isfinite(row).all() and (row >= 0).all() and (row <= 1).all()
    assert probabilities_of(np.array([0.0]), "sigmoid") == pytest.approx(0.5)
