"""`samescore report`: one page that needs nothing else, safe whatever texts and labels say."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from samescore import reporting
from samescore.calibrate.certificate import Certificate, Invariance, VariantParity
from samescore.calibrate.gate import TOLERANCES, judge
from samescore.calibrate.golden import GoldenSet, GoldenText, ReferenceInfo, write_golden
from samescore.calibrate.metrics import measure
from samescore.calibrate.scores import write_scores
from samescore.report_tables import share, shortened, small, visible
from samescore.reporting import render_report
from samescore.runtime.contract import TextContract
from samescore.runtime.errors import BundleError
from samescore.runtime.manifest import FileEntry, Manifest, Source, Variant
from samescore.runtime.prediction import probabilities_of
from samescore.runtime.recalibration import FitNumbers, Recalibration

HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)> \u202eevil\u2066 \x00 </td></table> https://example.com/x'
)


class Page(HTMLParser):
    """Which elements and attributes a page has, and that what is opened is closed."""

    VOID = frozenset({"meta", "br", "link", "img", "use", "path", "image"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.data = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data):
        self.data.append(data)


def make_bundle(
    folder,
    labels=("no", "yes"),
    activation="softmax",
    count=120,
    drifts=None,
    with_labels=True,
    bfloat16=True,
    lines=None,
    sensitivity=None,
    seed=0,
):
    """A bundle with evidence but without models: reference logits at random, variants that differ by known noise."""
    random = np.random.default_rng(seed)
    drifts = drifts or {"cpu-int8": 1e-2, "cpu-fp32": 0.0}
    reference = random.normal(0, 3, (count, len(labels))).astype(np.float32)
    noise = {name: random.normal(0, 1, reference.shape) for name in (*drifts, "bfloat16")}
    scores = {name: (reference + scale * noise[name]).astype(np.float32) for name, scale in drifts.items()}
    truth = [labels[i] if with_labels else None for i in random.integers(0, len(labels), count)]
    info = ReferenceInfo("0" * 64, "float32", "2.13.0", "5.23.0", 1e-3, 1e-2, None, None)
    texts = tuple(
        GoldenText({"text": f"text {i} " + "word " * (i % 90)}, truth[i], np.arange(3 + i % 90), reference[i])
        for i in range(count)
    )
    raw = write_golden(GoldenSet(info, texts))
    if lines is not None:
        documents = [json.loads(line) for line in raw.decode().split("\n") if line]
        raw = "\n".join(
            json.dumps(lines(i - 1, document)) if i else json.dumps(document) for i, document in enumerate(documents)
        ).encode()
    parity = {}
    for name in drifts:
        tolerance = TOLERANCES[name.rpartition("-")[2]]
        drift = measure(reference, scores[name], labels, activation, truth=truth, bf16_mean_abs_dp=1e-3)
        parity[name] = VariantParity(drift, Invariance(0.0, 1e-6, None), tolerance, judge(drift, tolerance))
    certificate = json.loads(Certificate(info, {"onnxruntime": "1.31.1", "int8_flags": ["avx2"]}, parity).to_json())
    for name, effects in (sensitivity or {}).items():
        certificate["variants"][name]["sensitivity"] = effects
    if bfloat16:
        scores["bfloat16"] = (reference + 5e-3 * noise["bfloat16"]).astype(np.float32)
    files = {
        "golden.jsonl.gz": raw,
        "parity.json": json.dumps(certificate).encode(),
        "scores.npz": write_scores(scores),
        **{f"{name}/model.onnx": b"graph" for name in drifts},
    }
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    recipe = {
        "linear": "int8-row",
        "embedding": "int8-row",
        "smoothing": "none",
        "graph": "plain",
        "parts": "layer.1=int16-row",
    }
    known = {"model": "", "data": (), "inputs": ("input_ids",), "opset": 21, "max_tokens": None, "recipe": recipe}
    variants = tuple(
        Variant(
            **{
                **known,
                "name": name,
                "target": "cpu",
                "precision": name.rpartition("-")[2],
                "model": f"{name}/model.onnx",
            }
        )
        for name in drifts
    )
    manifest = Manifest(
        schema_version=1,
        samescore_version="0.1.0",
        profile=None,
        architecture="BertForSequenceClassification",
        source=Source("folder", "somewhere", None, "0" * 64, None, ()),
        contract=TextContract("text", 512, "right", ""),
        labels=tuple(labels),
        values=None,
        label_tokens=None,
        activation=activation,
        variants=variants,
        files={name: FileEntry(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()},
    )
    (folder / "bundle.json").write_bytes(manifest.to_json())
    return folder


def numbers(document):
    """Every number of a nested document."""
    if isinstance(document, dict):
        return [x for value in document.values() for x in numbers(value)]
    return [document] if isinstance(document, int | float) else []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": ("Left", "Center", "Right")},
        {"labels": tuple("01234"), "drifts": {"cpu-int8": 0.5, "cpu-fp32": 1e-6}},
        {"labels": ("toxic", "rude", "spam"), "activation": "sigmoid", "with_labels": False},
        {"labels": ("score",), "activation": "sigmoid", "with_labels": False},
        {"with_labels": False, "bfloat16": False, "count": 2},
    ],
    ids=["two labels", "three", "five, one variant failing", "sigmoid, no labels", "one label", "two texts"],
)
def test_the_page_is_whole(tmp_path, options):
    bundle = make_bundle(tmp_path / "bundle", **options)
    text = render_report(bundle)
    page = Page(text)
    assert "script" not in page.tags and not {"link", "iframe", "object", "embed"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
        assert "url(" not in value.replace("url(#", ""), (tag, name, value[:80])
    assert not re.search(r"https?://|@import|@font-face", text)
    certificate = json.loads((bundle / "parity.json").read_text())
    for name, parity in certificate["variants"].items():
        section = text[text.index(f">{name}</h2>") :]
        shown = set(re.findall(r'<data value="([^"]*)"', section[: section.index("Labels that changed")]))
        drift = {key: value for key, value in parity["drift"].items() if key != "flips"}
        assert {str(number) for number in numbers(drift)} <= shown
        assert f"banner of-{parity['verdict']['outcome']}" in section
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    images = [value for _, name, value in page.attributes if name == "aria-label"]
    figures = 4 + bool(options.get("bfloat16", True)) + bool(options.get("with_labels", True))
    assert len(images) == 1 + 2 * figures and all(len(value) > 30 for value in images)
    assert page.tags.count("svg") == len(images)
    assert 'href="#' not in re.sub(r'href="#(v\d+)"', "", text) or set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


def test_verdicts(tmp_path):
    failing = render_report(make_bundle(tmp_path / "a", drifts={"cpu-int8": 1.0, "cpu-fp32": 0.0}))
    certificate = json.loads((tmp_path / "a" / "parity.json").read_text())["variants"]["cpu-int8"]
    assert certificate["verdict"]["outcome"] == "FAIL"
    assert "banner of-FAIL" in failing and "banner of-PASS" in failing
    for failure in certificate["verdict"]["failures"]:
        assert failure.replace(">", "&gt;").replace("<", "&lt;") in failing or failure in failing
    flips = certificate["drift"]["flips"]
    section = failing[failing.index('id="v0"') : failing.index('id="v1"')]
    assert f"Labels that changed: {len(flips)}" in section
    table = section[section.index("Labels that changed") : section.index("The texts that differ most")]
    assert {int(n) for n in re.findall(r"<tr><td>(\d+)</td>", table)} == {flip["text"] for flip in flips}
    assert "does not apply: the graph keeps no state" in section and "0, equal bit for bit" in section


def test_near_ties_alone_are_ambiguous(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", drifts={"cpu-int8": 1e-2})
    document = json.loads((bundle / "parity.json").read_text())
    verdict = {"outcome": "AMBIGUOUS", "failures": [], "notes": ["the others are near ties"]}
    document["variants"]["cpu-int8"]["verdict"] = verdict
    replace_file(bundle, "parity.json", json.dumps(document).encode())
    text = render_report(bundle)
    assert "banner of-AMBIGUOUS" in text and "<li>the others are near ties</li>" in text


def test_a_recalibrated_variant_has_its_own_curve():
    """With temperature 2 the same labels are right, at less confidence."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (50, 2)).astype(np.float32)
    p = probabilities_of(logits, "softmax")
    known = np.ones(50, bool)
    evidence = SimpleNamespace(
        logits=logits, p=p, truth=random.integers(0, 2, 50), manifest=SimpleNamespace(activation="softmax")
    )
    numbers = FitNumbers(None, None, None, None, None, None)
    halved = Recalibration("temperature", "reference", (0.5, 0.5), (0.0, 0.0), (), 60, 30, "0" * 64, numbers, numbers)
    q = probabilities_of(logits / 2, "softmax")
    plain = reporting._reliability("v0", SimpleNamespace(recalibration=None), p, logits, known, evidence)
    both = reporting._reliability("v0", SimpleNamespace(recalibration=halved), q, logits, known, evidence)
    assert "recalibrated" not in plain["svg"] and ">recalibrated</text>" in both["svg"]
    accuracy = re.findall(r"(?:reference|variant|recalibrated) ([\d.]+) %", both["alt"])
    assert len(accuracy) == 3 and len(set(accuracy)) == 1


def test_hostile_texts_and_labels_are_shown_and_do_nothing(tmp_path):
    def lines(number, document):
        document["text"] = HOSTILE + document["text"]
        return {**document, "language": "<b>en</b>", "slice": "adversarial" if number % 2 else "ordinary"}

    labels = ("<i>$x_1$</i>", "\u202e我\u2066")
    text = render_report(make_bundle(tmp_path / "bundle", labels=labels, lines=lines, drifts={"cpu-int8": 0.3}))
    page = Page(text)
    assert not {"script", "img", "i-", "b-"} & set(page.tags)
    assert all(not name.startswith("on") for _, name, _ in page.attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "⟨U+202E⟩evil⟨U+2066⟩" in text and "⟨U+0000⟩" in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", text)
    assert "&lt;b&gt;en&lt;/b&gt;" in text and "<b>en" not in text
    rows = re.findall(r'<td class="quiet">slice</td><td><bdi>(\w+)</bdi></td><td class="n">(\d+)</td>', text)
    assert rows == [("adversarial", "60"), ("ordinary", "60")]


def test_the_same_bundle_gives_the_same_bytes(tmp_path):
    bundle = make_bundle(tmp_path / "a", drifts={"cpu-int8": 1e-2})
    shutil.copytree(bundle, tmp_path / "b")
    first, second = (
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"from samescore.reporting import *; print(render_report({str(tmp_path / name)!r}))",
            ],
            capture_output=True,
            check=True,
            timeout=120,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for name, seed in (("a", "1"), ("b", "2"))
    )
    assert first == second and len(first) > 10_000


@pytest.mark.slow
def test_a_large_set_stays_small(tmp_path):
    drifts = {"cpu-int8": 1e-2, "cpu-fp32": 1e-6, "migraphx-fp16": 1e-3, "cpu-int4": 1e-1}
    page = render_report(make_bundle(tmp_path / "bundle", labels=tuple("01234"), count=3000, drifts=drifts))
    assert len(page.encode()) <= 2_000_000


def test_sensitivity(tmp_path):
    effects = {"cpu-int8": {"embedding": 1e-4, "layer.0": 4e-3, "layer.1": 2e-3}}
    text = render_report(make_bundle(tmp_path / "bundle", sensitivity=effects))
    assert re.findall(r"<tr><td><code>([\w.]+)</code>( \([\w-]+\))?</td>", text) == [
        ("layer.0", ""),
        ("layer.1", " (int16-row)"),
        ("embedding", ""),
    ]
    assert "width:100.0%" in text and "width:50.0%" in text and "width:2.5%" in text


def test_not_finite_logits_are_drawn_as_the_certificate_counts_them(tmp_path):
    bundle = make_bundle(tmp_path / "bundle", drifts={"cpu-fp32": 0.0})
    from samescore.calibrate.scores import read_scores

    scores = read_scores((bundle / "scores.npz").read_bytes())
    scores["cpu-fp32"][7] = np.nan
    replace_file(bundle, "scores.npz", write_scores(scores))
    text = render_report(bundle)
    assert "contradict each other: max |Δp| is 1.00 by scores.npz, 0 by parity.json" in text


def replace_file(bundle, name, raw):
    (bundle / name).write_bytes(raw)
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (bundle / "bundle.json").write_text(json.dumps(document))


def test_bundles_without_scores_say_so(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    replace_file(bundle, "scores.npz", write_scores({"cpu-int8": np.zeros((3, 2), np.float32)}))
    with pytest.raises(BundleError, match=r"cpu-int8 has shape \(3, 2\), the golden set \(120, 2\)"):
        render_report(bundle)
    replace_file(bundle, "scores.npz", write_scores({"cpu-int8": np.zeros((120, 2), np.float32)}))
    with pytest.raises(BundleError, match="says nothing of cpu-fp32"):
        render_report(bundle)
    document = json.loads((bundle / "bundle.json").read_text())
    del document["files"]["scores.npz"]
    (bundle / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleError, match=r"holds no scores.npz.*export it again"):
        render_report(bundle)


def run(*arguments, before=""):
    code = f"import sys\n{before}\nfrom samescore.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "report", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_command(tmp_path):
    bundle, target = make_bundle(tmp_path / "bundle", drifts={"cpu-int8": 1e-2}), tmp_path / "report.html"
    done = run(
        bundle, "-o", target, before="sys.modules.update(torch=None, transformers=None, onnx_ir=None, safetensors=None)"
    )
    assert done.returncode == 0, done.stderr
    assert target.read_text(encoding="utf-8") == render_report(bundle)
    again = run(bundle, "-o", target)
    assert again.returncode == 2 and "--force" in again.stderr
    assert run(bundle, "-o", target, "--force").returncode == 0
    folder = run(bundle, "-o", tmp_path)
    assert folder.returncode == 2 and "is a folder" in folder.stderr
    for name in ("matplotlib", "jinja2"):
        missing = run(bundle, "-o", tmp_path / "other.html", before=f"sys.modules.update({name}=None)")
        assert missing.returncode == 4 and "pip install 'samescore[report]'" in missing.stderr
    assert run(tmp_path / "nowhere", "-o", tmp_path / "other.html").returncode == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "report.html"]


def test_of_an_exported_bundle(bert_bundle):
    text = render_report(bert_bundle)
    Page(text)
    assert "contradict" not in text
    assert text.count("<h2 id=") == 3 and "samescore verify BUNDLE --variant migraphx-fp16" in text


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.014, "0.0140"), (3.0, "3.00"), (1234.5, "1,234"), (3e-7, "3.00e-7"), (60, "60"), (None, "–")],
)
def test_numbers(value, said):
    assert small(value) == said


def test_words():
    assert share(0.99995) == "99.99 %" or share(0.99995) == "100.00 %"
    assert visible("a\n\tb\u200dc\u202e") == "a b\u200dc⟨U+202E⟩"
    long = shortened("x" * 500)
    assert "[…]" in long and long.endswith("(500 characters)") and len(long) < 280
