"""The instruction contract: an article inside a fixed prompt, cut so that the prompt always fits."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samescore.export.profiles import LEANING_8192
from samescore.runtime.contract import TextContract, render, text_of_record
from samescore.runtime.errors import BundleError, InputError, UsageError
from samescore.runtime.tokenizer import TextEncoder

from ..conftest import train_byte_tokenizer

PROMPT = (
    "Read the article with flour and water and say\nhow it leans.\n\nArticle:\n{text}\n\nThe correct answer is: class "
)
CONTRACT = TextContract("instruction", 160, "article", "", template=PROMPT, model_limit=2048)

AWKWARD = [
    "a",
    "{text}",
    "{text} and {text} {0} {} {article} %s \\n",
    "Article:\nThe correct answer is: class 4",
    "The correct answer is: class ",
    "我不能帮助你 👩‍👩‍👧 \u202eright to left\u202c",
    "e\u0301 composed or not, ﬁ ½",
    "\u0301 begins with a mark",
    "line\r\nline\n\n\nline\ttab  double \u00a0 \u2028 x",
    "12345 3.14 0",
    "(in brackets) - and dashes --",
    "'s quoted",
]


@pytest.fixture(scope="module", params=[True, False], ids=["begin", "bare"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_byte_tokenizer(folder, begin=request.param, extra=PROMPT)
    return folder


@pytest.fixture(scope="module")
def tokenizer_json(folder):
    return (folder / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def encoder(tokenizer_json):
    return TextEncoder(tokenizer_json, CONTRACT)


@pytest.fixture(scope="module")
def hf_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def whole(article):
    before, _, after = PROMPT.partition("{text}")
    return before + article + after


@pytest.mark.torch
@pytest.mark.parametrize("article", AWKWARD)
def test_ids_equal_the_hugging_face_tokenizer(article, encoder, hf_tokenizer):
    encoded = encoder.encode(article)
    assert encoded.input_ids.tolist() == hf_tokenizer(whole(article.strip()))["input_ids"] and not encoded.truncated


@pytest.mark.torch
def test_the_card_s_prompt_on_the_card_s_way(folder, hf_tokenizer):
    """`.format(article=article_text.strip())`, as the model card does it."""
    card = LEANING_8192.template.replace("{text}", "{article}")
    encoder = TextEncoder((folder / "tokenizer.json").read_bytes(), LEANING_8192)
    for article in ("  bread and salt\n", "\u3000我不能 {curly} \n\n"):
        expected = hf_tokenizer(card.format(article=article.strip()))["input_ids"]
        assert encoder.encode(article).input_ids.tolist() == expected


def test_the_article_is_stripped_and_filled_in_literally():
    assert render("  \n{text} x \t", CONTRACT) == "{text} x"
    assert text_of_record({"text": " x ", "id": 3}, CONTRACT) == "x"
    for blank in ("", " \n\t\u3000"):
        with pytest.raises(InputError, match="the text is empty"):
            render(blank, CONTRACT)
    with pytest.raises(InputError, match="expected a string, got list"):
        render(["x"], CONTRACT)
    with pytest.raises(InputError, match="needs exactly one of `text`; this one has: prompt"):
        text_of_record({"prompt": "x"}, CONTRACT)


def test_only_the_article_is_cut(encoder, tokenizer_json):
    """The prompt and the answer's opening stay whole; the article keeps its first tokens."""
    article = "here is a clear recipe for bread with flour water salt " * 40
    encoded = encoder.encode(article)
    assert encoded.truncated and 158 <= len(encoded.input_ids) <= 160
    text = encoder.tokenizer.decode(encoded.input_ids.tolist())
    before, _, after = PROMPT.partition("{text}")
    assert text.startswith(before) and text.endswith(after)
    kept = text.removeprefix(before).removesuffix(after)
    assert article.startswith(kept) and len(kept) > 100
    raised = TextEncoder(tokenizer_json, CONTRACT.with_max_tokens(1000)).encode(article)
    assert not raised.truncated and encoder.tokenizer.decode(raised.input_ids.tolist()) == whole(article.strip())


def test_an_article_at_the_limit_is_not_cut(encoder):
    words = ["1"]
    while len(encoder._ids(whole("".join([*words, "1"])))) <= 160:
        words.append("1")
    at_limit = encoder.encode("".join(words))
    assert len(at_limit.input_ids) == 160 and not at_limit.truncated
    over = encoder.encode("".join([*words, "1"]))
    assert len(over.input_ids) == 160 and over.truncated
    np.testing.assert_array_equal(over.input_ids, at_limit.input_ids)  # the first tokens are the same


@settings(deadline=None, max_examples=60)
@given(
    st.text(
        alphabet=st.one_of(st.sampled_from("ab \n\t{}<|>#'1我é\u0301👩"), st.characters(exclude_categories=("Cs",))),
        min_size=1,
    ).map(lambda text: "x" + text * 40),
    st.integers(90, 200),
)
def test_whatever_the_article_the_prompt_fits(folder, article, limit):
    encoder = TextEncoder((folder / "tokenizer.json").read_bytes(), CONTRACT.with_max_tokens(limit))
    encoded = encoder.encode(article)
    assert len(encoded.input_ids) <= limit
    np.testing.assert_array_equal(encoded.input_ids, encoder.encode(article).input_ids)
    text = encoder.tokenizer.decode(encoded.input_ids.tolist())
    before, _, after = PROMPT.partition("{text}")
    assert text.startswith(before) and text.endswith(after)
    assert encoded.truncated == (len(encoder._ids(whole(article.strip()))) > limit)


def test_control_tokens_in_an_article_are_text(encoder, hf_tokenizer):
    ids = encoder.encode("x <|end|> y<|begin|>").input_ids
    assert not set(ids[1:].tolist()) & {0, 1}
    assert encoder.tokenizer.decode(ids.tolist()).startswith(whole("x <|end|> y<|begin|>")[:-1])
    expected = hf_tokenizer(whole("x <|end|> y<|begin|>"), split_special_tokens=True)["input_ids"]
    assert ids.tolist() == expected


def test_a_huge_article_is_cut_before_it_is_tokenized(tokenizer_json):
    encoder, seen = TextEncoder(tokenizer_json, CONTRACT), []

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def encode(self, text, **options):
            seen.append(len(text))
            return self.inner.encode(text, **options)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    encoder.tokenizer = Spy(encoder.tokenizer)
    assert len(encoder.encode("bread and salt " * 500_000).input_ids) <= 160
    assert max(seen) < 20_000


def test_the_prefix_is_what_every_text_begins_with(encoder):
    """Longer than a call is worth, never into the article, and the same for articles that begin in any way."""
    prefix = encoder.prefix_ids
    before = PROMPT.partition("{text}")[0]
    assert 16 <= len(prefix) <= len(encoder._ids(before))
    assert before.startswith(encoder.tokenizer.decode(prefix.tolist()))
    for article in [*AWKWARD, "bread " * 500, "~x", "\\", "»quoted«", "٣", "-1", "İ", "\ufeffx"]:
        np.testing.assert_array_equal(encoder.encode(article).input_ids[: len(prefix)], prefix)


def test_a_border_that_merges_is_not_in_the_prefix(tokenizer_json):
    """Before a word, ` ` belongs to the word: the last token of the prompt alone is in no text."""
    template = PROMPT.replace("Article:\n", "Article: ")
    encoder = TextEncoder(tokenizer_json, TextContract("instruction", 160, "article", "", template=template))
    alone = encoder._ids(template.partition("{text}")[0])
    assert encoder.prefix_ids.tolist() == alone[: len(encoder.prefix_ids)] and len(encoder.prefix_ids) < len(alone)
    for article in AWKWARD:
        ids = encoder.encode(article).input_ids
        np.testing.assert_array_equal(ids[: len(encoder.prefix_ids)], encoder.prefix_ids)


def test_other_contracts_have_no_prefix(tokenizer_json):
    for kind, template in (("text", ""), ("prompt-response", PROMPT + "{prompt}{response}")):
        contract = TextContract(kind, 160, "right", "", template=template)
        assert TextEncoder(tokenizer_json, contract).prefix_ids.shape == (0,)


def test_a_limit_without_room_for_the_prompt(tokenizer_json):
    with pytest.raises(
        UsageError, match=r"max_tokens 30 leaves no room for an article: the prompt alone is \d+ tokens"
    ):
        TextEncoder(tokenizer_json, CONTRACT.with_max_tokens(30))
    needed = len(TextEncoder(tokenizer_json, CONTRACT)._ids(whole(""))) + 8
    with pytest.raises(UsageError, match=f"name at least {needed}"):
        TextEncoder(tokenizer_json, CONTRACT.with_max_tokens(needed - 1))
    encoded = TextEncoder(tokenizer_json, CONTRACT.with_max_tokens(needed)).encode("bread " * 100)
    assert encoded.truncated and needed - 4 <= len(encoded.input_ids) <= needed


def test_a_template_with_control_tokens_is_refused(tokenizer_json):
    contract = TextContract("instruction", 160, "article", "", template="<|begin|>user\n{text}")
    with pytest.raises(BundleError, match=r"template holds the control token '<\|begin\|>'"):
        TextEncoder(tokenizer_json, contract)


def test_normalizers_other_than_byte_level_count_in_the_original(tokenizer_json):
    """NFC shortens a text; the cut is made in the text as it was handed in."""
    article = "e\u0301" * 500
    encoder = TextEncoder(tokenizer_json, CONTRACT)
    encoded = encoder.encode(article)
    assert encoded.truncated and len(encoded.input_ids) > 150
    assert "é" * 10 in encoder.tokenizer.decode(encoded.input_ids.tolist())
    assert json.loads(tokenizer_json)["normalizer"] == {"type": "NFC"}
