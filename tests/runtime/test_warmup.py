"""`samescore warmup` and what a Classifier makes of it, on the CPU provider."""

import json
import os

import pytest

from samescore.cli import main
from samescore.runtime import Bundle, InputError, UsageError, load
from samescore.runtime.batches import Bucket
from samescore.runtime.errors import BundleError
from samescore.runtime.tokenizer import TextEncoder
from samescore.runtime.warmup import buckets_of, file_lengths, golden_lengths, memory_of

CPU = ["--provider", "cpu", "--variant", "migraphx-fp16"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMESCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundle(bert_bundle):
    with Bundle(bert_bundle) as opened:
        yield opened


def test_golden_lengths_are_those_of_the_encoder(bundle, texts_files):
    encoder = TextEncoder(bundle.read("tokenizer.json"), bundle.manifest.contract)
    lines = texts_files[0].read_text(encoding="utf-8").splitlines()
    expected = [len(encoder.encode(json.loads(line)["text"]).input_ids) for line in lines]
    assert golden_lengths(bundle) == expected == file_lengths(texts_files[0], encoder)
    assert len(set(expected)) > 20


def test_lengths_of_texts_that_are_known_by_digest(bundle, monkeypatch):
    import gzip

    lines = [{"golden": 1, "reference": {}}, {"text": "x", "input_ids": [1, 2, 3]}, {"digest": "9f", "tokens": 812}]
    monkeypatch.setattr(bundle, "read", lambda _: gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert golden_lengths(bundle) == [3, 812]
    monkeypatch.setattr(bundle, "read", lambda _: gzip.compress(b'{"digest": "9f"}'))
    with pytest.raises(BundleError, match="does not tell the lengths"):
        golden_lengths(bundle)


def test_lengths_of_a_file(bundle, tmp_path):
    encoder = TextEncoder(bundle.read("tokenizer.json"), bundle.manifest.contract)
    file = tmp_path / "lengths.jsonl"
    file.write_text('12\n\n700\n{"text": "bread"}\n')
    assert file_lengths(file, encoder) == [12, 700, len(encoder.encode("bread").input_ids)]
    for wrong in ("true", "0", '"x"', "{}", "{"):
        file.write_text(f"5\n{wrong}\n")
        with pytest.raises(InputError, match="line 2"):
            file_lengths(file, encoder)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no lines"):
        file_lengths(file, encoder)


def test_a_dry_run_plans_and_leaves_nothing(bert_bundle, bundle, capsys, own_cache):
    """Without the provider that it plans for."""
    assert main(["warmup", str(bert_bundle), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    variant = bundle.manifest.variant("migraphx-fp16")
    size = sum(os.path.getsize(bundle.path / name) for name in (variant.model, *variant.data))
    assert told["variant"] == "migraphx-fp16" and told["provider"] == "migraphx" and told["texts"] == 60
    assert told["weight_bytes"] == size and told["memory_bytes"] == size * 2 * len(told["buckets"])
    assert 2 <= len(told["buckets"]) <= 8 and "1x64" in told["buckets"] and 0 < told["waste"] < 0.3
    assert not own_cache.exists()
    assert main(["warmup", str(bert_bundle), "--dry-run", "--buckets", "1x30,4x20"]) == 0
    said = capsys.readouterr().out
    assert "4x20, 1x30" in said and "would be refused" in said and str(own_cache / "migraphx") in said


def test_what_was_warmed_up_is_what_is_loaded(bert_bundle, bundle, capsys, own_cache):
    assert main(["warmup", str(bert_bundle), *CPU, "--buckets", "4x32,1x64", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["seconds"]) == ["1x64", "4x32"]
    variant = bundle.manifest.variant("migraphx-fp16")
    assert buckets_of(bundle, variant, "cpu", 64) == (Bucket(4, 32), Bucket(1, 64))
    assert memory_of(bundle, variant, [Bucket(4, 32), Bucket(1, 64)]).buckets == 2
    other = buckets_of(bundle, variant, "migraphx", 64)
    assert other != (Bucket(4, 32), Bucket(1, 64)) and Bucket(1, 64) in other, "planned from the golden texts"


def test_lengths_decide_the_plan(bert_bundle, tmp_path, capsys):
    file = tmp_path / "lengths.jsonl"
    file.write_text("16\n" * 50 + "33\n" * 3)
    asked = ["warmup", str(bert_bundle), "--dry-run", "--json", "--lengths", str(file), "--batch-tokens", "128"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["buckets"] == ["1x16", "8x16", "3x40", "1x64"] and told["waste"] == pytest.approx(1 - 899 / 920)


def test_a_waste_that_is_out_of_reach_names_what_it_needs(bert_bundle, capsys):
    asked = ["warmup", str(bert_bundle), "--dry-run", "--limit", "3", "--waste", "0.15"]
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    needed = told["buckets_needed"]
    assert told["waste"] > 0.15 and len(told["buckets"]) == 3 < needed
    assert main(asked) == 0
    assert f"15% needs at least {needed} buckets: --limit {needed}" in capsys.readouterr().out
    assert main([*asked, "--limit", str(needed), "--json"]) == 0
    enough = json.loads(capsys.readouterr().out)
    assert enough["waste"] <= 0.15 and enough["buckets_needed"] is None and len(enough["buckets"]) == needed
    assert main([*asked, "--limit", str(needed - 1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["waste"] > 0.15


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--provider", "cuda"], 2, "compiles no shapes"),
        (["--buckets", "8by9", "--dry-run"], 2, "'8by9' is no bucket"),
        (["--buckets", "1x2", "--dry-run"], 2, "holds none of the 60 texts"),
        (["--limit", "1", "--dry-run"], 2, "at least 2 buckets"),
        (["--lengths", "/nowhere", "--dry-run"], 3, "cannot be read"),
        ([], 4, "not in this ONNX Runtime build"),
    ],
)
def test_wrong_use(bert_bundle, arguments, code, said, capsys, own_cache):
    assert main(["warmup", str(bert_bundle), *arguments]) == code
    assert said in capsys.readouterr().err
    assert not own_cache.exists()


def test_a_failed_compilation_keeps_no_plan(bert_bundle, monkeypatch, own_cache, capsys):
    from samescore.runtime import padded

    monkeypatch.setattr(padded, "run_once", lambda *_: (_ for _ in ()).throw(BundleError("out of memory")))
    assert main(["warmup", str(bert_bundle), *CPU, "--buckets", "4x32,1x64"]) == 3
    assert "out of memory" in capsys.readouterr().err and not list(own_cache.rglob("*.json"))


@pytest.fixture
def stood_in(monkeypatch):
    """The CPU provider under MIGraphX's name, which passes its options over."""
    from samescore.runtime import providers, session

    monkeypatch.setitem(providers.EXECUTION_PROVIDERS, "migraphx", "CPUExecutionProvider")
    opened, original = [], session.Session.__init__

    def init(self, model, target, **options):
        opened.append(options)
        original(self, model, target, **options)

    monkeypatch.setattr(session.Session, "__init__", init)
    return opened


def test_a_classifier_for_migraphx_opens_what_was_warmed_up(bert_bundle, stood_in, own_cache, capsys):
    """Every step but MIGraphX itself."""
    assert main(["warmup", str(bert_bundle), "--buckets", "4x32,1x64"]) == 0
    assert "ready     1x64" in capsys.readouterr().out
    expected = load(bert_bundle, provider="cpu", variant="migraphx-fp16").score(["bread", "salt " * 20])
    stood_in.clear()
    classifier = load(bert_bundle, provider="migraphx")
    assert [options["dimensions"] for options in stood_in] == [
        {"batch": 1, "sequence": 64},
        {"batch": 4, "sequence": 32},
    ]
    folders = {options["options"]["migraphx_model_cache_dir"] for options in stood_in}
    assert (
        folders == {str(path) for path in (own_cache / "migraphx").iterdir() if path.name != "plans"}
        and len(folders) == 2
    )
    for got, alone in zip(classifier.score(["bread", "salt " * 20]), expected, strict=True):
        assert got.logits == pytest.approx(alone.logits, abs=4e-3)
    with pytest.raises(UsageError, match="compiled shapes only"):
        load(bert_bundle, provider="migraphx", batch_tokens=64)


def test_a_classifier_for_migraphx_plans_for_itself(bert_bundle, stood_in):
    classifier = load(bert_bundle, provider="migraphx")
    assert 2 <= len(stood_in) <= 8
    assert {str(b) for b in classifier._padded.buckets} >= {"1x64"}
    assert len(classifier._padded.buckets) == len(stood_in)


def test_a_bundle_that_was_not_warmed_up_says_so(bert_bundle, bundle, caplog):
    with caplog.at_level("INFO", logger="samescore"):
        buckets_of(bundle, bundle.manifest.variant("migraphx-fp16"), "migraphx", 64)
    assert "has not been warmed up here" in caplog.text
    scores = load(bert_bundle, provider="cpu", variant="migraphx-fp16", buckets=[(1, 64)]).score(["bread", "salt"])
    assert len(scores) == 2
