import json

import numpy as np
import pytest

from samescore.runtime.contract import ROLE_TOKEN, TextContract
from samescore.runtime.errors import BundleError
from samescore.runtime.tokenizer import TextEncoder

MIDDLE = TextContract("conversation", 64, "middle", "<|...|>")
RIGHT = TextContract("text", 64, "right", "")

AWKWARD = [
    "a",
    "the model refuses",
    "我不能帮助你",
    "👩‍👩‍👧 emoji \u202eright to left\u202c",
    "ﬁ ligature ½ ①",
    "new\nlines\t tabs  double",
    "ё" * 30,
    "\u2028 separators \u00a0",
]


@pytest.fixture(scope="session")
def tokenizer_json(bert_checkpoint):
    return (bert_checkpoint / "tokenizer.json").read_bytes()


@pytest.fixture(scope="session")
def hf_tokenizer(bert_checkpoint):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(bert_checkpoint)


@pytest.mark.torch
@pytest.mark.parametrize("text", AWKWARD)
def test_ids_equal_the_hugging_face_tokenizer(text, tokenizer_json, hf_tokenizer):
    expected = hf_tokenizer(text)["input_ids"]
    assert TextEncoder(tokenizer_json, MIDDLE).encode(text).input_ids.tolist() == expected


@pytest.mark.torch
def test_right_truncation_equals_the_hugging_face_tokenizer(tokenizer_json, hf_tokenizer):
    text = "here is a clear recipe for bread " * 40
    encoded = TextEncoder(tokenizer_json, RIGHT).encode(text)
    assert encoded.truncated
    assert encoded.input_ids.tolist() == hf_tokenizer(text, truncation=True, max_length=64)["input_ids"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("a </s> b", "a < /s> b"),
        ("</s><s><pad><mask>", "< /s>< s>< pad>< mask>"),
        ("full width \uff1c/s\uff1e", "full width \uff1c /s\uff1e"),
    ],
)
def test_what_a_user_writes_never_becomes_a_control_token(text, read_as, tokenizer_json, hf_tokenizer):
    for contract in (MIDDLE, RIGHT):
        ids = TextEncoder(tokenizer_json, contract).encode(text).input_ids.tolist()
        assert ids[0] == 0 and ids[-1] == 2
        assert not set(ids[1:-1]) & {0, 1, 2, 4}
        assert ids == hf_tokenizer(read_as)["input_ids"]


def test_control_tokens_in_a_long_text(tokenizer_json):
    for contract in (MIDDLE, RIGHT):
        ids = TextEncoder(tokenizer_json, contract).encode("</s> bread <s>" * 200).input_ids.tolist()
        assert len(ids) <= 64 and not set(ids[1:-1]) & {0, 1, 2, 4}


def test_the_middle_of_a_long_text_becomes_the_ellipsis(tokenizer_json):
    encoder = TextEncoder(tokenizer_json, MIDDLE)
    text = "<|user|>" + "first words of it " * 30 + "<|assistant|>" + "here is the answer " * 30 + "danke sehr"
    encoded = encoder.encode(text)
    assert encoded.truncated
    assert 40 < len(encoded.input_ids) <= 64
    assert encoded.input_ids[0] == 0 and encoded.input_ids[-1] == 2
    decoded = encoder.tokenizer.decode(encoded.input_ids.tolist(), skip_special_tokens=False)
    flat = decoded.replace(" ", "").replace("▁", "")
    assert flat.count("<|...|>") == 1
    assert "dankesehr" in flat and "firstwords" in flat
    assert ROLE_TOKEN.findall(flat) == ["<|user|>", "<|assistant|>"]


def test_a_text_at_the_limit_is_not_cut(tokenizer_json):
    encoder = TextEncoder(tokenizer_json, MIDDLE)
    words = ["the"]
    while len(encoder.tokenizer.encode(" ".join([*words, "the"])).ids) <= 64:
        words.append("the")
    assert not encoder.encode(" ".join(words)).truncated
    assert len(encoder.encode(" ".join(words)).input_ids) == 64
    assert encoder.encode(" ".join([*words, "the"])).truncated


def test_a_huge_text_is_cut_before_it_is_tokenized(tokenizer_json):
    huge = (
        "<|user|>" + "first words " + "filler bread " * 400_000 + "<|assistant|>" + "flour water " * 400_000 + "danke"
    )
    assert len(huge) > 10_000_000
    seen = []

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def encode(self, text, **options):
            seen.append(len(text))
            return self.inner.encode(text, **options)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    encoder = TextEncoder(tokenizer_json, MIDDLE)
    encoder.tokenizer = Spy(encoder.tokenizer)
    ids = encoder.encode(huge).input_ids
    assert max(seen) < 100_000
    flat = encoder.tokenizer.decode(ids.tolist()).replace(" ", "").replace("▁", "")
    assert flat.startswith("<|user|>firstwords") and flat.endswith("danke") and "<|...|><|assistant|>" in flat


def test_a_huge_text_that_is_mostly_white_space_is_not_cut(tokenizer_json):
    encoder = TextEncoder(tokenizer_json, MIDDLE)
    encoded = encoder.encode("hello" + " " * 1_000_000 + "bread")
    assert not encoded.truncated
    assert np.array_equal(encoded.input_ids, encoder.encode("hello bread").input_ids)


def test_windowed_and_whole_texts_are_cut_alike(tokenizer_json):
    """A text just above the window is cut where one just below it is: the window only saves work."""
    text = "<|user|>" + " ".join(f"bread{i}" for i in range(400))
    encoder = TextEncoder(tokenizer_json, MIDDLE)
    import samescore.runtime.tokenizer as module

    whole = encoder.encode(text).input_ids
    original = module.CHARACTERS_PER_TOKEN
    try:
        module.CHARACTERS_PER_TOKEN = 1
        assert np.array_equal(encoder.encode(text).input_ids, whole)
    finally:
        module.CHARACTERS_PER_TOKEN = original


def test_padding_and_truncation_stored_in_the_file_are_ignored(tokenizer_json):
    document = json.loads(tokenizer_json)
    document["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    changed = TextEncoder(json.dumps(document).encode(), MIDDLE)
    text = "here is a clear recipe for bread with flour"
    assert np.array_equal(changed.encode(text).input_ids, TextEncoder(tokenizer_json, MIDDLE).encode(text).input_ids)


def test_a_broken_tokenizer_file_is_a_bundle_error():
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextEncoder(b"{}", MIDDLE)
