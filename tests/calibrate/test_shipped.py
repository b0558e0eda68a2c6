import gzip
import json
from dataclasses import replace

import numpy as np
import pytest

from samescore.calibrate import shipped
from samescore.calibrate.golden import GoldenSet, GoldenText, ReferenceInfo, read_golden, text_digest
from samescore.calibrate.shipped import read_shipped, write_shipped
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import InputError

INFO = ReferenceInfo("a" * 64, "float32", "2.13.0", "5.23.0", 1e-3, 1e-2, 0.5, 0.25)
CONTRACT = TextContract("conversation", 64, "middle", "<|...|>")


def make(count, words=20):
    """A golden set of texts that hardly compress."""
    random = np.random.default_rng(0)
    texts = tuple(
        GoldenText(
            {"text": f"{i} {random.bytes(words).hex()}"},
            "Refusal" if i % 2 else None,
            random.integers(0, 250_000, words),
            random.normal(0, 3, 2).astype(np.float32),
            slice="ordinary" if i % 3 else None,
            language="en" if i % 5 else None,
        )
        for i in range(count)
    )
    return GoldenSet(INFO, texts)


def said(text):
    return (text.label, text.slice, text.language, text.logits.tobytes())


def test_a_small_set_is_whole_and_the_same_every_time():
    golden = make(50)
    raw = write_shipped(golden, CONTRACT)
    assert raw == write_shipped(golden, CONTRACT) and raw[4:8] == bytes(4)  # no time in the header
    read = read_shipped(raw)
    assert read.known == () and read.reference == INFO and read.note() is None
    assert [text.record for text in read.whole] == [text.record for text in golden.texts]
    assert read.inside().reference == INFO
    assert [said(text) for text in read_golden(raw, "x").texts] == [said(text) for text in golden.texts]


def test_what_exceeds_the_limit_is_known_by_digest(monkeypatch):
    monkeypatch.setattr(shipped, "GOLDEN_LIMIT", 60_000)
    golden = make(700)
    raw = write_shipped(golden, CONTRACT)
    read = read_shipped(raw)
    assert 300 <= len(read.whole) < 700 and len(read) == 700
    assert 55_000 < len(raw) <= 60_000  # no fewer whole texts than fit
    assert [said(text) for text in read.texts()] == [said(text) for text in golden.texts]
    assert read.lengths() == [20] * 700 and np.array_equal(read.logits(), golden.logits())
    assert read.digests(CONTRACT) == [text_digest(text, CONTRACT) for text in golden.texts]
    last = golden.texts[-1].record["text"]
    assert last.encode() not in gzip.decompress(raw)
    assert read.note() == f"{len(read.whole)} of 700 texts are inside the bundle; the others are known by digest"
    inside = read.inside()
    assert len(inside.texts) == len(read.whole) and inside.reference.bf16_mean_abs_dp is None
    with pytest.raises(InputError, match=rf"line {len(read.whole) + 2}: this text is known by its digest only"):
        read_golden(raw, "golden.jsonl.gz")


def test_the_first_300_are_whole_however_long_they_are(monkeypatch):
    monkeypatch.setattr(shipped, "GOLDEN_LIMIT", 1_000)
    read = read_shipped(write_shipped(make(400), CONTRACT))
    assert (len(read.whole), len(read.known)) == (300, 100)
    assert read_shipped(write_shipped(make(200), CONTRACT)).known == ()


def test_more_than_a_reader_unpacks_is_not_written(monkeypatch):
    """Text that repeats itself is small in gzip, and still too much to read."""
    monkeypatch.setattr(shipped, "MAX_BYTES", 480_000)
    texts = tuple(replace(text, record={"text": f"{i} " + "a" * 1000}) for i, text in enumerate(make(400).texts))
    raw = write_shipped(GoldenSet(INFO, texts), CONTRACT)
    assert 0 < len(read_shipped(raw).known) < 100 and 470_000 < len(gzip.decompress(raw)) <= 480_000
    monkeypatch.setattr(shipped, "MAX_BYTES", 300_000)
    with pytest.raises(InputError, match="the first 300 golden texts and their ids take more than"):
        write_shipped(GoldenSet(INFO, texts), CONTRACT)


def test_the_yardstick_of_some_texts_is_theirs():
    golden = make(60)
    read = read_shipped(write_shipped(golden, CONTRACT))
    bfloat16 = golden.logits()
    bfloat16[:10] += np.float32([0.1, 0])
    options = {"bfloat16": bfloat16, "labels": ("no", "yes"), "activation": "softmax"}
    rows = [3, 30, 31]
    some = shipped.with_stored(read, [golden.texts[row] for row in rows], rows, **options)
    assert np.array_equal(some.logits(), golden.logits()[rows])
    assert 0 < some.reference.bf16_mean_abs_dp < 0.02 and some.reference.label_mass_mean is None
    others = shipped.with_stored(read, [golden.texts[30]], [30], **options)
    assert others.reference.bf16_mean_abs_dp == 0
    without = shipped.with_stored(read, [golden.texts[30]], [30], **{**options, "bfloat16": None})
    assert without.reference.bf16_mean_abs_dp is None
    assert shipped.with_stored(read, golden.texts, range(60), **options).reference == INFO


LINE = {"digest": "0" * 64, "tokens": 3, "logits": ["0x1p+0", "0x1p+1"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "0" * 63}, "line 4: `digest` is not a SHA-256"),
        ({"digest": "A" * 64}, "line 4: `digest` is not a SHA-256"),
        ({"tokens": True}, "line 4: `tokens` is not a number"),
        ({"tokens": 0}, "line 4: `tokens` is not a number"),
        ({"logits": []}, "line 4: `logits` is not a list"),
        ({"logits": ["x"]}, "line 4: "),
        ({"slice": 3}, "line 4: `slice` must be a string"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    lines = gzip.decompress(write_shipped(make(2), CONTRACT)).decode() + json.dumps(LINE | change)
    with pytest.raises(InputError, match=message):
        read_shipped(lines.encode())


def test_the_order_is_checked_and_a_reference_needed():
    head, first, second, _ = gzip.decompress(write_shipped(make(2), CONTRACT)).decode().split("\n")
    known = json.dumps(LINE)
    assert len(read_shipped("\n".join([head, first, second, known]).encode())) == 3
    with pytest.raises(InputError, match="whole texts stand behind"):
        read_shipped("\n".join([head, first, known, second]).encode())
    with pytest.raises(InputError, match="names no reference"):
        read_shipped("\n".join([first, second]).encode())
    with pytest.raises(InputError, match="hold no `input_ids`"):
        read_shipped("\n".join([head, '{"text": "a"}']).encode())
    with pytest.raises(InputError, match="hold no `input_ids`"):
        read_shipped("\n".join([head, known]).encode())
