import numpy as np
import pytest

from samescore.calibrate.golden import (
    GoldenSet,
    GoldenText,
    ReferenceInfo,
    encode_golden,
    read_golden,
    text_digests,
    with_logits,
    write_golden,
)
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import BundleError, InputError
from samescore.runtime.tokenizer import TextEncoder

INFO = ReferenceInfo("a" * 64, "float32", "2.13.0", "5.23.0", 1e-3, 1e-2, None, None)
CONTRACT = TextContract("conversation", 64, "middle", "<|...|>")


@pytest.fixture
def encoder(bert_checkpoint):
    return TextEncoder((bert_checkpoint / "tokenizer.json").read_bytes(), CONTRACT)


@pytest.fixture
def golden(encoder):
    texts = GoldenSet(
        None,
        (
            GoldenText({"text": "bread \u2028 salt"}, "Refusal"),
            GoldenText({"messages": [{"role": "user", "content": "hi"}]}, None),
        ),
    )
    logits = np.array([[0.1, -1e-30], [1 / 3, 12345.678]], np.float32)
    return with_logits(encode_golden(texts, encoder), logits, INFO)


def test_round_trip_is_lossless(golden, encoder):
    read = read_golden(write_golden(golden), "file")
    assert read.reference == INFO
    np.testing.assert_array_equal(read.logits(), golden.logits())
    assert read.labels() == ["Refusal", None]
    assert [ids.tolist() for ids in read.input_ids()] == [ids.tolist() for ids in golden.input_ids()]
    assert write_golden(encode_golden(read, encoder)) == write_golden(golden)


def test_fewer_texts_keep_their_logits_and_not_the_yardstick(golden):
    assert golden.first(None) is golden and golden.first(2) is golden
    few = golden.first(1)
    assert len(few.texts) == 1 and few.reference.bf16_mean_abs_dp is None and few.reference.bf16_p99_abs_dp is None
    assert few.reference.checkpoint_sha256 == INFO.checkpoint_sha256
    np.testing.assert_array_equal(few.logits(), golden.logits()[:1])


def test_a_plain_list_of_texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "label": "x", "source": "y"}\n\n{"text": "b", "logits": [1, 2]}\n')
    golden = read_golden(path)
    assert golden.reference is None
    assert [text.logits for text in golden.texts] == [None, None]
    assert golden.labels() == ["x", None]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "holds no texts"),
        (
            b'{"text": "a"}\n{"x": 1}',
            "line 2: needs exactly one of `text`, `messages`, or `prompt` and `response`; has: x",
        ),
        (b'{"text": "a"}\n{', "line 2"),
        (b"[]", "line 1: not a JSON object"),
        (b"\xff", "not UTF-8"),
        (b'{"golden": 2, "reference": null}', "golden format 2; this samescore reads 1"),
        (b'{"golden": 1, "reference": {"dtype": "float32"}}', "missing 'bf16_mean_abs_dp'"),
        (b'{"text": "a", "input_ids": ["1"]}', "not a list of integers"),
    ],
)
def test_what_is_wrong_is_named(raw, said):
    with pytest.raises(InputError, match=said):
        read_golden(raw, "texts.jsonl")


def test_a_reference_needs_ids_and_logits(golden):
    lines = write_golden(golden).split(b"\n")
    raw = b"\n".join([lines[0], b'{"text": "no numbers"}'])
    with pytest.raises(InputError, match="some lines hold no `input_ids` and `logits`"):
        read_golden(raw, "x")


def test_other_token_ids_are_an_error(golden, encoder):
    raw = write_golden(golden).replace(b'"bread', b'"other')
    with pytest.raises(BundleError, match="1 of 2 golden texts tokenize to other ids"):
        encode_golden(read_golden(raw, "x"), encoder)


def test_a_text_that_cannot_be_read_is_named(encoder):
    with pytest.raises(InputError, match="golden text 0: the text is empty"):
        encode_golden(GoldenSet(None, (GoldenText({"text": " "}, None),)), encoder)


def test_digests_see_through_the_form(encoder):
    as_text = GoldenSet(None, (GoldenText({"text": "<|user|>hi"}, None),))
    as_messages = GoldenSet(None, (GoldenText({"messages": [{"role": "user", "content": "hi"}]}, None),))
    assert text_digests(as_text, CONTRACT) == text_digests(as_messages, CONTRACT)
