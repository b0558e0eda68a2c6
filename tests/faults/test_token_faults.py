"""Token ids that have changed, or that transformers would not make."""

import json
import random
import shutil

import numpy as np
import pytest

from samescore import export_bundle, verify
from samescore.calibrate.golden import GoldenSet, GoldenText, encode_golden
from samescore.calibrate.token_faults import edit_between, name_difference
from samescore.calibrate.tokenization import check_tokenization, varied
from samescore.export.checkpoint import Checkpoint
from samescore.runtime import BundleError, GateError
from samescore.runtime.contract import TextContract
from samescore.runtime.tokenizer import TextEncoder

from ..conftest import WORDS, train_byte_tokenizer, train_tokenizer

PLAIN = TextContract("text", 64, "right", "")
INSTRUCTION = TextContract(
    "instruction", 200, "article", "", template="here is a recipe\n\n{text}\n\nThe correct answer is: class "
)
PAIR = TextContract("prompt-response", 64, "right", "", template="PROMPT: {prompt}\nRESPONSE: {response}\n")
TEXTS = [" ".join(WORDS.split()[i : i + 4 + i]) for i in range(12)]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tokenizer.json as a dict: `<s> … </s>` (unigram), and byte-level BPE with and without a BOS."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(folder / "unigram")
    train_byte_tokenizer(folder / "begin", begin=True, extra=INSTRUCTION.template)
    return {name: json.loads((folder / name / "tokenizer.json").read_text()) for name in ("unigram", "begin")}


def encoder(document, contract=PLAIN):
    return TextEncoder(json.dumps(document).encode(), contract)


def with_single(document, *parts):
    """The tokenizer with another template of special tokens around a text."""
    changed = json.loads(json.dumps(document))
    known = {token["content"]: token["id"] for token in changed["added_tokens"]}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if p == "$A" else {"SpecialToken": {"id": p, "type_id": 0}}
        for p in parts
    ]
    special = {p: {"id": p, "ids": [known[p]], "tokens": [p]} for p in parts if p != "$A"}
    changed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": changed["post_processor"]["pair"],
        "special_tokens": {**changed["post_processor"]["special_tokens"], **special},
    }
    return changed


def golden(maker, records):
    texts = GoldenSet(None, tuple(GoldenText(record, None) for record in records))
    return encode_golden(texts, maker)


def said_by_golden(before, after, records):
    with pytest.raises(BundleError) as error:
        encode_golden(golden(before, records), after)
    return str(error.value).partition("diagnosis: ")[2]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["</s>", "$A", "</s>"], "the first token is 2 '</s>' where it should be 0 '<s>' (BOS), in 12 of 12 texts"),
        (["$A", "</s>"], "no BOS: the first token 0 '<s>' is missing, in 12 of 12 texts"),
        (
            ["<s>", "<s>", "$A", "</s>"],
            "an extra token 0 '<s>' at the beginning (BOS twice, or where there should be none)",
        ),
        (["<s>", "$A", "</s>", "</s>"], "an extra token 2 '</s>' at the end, in 12 of 12 texts"),
        (["<s>", "$A"], "the last token 2 '</s>' is missing (EOS, or the prompt is cut), in 12 of 12 texts"),
        (["<s>", "$A", "<mask>"], "the last token is 4 '<mask>' where it should be 2 '</s>' (EOS), in 12 of 12 texts"),
    ],
)
def test_special_tokens(tokenizers, parts, said):
    before = encoder(tokenizers["unigram"])
    after = encoder(with_single(tokenizers["unigram"], *parts))
    assert said_by_golden(before, after, [{"text": text} for text in TEXTS]).startswith(said)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("here is a recipe\n\n{text}\n\n", "the prompt is cut: its last"),
        ("{text}\n\nThe correct answer is: class ", "the prompt is cut: its first"),
        (
            "here is a clear recipe\n\n{text}\n\nThe correct answer is: class ",
            "the prompt has changed: nothing has become ' clear' (1 tokens), in 12 of 12 texts",
        ),
    ],
)
def test_a_changed_prompt(tokenizers, template, said):
    from dataclasses import replace

    before = encoder(tokenizers["begin"], INSTRUCTION)
    after = encoder(tokenizers["begin"], replace(INSTRUCTION, template=template))
    message = said_by_golden(before, after, [{"text": text} for text in TEXTS])
    assert message.startswith(said)
    if "last" in said:
        assert "The correct answer is: class " in message
    if "first" in said:
        assert "'here is a recipe" in message


def test_a_pair_without_its_label(tokenizers):
    from dataclasses import replace

    before = encoder(tokenizers["begin"], PAIR)
    after = encoder(tokenizers["begin"], replace(PAIR, template="PROMPT: {prompt}\n{response}\n"))
    records = [{"prompt": text, "response": f"7 {text[::-1]}"} for text in TEXTS[:6]]
    assert said_by_golden(before, after, records).startswith("the prompt has changed: 'RESPONSE:")


def test_another_normalizer(tokenizers):
    changed = json.loads(json.dumps(tokenizers["unigram"]))
    changed["normalizer"] = {"type": "Lowercase"}
    records = [{"text": text.title()} for text in TEXTS]
    said = said_by_golden(encoder(tokenizers["unigram"]), encoder(changed), records)
    assert said.startswith("the texts are split or numbered in another way: the first differs from token 1 on")


def test_edits_are_the_smallest():
    chance = random.Random(3)
    for _ in range(300):
        before = np.array([chance.randrange(4) for _ in range(chance.randint(1, 9))])
        after = np.array([chance.randrange(4) for _ in range(chance.randint(1, 9))])
        edit = edit_between(before, after)
        front, back = before[: edit.start], before[len(before) - edit.end :]
        assert np.array_equal(np.concatenate([front, edit.removed, back]), before)
        assert np.array_equal(np.concatenate([front, edit.added, back]), after)


def test_one_text_is_no_pattern():
    """A cut prompt is told from many texts; of one text only the place is known."""
    said = name_difference([np.array([1, 2, 3, 4])], [np.array([4])], str)
    assert said.startswith("the texts are split or numbered in another way: the first differs from token 0 on")


def test_mixtures_are_distinct_and_the_same_each_time():
    strings = list(varied(TEXTS, 3000, 1))
    assert len(set(strings)) == len(strings) == 3000
    assert strings == list(varied(TEXTS, 3000, 1)) != list(varied(TEXTS, 3000, 2))
    assert all(string.encode() for string in strings) and max(map(len, strings[len(TEXTS) :])) <= 200
    assert next(iter(varied(["a"], 3, 0))) == "a"


@pytest.mark.torch
@pytest.mark.parametrize("contract", [PLAIN, INSTRUCTION, PAIR])
@pytest.mark.parametrize("name", ["bert_checkpoint", "language_model"])
def test_our_ids_are_transformers(request, name, contract):
    checkpoint = Checkpoint(request.getfixturevalue(name))
    found = check_tokenization(checkpoint, TextEncoder(checkpoint.tokenizer_bytes(), contract), TEXTS, 1000)
    assert found.different == 0 and found.first_difference is None
    assert found.texts > 700 and found.upper95 == pytest.approx(1 - 0.05 ** (1 / found.texts))


@pytest.mark.torch
def test_a_wrong_bos_that_the_golden_set_shares(bert_checkpoint, tokenizers):
    """Only transformers knows better: golden ids and variants of the bundle agree with each other."""
    wrong = with_single(json.loads((bert_checkpoint / "tokenizer.json").read_text()), "</s>", "$A", "</s>")
    found = check_tokenization(Checkpoint(bert_checkpoint), encoder(wrong), TEXTS, 500)
    assert found.different == found.texts > 300 and 0.99 < found.upper95 <= 1
    assert found.first_difference.startswith("the first token is 2 '</s>' where it should be 0 '<s>' (BOS)")
    assert repr(TEXTS[0]) in found.first_difference and "ours [2, " in found.first_difference
    assert "transformers' [0, " in found.first_difference


@pytest.mark.torch
def test_export_and_verify_refuse_other_ids(bert_checkpoint, texts_files, tmp_path, monkeypatch):
    wrong = json.dumps(with_single(json.loads((bert_checkpoint / "tokenizer.json").read_text()), "$A", "</s>")).encode()
    monkeypatch.setattr(Checkpoint, "tokenizer_bytes", lambda self: wrong)
    settings = {"profile": "refusal", "golden": texts_files[0], "variants": ["cpu-fp32"]}
    with pytest.raises(
        GateError, match=r"other token ids than transformers.*diagnosis: no BOS: the first token 0 '<s>'"
    ):
        export_bundle(bert_checkpoint, tmp_path / "b", **settings)
    assert list(tmp_path.iterdir()) == []
    drifting = export_bundle(bert_checkpoint, tmp_path / "drifting", allow_drift=True, **settings)
    assert drifting.certificate.tokenization.different > 100 and "no BOS" in drifting.warning
    result = export_bundle(bert_checkpoint, tmp_path / "b", tokenization_texts=0, **settings)
    assert result.certificate.tokenization is None
    monkeypatch.undo()
    assert verify(tmp_path / "b").passed
    seen = verify(tmp_path / "b", reference=bert_checkpoint)
    assert not seen.passed and all(parity.verdict.passed for parity in seen.certificate.variants.values())
    assert "no BOS" in seen.certificate.tokenization.first_difference


@pytest.mark.torch
def test_control_tokens_without_a_role_are_left_out(bert_checkpoint, tmp_path):
    """As Qwen's <|image_pad|>: special, but neither eos nor pad nor anything that `all_special_ids` names."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(bert_checkpoint, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    token = {**document["added_tokens"][0], "id": max(t["id"] for t in document["added_tokens"]) + 500}
    document["added_tokens"].append({**token, "content": "<|image_pad|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    checkpoint = Checkpoint(folder)
    texts = [*TEXTS, *(f"{text} <|image_pad|> {text}" for text in TEXTS)]
    found = check_tokenization(checkpoint, encoder(document), texts, 300)
    assert found.different == 0 and found.texts >= len(TEXTS)
