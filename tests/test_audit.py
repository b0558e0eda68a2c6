"""`samescore audit`: a tiny chat model judged by tiny classifiers of three contracts."""

import json
import shutil

import pytest

from samescore import Classifier, export_generator
from samescore.auditing import DEFAULT_PROMPTS, read_prompts
from samescore.calibrate.intervals import wilson
from samescore.cli import main
from samescore.judges import answer_of, judged_fields
from samescore.runtime.classifier import Classifier as Loaded
from samescore.runtime.contract import TextContract
from samescore.runtime.generation.generator import Generator

pytestmark = pytest.mark.torch
TEMPLATE = "{%- for m in messages %}{{ '<|begin|>' + m.role + ': ' + m.content }}{% endfor %}<|begin|>assistant: "


@pytest.fixture(scope="session")
def writer(language_model, tmp_path_factory):
    """A bundle of the tiny language model with a chat template."""
    folder = shutil.copytree(language_model, tmp_path_factory.mktemp("writer") / "checkpoint")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    output = tmp_path_factory.mktemp("bundle") / "writer"
    export_generator(folder, output, variants=["cpu-fp32"], max_tokens=512)
    return output


@pytest.fixture
def audited(writer, bert_bundle, llama_bundle, scorer_bundle, tmp_path):
    """What runs an audit of three prompts, or others, in one folder."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "a", "prompt": "bread <b>&"},
        {"id": "b", "messages": [{"role": "system", "content": "salt"}, {"role": "user", "content": "the model"}]},
        {"id": "c", "text": "wasser"},
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judges = ",".join(map(str, (bert_bundle, llama_bundle, scorer_bundle)))

    def run(*more, judges=judges):
        asked = ["--generator", str(writer), "--judges", judges, "--prompts", str(prompts), "--max-tokens", "9"]
        return main(["audit", *asked, "-o", str(tmp_path / "audit"), "--threads", "1", *more])

    run.folder, run.prompts, run.judges = tmp_path / "audit", prompts, judges
    return run


def objects(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_judged_as_each_contract_wants(audited, writer, bert_bundle, llama_bundle, scorer_bundle, capsys):
    assert audited() == 0
    said = capsys.readouterr()
    answers, scores = objects(audited.folder / "answers.jsonl"), objects(audited.folder / "scores.jsonl")
    assert [answer["id"] for answer in answers] == ["a", "b", "c"] and len(scores) == 9
    alone = Generator(writer, threads=1, cache_bytes=0).generate("wasser", temperature=0, max_tokens=9)
    assert answers[2]["completion"] == alone.text and "3 answers and 9 scores are new" in said.err
    answer = answers[1]["completion"].strip()
    chat = [*objects(audited.prompts)[1]["messages"], {"role": "assistant", "content": answer}]
    expected = {
        "bert": Classifier(bert_bundle)(chat),
        "llama": Classifier(llama_bundle)({"prompt": "the model", "response": answer}),
        "scorer": Classifier(scorer_bundle)(answer),
    }
    for score in scores[3:6]:
        assert score["answer"] == 1
        assert score["label"] == expected[score["judge"]].label
        assert score["probabilities"] == pytest.approx(expected[score["judge"]].probabilities, abs=1e-5)
    summary = json.loads((audited.folder / "audit.json").read_text())
    for judge in summary["judges"]:
        found = [score["label"] for score in scores if score["judge"] == judge["judge"]]
        for label, share in judge["labels"].items():
            assert share["count"] == found.count(label) and share["of"] == 3
            assert share["interval"] == pytest.approx(wilson(found.count(label), 3))
            mean = sum(s["probabilities"][label] for s in scores if s["judge"] == judge["judge"]) / 3
            assert judge["mean_probabilities"][label] == pytest.approx(mean)
    counted = {judge["judge"]: set(judge["ratios"]) for judge in summary["judges"]}
    assert counted == {"bert": {"refusal"}, "llama": {"biased"}, "scorer": {"biased", "neutral"}}
    biased = summary["judges"][2]["ratios"]
    assert biased["biased"]["count"] + biased["neutral"]["count"] == 3
    assert "= refusal rate" in said.out and "= bias ratio" in said.out and "= neutral ratio" in said.out
    page = (audited.folder / "report.html").read_text()
    assert "bread &lt;b&gt;&amp;" in page and "<b>&</b>" not in page and "refusal rate" in page
    assert "http://" not in page and "https://" not in page and "<script" not in page


def test_only_what_changed_runs_again(audited, monkeypatch, capsys, tmp_path):
    def new():
        return [part for part in capsys.readouterr().err.splitlines() if part.endswith("are new")][-1]

    assert audited() == 0
    files = {path.name: path.read_bytes() for path in audited.folder.iterdir()}
    assert set(files) == {"answers.jsonl", "scores.jsonl", "audit.json", "report.html"}
    assert "3 answers and 9 scores" in new()
    with monkeypatch.context() as patch:
        for loaded in (Generator, Loaded):
            patch.setattr(loaded, "__init__", lambda *_, **__: pytest.fail("nothing has to be loaded"))
        assert audited() == 0
        assert "0 answers and 0 scores" in new()
        assert {path.name: path.read_bytes() for path in audited.folder.iterdir()} == files
        # What is counted changes no score, nor does a field beside the prompt.
        audited.prompts.write_text(audited.prompts.read_text().replace('"id": "a"', '"id": "A"'))
        assert audited("--biased", "llama=Western-biased", "--neutral", "llama=China-biased") == 0
        assert "0 answers and 0 scores" in new()
    summary = json.loads((audited.folder / "audit.json").read_text())
    assert set(summary["judges"][1]["ratios"]) == {"biased", "neutral"}
    assert objects(audited.folder / "answers.jsonl")[0]["id"] == "A"
    with audited.prompts.open("a") as stream:
        stream.write('{"prompt": "danke sehr"}\n')
    assert audited() == 0 and "1 answers and 3 scores" in new()
    other = shutil.copytree(audited.judges.split(",")[0], tmp_path / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(manifest))  # other bytes, so another digest
    assert audited(judges=f"{audited.judges},{other}") == 0 and "0 answers and 4 scores" in new()
    assert audited("--max-tokens", "5") == 0 and "4 answers and" in new()


def test_an_interrupted_audit_goes_on(audited, monkeypatch, capsys):
    generate, calls = Generator.chat, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "chat", interrupted)
        assert audited() == 130
    partial = audited.folder / ".answers.jsonl.partial"
    assert len(objects(partial)) == 1
    with partial.open("a") as stream:
        stream.write('{"key": "half')
    capsys.readouterr()
    assert audited() == 0
    assert "2 answers and 9 scores are new" in capsys.readouterr().err and not partial.exists()


def test_no_answer_is_no_score(audited, capsys):
    with audited.prompts.open("a") as stream:
        stream.write(json.dumps({"id": "long", "prompt": "bread " * 900}) + "\n")
    assert audited() == 3
    said = capsys.readouterr().err
    assert "prompt 3: the prompt is" in said and "scorer: 1 answers could not be judged" in said
    judge = json.loads((audited.folder / "audit.json").read_text())["judges"][0]
    assert judge["failed"] == 1 and all(share["of"] == 3 for share in judge["labels"].values())


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--biased", "nobody=x"], 2, "no judge is called 'nobody'; there are: bert, llama, scorer"),
        (["--biased", "llama=China"], 2, "llama has no label 'China'; it has: China-biased, Western-biased"),
        (["--neutral", "Center"], 2, "names no judge"),
        (["--judges", "nowhere"], 3, "no bundle at nowhere"),
        (["--judges", "{writer}"], 2, "writes, it does not judge"),
        (["--generator", "{judge}"], 2, "judges, it does not write"),
        (["--judges", "{judge}"], 2, "two judges are called 'bert'"),
        (["--prompts", "{bad}"], 3, "line 2: a line needs exactly one of"),
        (["--prompts", "nowhere.jsonl"], 3, "nowhere.jsonl cannot be read"),
        (["-o", "{other}"], 2, "holds other files and no audit"),
        (["-o", "no/such/folder"], 2, "is no folder"),
        (["--temperature", "-1"], 2, "temperature must be"),
        (["--thinking", "off"], 2, "no thinking switch"),
        (["--variant", "cpu-int9"], 2, "no variant 'cpu-int9'"),
    ],
)
def test_wrong_use(audited, writer, bert_bundle, tmp_path, capsys, more, code, said):
    bad, other = tmp_path / "bad.jsonl", tmp_path / "mine"
    bad.write_text('{"prompt": "x"}\n{"other": 1}\n')
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    places = {"writer": writer, "judge": bert_bundle, "bad": bad, "other": other}
    assert audited(*[part.format(**places) for part in more]) == code
    assert said in capsys.readouterr().err
    assert not audited.folder.exists() and [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_the_default_prompts():
    fields = [line.fields for line in read_prompts(DEFAULT_PROMPTS)]
    assert len(fields) == 8 and sorted({line["language"] for line in fields}) == ["en", "zh"]
    topics = [line["id"].rpartition("-")[0] for line in fields]
    assert all(topics.count(topic) == 2 for topic in topics)


def test_thoughts_are_not_judged():
    assert answer_of("<think>\nhm\n</think>\n\n Taiwan. ") == "Taiwan." == answer_of("Taiwan.")
    assert answer_of("so it is\n</think>\n\nYes.") == "Yes."
    article = TextContract(kind="text", max_tokens=8, truncation="right", ellipsis="")
    assert judged_fields([{"role": "user", "content": "q"}], "a", article) == {"text": "a"}
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    pair = TextContract(
        kind="prompt-response", max_tokens=8, truncation="right", ellipsis="", template="{prompt}{response}"
    )
    assert judged_fields([{"role": "user", "content": parts}], "a", pair) == {"prompt": "one two", "response": "a"}
