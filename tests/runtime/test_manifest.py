import contextlib
import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samescore.runtime.contract import TextContract
from samescore.runtime.errors import BundleError, UsageError
from samescore.runtime.manifest import (
    BaseSource,
    FileEntry,
    Generation,
    LabelToken,
    Manifest,
    Source,
    Variant,
    parse_manifest,
)

MANIFEST = Manifest(
    schema_version=1,
    samescore_version="0.1.0",
    profile="refusal",
    architecture="BertForSequenceClassification",
    source=Source("hub", "owner/name", "a" * 40, "b" * 64, None, ()),
    contract=TextContract("conversation", 512, "middle", "<|...|>"),
    labels=("Non-refusal", "Refusal"),
    values=None,
    label_tokens=None,
    activation="softmax",
    variants=(
        Variant(
            "cpu-int8",
            "cpu",
            "int8",
            "cpu-int8/model.onnx",
            ("cpu-int8/model.onnx.data",),
            ("input_ids",),
            21,
            None,
            {},
        ),
    ),
    files={
        "cpu-int8/model.onnx": FileEntry(10, "c" * 64),
        "cpu-int8/model.onnx.data": FileEntry(20, "d" * 64),
        "tokenizer.json": FileEntry(5, "e" * 64),
    },
)


def document():
    return json.loads(MANIFEST.to_json())


def parse(doc):
    return parse_manifest(json.dumps(doc).encode())


def test_round_trip():
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST


def test_round_trip_of_an_adapter():
    base = BaseSource("hub", "owner/base", "f" * 40, "e" * 64)
    source = Source("folder", "run/checkpoint-2", None, "b" * 64, base, ("a note",))
    manifest = dataclasses.replace(MANIFEST, source=source)
    assert parse_manifest(manifest.to_json()) == manifest


@pytest.mark.parametrize(
    "template", ["", "{prompt}", "{response} {prompt}", "{prompt} {prompt} {response}", "{prompt}{response}{response}"]
)
def test_a_template_takes_one_prompt_and_one_response(template):
    doc = document()
    doc["contract"].update(kind="prompt-response", template="{prompt} -> {response}")
    assert parse(doc).contract.template == "{prompt} -> {response}"
    doc["contract"]["template"] = template
    with pytest.raises(BundleError, match=r"contract\.template .* does not hold \{prompt\} and then \{response\}"):
        parse(doc)


@pytest.mark.parametrize("template", ["", "no place", "{text} {text}", "{ text }"])
def test_an_instruction_s_template_takes_one_article(template):
    doc = document()
    doc["contract"].update(kind="instruction", truncation="article", template="{text} {prompt} {text", ellipsis="")
    assert parse(doc).contract.kind == "instruction"
    doc["contract"]["template"] = template
    with pytest.raises(BundleError, match=r"contract\.template .* does not hold \{text\}, once$"):
        parse(doc)


@pytest.mark.parametrize(("kind", "truncation"), [("instruction", "right"), ("text", "article")])
def test_an_instruction_cuts_its_article_and_nothing_else_does(kind, truncation):
    doc = document()
    doc["contract"].update(kind=kind, truncation=truncation, template="{text}")
    with pytest.raises(BundleError, match="'article' and 'instruction' go together"):
        parse(doc)


def test_round_trip_of_label_tokens():
    tokens = (LabelToken(15, "0"), LabelToken(16, "1"))
    manifest = dataclasses.replace(MANIFEST, labels=("0", "1"), values=(0.0, 1.5), label_tokens=tokens)
    assert parse_manifest(manifest.to_json()) == manifest


def test_variant_by_name():
    assert MANIFEST.variant("cpu-int8").precision == "int8"
    with pytest.raises(UsageError, match=r"no variant 'cpu-int9'; it has: cpu-int8. Did you mean 'cpu-int8'"):
        MANIFEST.variant("cpu-int9")


def set_at(doc, path, value):
    *outer, last = path
    for key in outer:
        doc = doc[key]
    doc[last] = value


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["schema_version"], 2, "schema version 2; this samescore reads 1"),
        (["schema_version"], True, "schema version True"),
        (["labels"], "ab", "labels: expected a list, got str"),
        (["labels"], ["a", "a"], "distinct"),
        (["labels"], [], "at least one"),
        (["values"], [0.0], "values has 1 entries for 2 labels"),
        (["values"], [0.0, float("nan")], "values must be finite"),
        (["values"], ["0", "1"], r"values\[0\]: expected float, got str"),
        (["label_tokens"], [{"id": 1, "text": "a"}], "label_tokens has 1 entries for 2 labels"),
        (["label_tokens"], [{"id": 1, "text": "a"}] * 2, r"label_tokens must have distinct ids, got \[1, 1\]"),
        (["label_tokens"], [{"id": -1, "text": "a"}, {"id": 1, "text": "b"}], "distinct ids"),
        (["label_tokens"], [{"id": 1}], r"label_tokens\[0\]: missing 'text'"),
        (["activation"], "relu", "'relu' is none of 'softmax', 'sigmoid'"),
        (["source", "kind"], "ftp", "source.kind"),
        (["source", "revision"], 7, r"source\.revision: expected str, got int"),
        (["source", "base"], {"kind": "hub"}, r"source\.base: missing 'name', 'revision', 'sha256'"),
        (["source", "notes"], "a note", r"source\.notes: expected a list"),
        (["contract", "max_tokens"], "512", r"contract\.max_tokens: expected int"),
        (["contract", "max_tokens"], True, "expected int, got bool"),
        (["variants", 0, "target"], "tpu", r"variants\[0\]\.target"),
        (["variants"], [], "at least one"),
        (["variants", 0, "model"], "elsewhere.onnx", "which `files` does not list"),
        (["extra"], 1, "unknown key 'extra'"),
        (["label"], 1, "unknown key 'label'. Did you mean 'labels'"),
        (["files", "../evil"], {"size": 1, "sha256": "f" * 64}, "not a plain relative path"),
        (["files", "/etc/passwd"], {"size": 1, "sha256": "f" * 64}, "not a plain relative path"),
        (["files", "a\\b"], {"size": 1, "sha256": "f" * 64}, "not a plain relative path"),
        (["files", ".hidden"], {"size": 1, "sha256": "f" * 64}, "not a plain relative path"),
        (["files", "tokenizer.json", "sha256"], "xyz", "no valid size and SHA-256"),
        (["files", "tokenizer.json", "size"], -1, "no valid size and SHA-256"),
        (["files", "tokenizer.json"], None, "expected an object"),
    ],
)
def test_what_is_wrong_is_named(path, value, said):
    doc = document()
    set_at(doc, path, value)
    with pytest.raises(BundleError, match=said):
        parse(doc)


@pytest.mark.parametrize(
    "key", [field.name for field in dataclasses.fields(Manifest) if field.name not in ("schema_version", "generation")]
)
def test_missing_keys_are_named(key):
    doc = document()
    del doc[key]
    with pytest.raises(BundleError, match=f"missing '{key}'"):
        parse(doc)


def test_a_bundle_without_the_key_is_a_classifier():
    doc = document()
    assert doc.pop("generation") is None
    assert parse(doc) == MANIFEST


GENERATION = Generation(
    context=64,
    eos=(2, 3),
    bos=None,
    pad=0,
    vocabulary=10,
    chat_template="chat_template.jinja",
    template_tokens={"eos_token": "</s>"},
    defaults={"do_sample": 1.0, "temperature": 0.7, "top_k": 20.0},
)
GENERATOR = dataclasses.replace(
    MANIFEST,
    labels=(),
    generation=GENERATION,
    files={**MANIFEST.files, "chat_template.jinja": FileEntry(7, "f" * 64)},
)


def test_round_trip_of_a_generator():
    assert parse_manifest(GENERATOR.to_json()) == GENERATOR
    plain = dataclasses.replace(GENERATION, chat_template=None, template_tokens={}, defaults={})
    bare = dataclasses.replace(GENERATOR, generation=plain)
    assert parse_manifest(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["labels"], ["a"], r"a model that generates text has no labels, got \['a'\]"),
        (["label_tokens"], [], "has no labels"),
        (["generation", "context"], 0, "context and vocabulary must be at least 1, got 0 and 10"),
        (["generation", "context"], "64", r"generation\.context: expected int, got str"),
        (["generation", "eos"], [], "eos must be distinct tokens and at least one"),
        (["generation", "eos"], [2, 2], "distinct"),
        (["generation", "eos"], 2, r"generation\.eos: expected a list, got int"),
        (["generation", "eos"], [10], r"tokens \[10\] are outside the vocabulary of 10"),
        (["generation", "bos"], -1, r"tokens \[-1\] are outside"),
        (["generation", "pad"], True, r"generation\.pad: expected int, got bool"),
        (["generation", "chat_template"], "../x", "which `files` does not list"),
        (["generation", "template_tokens"], {"eos_token": 2}, r"template_tokens\['eos_token'\]: expected str"),
        (["generation", "defaults"], {"temprature": 1}, "unknown default 'temprature'. Did you mean 'temperature'"),
        (["generation", "defaults"], {"temperature": -1}, "temperature must be at least 0, got -1"),
        (["generation", "defaults"], {"top_k": 1.5}, "top_k must be a whole number"),
        (["generation", "defaults"], {"top_p": 0}, "top_p must be above 0, at most 1"),
        (["generation", "defaults"], {"min_p": float("nan")}, "min_p must be from 0 to 1, got nan"),
        (["generation", "defaults"], {"top_k": float("inf")}, "top_k must be a whole number"),
        (["generation", "defaults"], {"do_sample": 2}, "do_sample must be 0 or 1"),
        (["generation", "defaults"], {"do_sample": True}, "expected float, got bool"),
        (["generation", "extra"], 1, "generation: unknown key 'extra'"),
    ],
)
def test_what_is_wrong_of_a_generator_is_named(path, value, said):
    doc = json.loads(GENERATOR.to_json())
    set_at(doc, path, value)
    with pytest.raises(BundleError, match=said):
        parse(doc)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Generation)])
def test_missing_keys_of_a_generator_are_named(key):
    doc = json.loads(GENERATOR.to_json())
    del doc["generation"][key]
    with pytest.raises(BundleError, match=f"generation: missing '{key}'"):
        parse(doc)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_not_a_manifest(raw):
    with pytest.raises(BundleError):
        parse_manifest(raw)


def test_the_size_is_limited():
    with pytest.raises(BundleError, match="limit is 1000000"):
        parse_manifest(b" " * 1_000_001)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([field.name for field in dataclasses.fields(Manifest)]), json_values)
def test_any_value_anywhere_parses_or_is_a_bundle_error(key, value):
    doc = document()
    doc[key] = value
    with contextlib.suppress(BundleError):
        parse(doc)
