import io
import json

import pytest

from samescore.runtime import load
from samescore.runtime.records import CHUNK, read_lines, score_lines


@pytest.fixture(scope="module")
def classifier(bert_bundle):
    return load(bert_bundle, variant="cpu-int8", workers=2)


def scored(classifier, raw, *, jsonl=True):
    return [record for _, record in score_lines(classifier, read_lines(io.BytesIO(raw), jsonl=jsonl))]


def test_bad_lines_are_reported_and_the_rest_is_scored(classifier):
    raw = b"\n".join(
        [
            b'{"id": 1, "text": "bread"}',
            b"",
            b'{"id": 3, "text": "\xff\xfe"}',
            b'{"id": 4}',
            b"{broken",
            b'["list"]',
            b'{"id": 7, "text": ""}',
            b'{"id": 8, "messages": [{"role": "user", "content": "salt"}]}',
            b'{"id": 9, "text": "\\ud800"}',
        ]
    )
    records = scored(classifier, raw)
    assert [record.get("line") for record in records] == [None, 3, 4, 5, 6, 7, None, 9]
    assert records[0]["id"] == 1 and records[0]["text"] == "bread" and records[0]["label"] in classifier.labels
    assert "not UTF-8 at byte" in records[1]["error"]
    assert "exactly one of" in records[2]["error"]
    assert "not JSON" in records[3]["error"]
    assert "not a JSON object but list" in records[4]["error"]
    assert "empty" in records[5]["error"]
    assert records[6]["label"] == classifier("<|user|>salt").label
    assert "surrogate" in records[7]["error"]
    for record in records:
        json.dumps(record)


def test_own_fields_are_kept_beside_ours(classifier):
    (record,) = scored(classifier, b'{"text": "bread", "label": "gold", "logits": 7, "note": null}')
    assert record["input_label"] == "gold" and record["input_logits"] == 7 and record["note"] is None
    assert record["label"] in classifier.labels


def test_output_fields(classifier):
    (record,) = scored(classifier, b'{"text": "bread"}')
    assert list(record) == ["text", "label", "probability", "probabilities", "logits", "entropy", "truncated"]


def test_plain_text(classifier):
    records = scored(classifier, '\ufeffbread\r\n\n  \n{"text": 1}\n'.encode(), jsonl=False)
    assert [record["text"] for record in records] == ["bread", '{"text": 1}']


def test_more_lines_than_a_chunk_stay_in_order(classifier):
    count = CHUNK + 17
    raw = b"".join(json.dumps({"id": i, "text": "bread " * (i % 7 + 1)}).encode() + b"\n" for i in range(count))
    assert [record["id"] for record in scored(classifier, raw)] == list(range(count))


def test_unicode_line_separators_do_not_split_a_line(classifier):
    (record,) = scored(classifier, '{"text": "bread\u2028salt\u0085water"}'.encode())
    assert record["text"] == "bread\u2028salt\u0085water" and "label" in record
