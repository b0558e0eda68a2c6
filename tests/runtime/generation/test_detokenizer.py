"""Pieces of text: together they are what decoding everything at once gives, and none ends inside a character."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from samescore.runtime.generation.detokenizer import DetokenizerFactory, StopFilter

from ...conftest import WORDS, train_tokenizer

ASSETS = Path(__file__).parents[3] / ".cache" / "assets"
TEXTS = [
    "你好，世界 🌍👩‍👩‍👧 é",
    "naïve café — “quotes”",
    "नमस्ते दुनिया",
    "台灣是什麼?",
    "a\u0301\u0323 \U0001f1e9\U0001f1ea\n\n  x",
    "",
]


def byte_level():
    """A byte-level BPE that knows hardly any word, so that characters fall into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    return tokenizer


def byte_fallback():
    """As SentencePiece models with byte fallback: `▁` for spaces, `<0xE4>` for bytes, one space stripped in front."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["▁", "▁the", "a", "b", "▁b", "é", "你", "."]:
        vocabulary[piece] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "unigram"
    train_tokenizer(folder)
    found = {"byte-level": byte_level(), "byte fallback": byte_fallback()}
    found["unigram"] = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return found


def pieces_of(tokenizer, ids, factory=None):
    detokenizer = (factory or DetokenizerFactory(tokenizer))()
    return [*(detokenizer.feed(token) for token in ids), detokenizer.flush()]


def check(tokenizer, ids, factory=None):
    assert "".join(pieces_of(tokenizer, ids, factory)) == tokenizer.decode(ids, skip_special_tokens=True)


KINDS = ["byte-level", "byte fallback", "unigram"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_give_the_text_of_them_all(tokenizers, kind, data):
    """Random ids are mostly invalid UTF-8, which is the hard part."""
    tokenizer = tokenizers[kind]
    check(tokenizer, data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_texts(tokenizers, kind, text):
    check(tokenizers[kind], tokenizers[kind].encode(text, add_special_tokens=False).ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_piece_of_a_real_text_ends_inside_a_character(text):
    tokenizer = _BYTE_LEVEL
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


_BYTE_LEVEL = byte_level()


def test_special_tokens_have_no_text_and_keep_a_character_together(tokenizers):
    tokenizer = tokenizers["byte-level"]
    first, *rest = tokenizer.encode("🌍").ids
    end = tokenizer.token_to_id("<|end|>")
    assert len(rest) == 3
    assert pieces_of(tokenizer, [first, end, *rest])[-2:] == ["🌍", ""]


def test_an_unfinished_character_comes_at_the_end(tokenizers):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("a🌍").ids[:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen3_5-tokenizer", "llama3-tokenizer", "smollm2-base"])
def test_real_tokenizers(name):
    if not (ASSETS / name).exists():
        pytest.skip(f"{name} is not built: run `make assets`")
    tokenizer = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    factory = DetokenizerFactory(tokenizer)

    @settings(max_examples=400, deadline=None)
    @given(ids=st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    def any_tokens(ids):
        check(tokenizer, ids, factory)

    @settings(max_examples=300, deadline=None)
    @given(text=st.text(max_size=40))
    def any_text(text):
        check(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids, factory)

    any_tokens()
    any_text()
    for text in TEXTS:
        check(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids, factory)


def through(stop, pieces):
    chosen = StopFilter(stop)
    return "".join([*map(chosen.feed, pieces), chosen.flush()]), chosen.stopped


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet="abé你", max_size=20),
    stop=st.lists(st.text(alphabet="abé你", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_stop_strings_wherever_the_pieces_are_cut(text, stop, cuts):
    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    found = [text.find(s) for s in stop if s in text]
    # The first to be complete ends the answer: text before it may hold the beginning of a longer one.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    result, stopped = through(stop, list(text))
    if not found:
        assert (result, stopped) == (text, False)
    else:
        end = min(ends)
        assert stopped
        assert result == text[: min(text.find(s) for s in stop if s in text[:end])]
    whole, stopped_too = through(stop, pieces)
    assert stopped_too == stopped
    assert not any(s in whole for s in stop)


def test_what_may_become_a_stop_string_waits():
    chosen = StopFilter(("\n\nUser:",))
    assert [chosen.feed(piece) for piece in ["Hi", "!\n", "\nUs", "age", "\n\nUser", ": x"]] == [
        "Hi",
        "!",
        "",
        "\n\nUsage",
        "",
        "",
    ]
    assert chosen.stopped
    assert chosen.flush() == ""


def test_a_stop_string_of_a_character_that_is_several_tokens(tokenizers):
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("ab🌍c").ids
    assert through(["🌍"], pieces_of(tokenizer, ids)) == ("ab", True)
