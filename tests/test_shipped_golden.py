"""A bundle whose golden set is partly known by digest: verify, calibrate, report and compare."""

import gzip
import json

import numpy as np
import pytest

from samescore import calibrate_bundle, compare, export_bundle, verify
from samescore.calibrate import shipped
from samescore.calibrate.shipped import read_shipped
from samescore.cli import main
from samescore.runtime import Bundle, BundleError, UsageError

from .test_calibrating import new_texts, texts_with_reference
from .test_compare import edited

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def partial(bert_bundle, bert_checkpoint, texts_files, tmp_path_factory):
    """The tiny BERT's bundle with 20 golden texts inside and 40 by digest."""
    output = tmp_path_factory.mktemp("partial") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "GOLDEN_LIMIT", 1)
        patch.setattr(shipped, "LEAST_WHOLE", 20)
        export_bundle(
            bert_checkpoint,
            output,
            profile="refusal",
            variants=["cpu-int8", "cpu-fp32"],
            golden=texts_files[0],
            calibration=texts_files[1],
        )
    return output


def read(bundle):
    with Bundle(bundle) as opened:
        return read_shipped(opened.read("golden.jsonl.gz"))


def test_verify_checks_what_is_inside_and_says_so(partial, capsys):
    result = verify(partial)
    assert result.passed and result.note == "20 of 60 texts are inside the bundle; the others are known by digest"
    drift = result.certificate.variants["cpu-int8"].drift
    assert drift.texts == 20 and drift.noise_ratio > 0
    assert main(["verify", str(partial), "--variant", "cpu-fp32"]) == 0
    assert "samescore: 20 of 60 texts are inside the bundle" in capsys.readouterr().err


def test_verify_recognizes_all_texts_of_the_certificate(partial, texts_files):
    """Without PyTorch: the numbers of the certificate, bit for bit, from the file of texts."""
    again = verify(partial, texts=texts_files[0])
    certified = json.loads((partial / "parity.json").read_text())
    said = json.loads(again.certificate.to_json())
    assert said["variants"] == certified["variants"] and said["reference"] == certified["reference"]
    assert again.note is None


def test_verify_recognizes_some_texts_in_any_order(partial, texts_files, tmp_path):
    lines = texts_files[0].read_text().splitlines()
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([lines[50], lines[2], lines[50]]))
    result = verify(partial, texts=path)
    assert result.passed and result.certificate.variants["cpu-fp32"].drift.texts == 3
    path.write_text("\n".join([lines[50], '{"text": "never seen"}', '{"text": "nor this"}']))
    with pytest.raises(UsageError, match=r"2 of 3 texts in .* are no golden texts .*first: text 1.*--reference CKPT"):
        verify(partial, texts=path)


def test_a_length_that_the_tokenizer_no_longer_gives_is_an_error(partial, texts_files, tmp_path):
    lines = gzip.decompress((partial / "golden.jsonl.gz").read_bytes()).decode().splitlines()
    document = json.loads(lines[-1])
    lines[-1] = json.dumps(document | {"tokens": document["tokens"] + 1})
    raw = gzip.compress("\n".join(lines).encode())
    copy = edited(partial, tmp_path / "copy", lambda document: None, **{"golden.jsonl.gz": raw})
    with pytest.raises(BundleError, match="1 of 60 golden texts tokenize to another number of tokens.*text 59"):
        verify(copy, texts=texts_files[0])


def test_a_correction_is_judged_on_all_golden_texts(partial, texts_files, tmp_path):
    import shutil

    bundle = shutil.copytree(partial, tmp_path / "bundle")
    texts = texts_with_reference(tmp_path / "t.jsonl", bundle, 1.004)
    result = calibrate_bundle(bundle, texts=texts, variants=["cpu-int8"])
    outcome = result.variants["cpu-int8"]
    assert outcome.stored and outcome.golden.drift.texts == 60
    assert (bundle / "golden.jsonl.gz").read_bytes() == (partial / "golden.jsonl.gz").read_bytes()
    known = json.loads(texts_files[0].read_text().splitlines()[55])["text"]
    path = texts_with_reference(tmp_path / "u.jsonl", bundle, 1.1, texts=[*new_texts(), known])
    with pytest.raises(UsageError, match="1 of 121 texts in .* are golden texts of the bundle"):
        calibrate_bundle(bundle, texts=path)


def test_a_report_tells_texts_by_their_digest(partial):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from samescore.reporting import render_report

    page = render_report(partial)
    golden = read(partial)
    assert len(golden.known) == 40 and "by scores.npz" not in page
    shown = [text for text in golden.known if f"text not inside the bundle (digest {text.digest[:16]}…)" in page]
    assert shown
    assert f"{min(golden.lengths())} to {max(golden.lengths())} tokens" in page


def test_compare_uses_what_is_inside(partial):
    result = compare(partial, partial, variant_a="cpu-fp32", variant_b="cpu-int8")
    assert result.drift.texts == 20
    assert result.notes[-1].startswith("A's golden set: 20 of 60 texts are inside the bundle")


def test_a_partial_set_cannot_judge_an_export(partial, bert_checkpoint, tmp_path):
    from samescore.runtime import InputError

    with pytest.raises(InputError, match="line 22: this text is known by its digest only"):
        export_bundle(bert_checkpoint, tmp_path / "b", golden=partial / "golden.jsonl.gz")
    assert np.array_equal(list(tmp_path.iterdir()), [])
